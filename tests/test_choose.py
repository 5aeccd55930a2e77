"""What stays dense: the front against trying every set, costs, text rows, measured choices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from lynx_compile.calibration import Inputs, calibrate
from lynx_compile.calibration.choose import Chooser, apply_choice, chooser_for
from lynx_compile.calibration.costs import costs_of
from lynx_compile.calibration.front import Choice, Problem, Way, neighbours, pick, points
from lynx_compile.calibration.sensitivity import Sensitivity, gram_of
from lynx_compile.calibration.text_rows import joint_text_rows, text_rows_of
from lynx_compile.profile import Layer, Profile
from tests import zoo
from tests.test_calibration import make_workload


def random_problem(seed: int, layers: int = 7, steps: int = 20, factors: object = None) -> Problem:
    """Layers that may run sparse whole, or with their text rows dense: less saved, less harm."""
    generator = torch.Generator().manual_seed(seed)
    saved, part = torch.rand(2, layers, generator=generator).tolist()
    effects = torch.randn(2 * layers, 12, generator=generator) + 0.3
    effects[layers:] *= torch.rand(layers, 1, generator=generator)
    ways = [Way(f"layer{i}", 0, s) for i, s in enumerate(saved)]
    ways += [Way(f"layer{i}", 8, s * p) for i, (s, p) in enumerate(zip(saved, part, strict=True))]
    gram = gram_of(effects).numpy()
    return Problem(ways, gram, 2 * sum(saved), steps, factors or {0: 1.0})


@pytest.mark.parametrize("seed", range(4))
def test_front_is_that_of_trying_every_set(seed: int) -> None:
    problem = random_problem(seed)
    front = points(problem)
    every = []
    for ways in itertools.product((None, 0, 8), repeat=7):
        members = np.array([ways[int(way.layer[5:])] == way.tokens for way in problem.ways])
        every.append(problem.choice(members, 0))
    for speed in (1.05, 1.2, 1.5, 1.8):
        best = min(choice.error for choice in every if choice.speed >= speed)
        chosen = pick(front, speed=speed)
        assert best <= chosen.error <= best * 1.15
        assert chosen.time == pytest.approx(problem.choice(problem.members(chosen), 0).time)
        for near in neighbours(problem, chosen, 5):
            assert near.speed >= chosen.speed * (1 - 1e-6)
            assert near.sparse != chosen.sparse
    with pytest.raises(ValueError, match="no choice reaches"):
        pick(front, speed=3.0)
    assert pick(front, max_error=0.0).sparse == {}
    assert [c.error for c in front] == sorted(c.error for c in front)


def test_layers_that_pull_apart_go_together() -> None:
    # b undoes what a does; each alone is worse than c.
    effects = np.array([[1.0, 0.0], [-0.9, 0.0], [0.0, 0.8], [0.0, 0.8]])
    ways = [Way(name, 0, 0.5) for name in "abcd"]
    problem = Problem(ways, effects @ effects.T, 4.0, 20, {0: 1.0})
    assert set(pick(points(problem), speed=1 / (1 - 0.25)).sparse) == {"a", "b"}


def test_harmless_layers_are_always_taken() -> None:
    problem = Problem([Way("big", 0, 1.0), Way("small", 0, 1e-6)], np.diag([1.0, 0.0]), 2.0, 20, {0: 1.0})
    assert pick(points(problem), speed=1.9).sparse == {"big": 0, "small": 0}


def test_dense_steps_are_taken_where_they_pay() -> None:
    ways = [Way("a", 0, 0.5), Way("b", 0, 0.5)]
    problem = Problem(ways, np.eye(2), 2.0, 20, {0: 1.0, 1: 0.01})
    assert pick(points(problem), speed=1.8).dense_steps == 1
    # 19 of 20 steps sparse are 1.9 times as fast: too slow here, whatever they would save.
    assert pick(points(problem), speed=1.95).dense_steps == 0


def test_dense_last_steps_are_no_saving() -> None:
    ways = [Way("a", 0, 0.5), Way("b", 0, 0.5)]
    problem = Problem(ways, np.eye(2), 2.0, 20, {0: 1.0, 1: 0.01}, dense_last_steps=2)
    found = points(problem)
    assert {choice.dense_last_steps for choice in found if choice.sparse} == {2}
    assert found[0].dense_last_steps == 0  # nothing is sparse anyway
    assert min(choice.time for choice in found) == pytest.approx(1 - 1.0 * 18 / 20 / 2.0)
    with_first = next(c for c in found if c.dense_steps == 1 and len(c.sparse) == 2)
    assert with_first.time == pytest.approx(1 - 1.0 * 17 / 20 / 2.0)


def test_fronts_of_many_layers_are_found() -> None:
    found = points(random_problem(0, layers=60))
    assert len(found) > 10
    assert len({choice.time for choice in found}) == len(found)


def test_costs_count_dense_rows_as_dense() -> None:
    workload = make_workload(2)
    profile = calibrate(workload, rank=16, quiet=True)
    costs = costs_of(profile, workload.model, "flops", {"blocks.0.to_q": 6})
    layer = 24 * 64 * 64
    assert costs.dense_time == 7 * layer
    assert costs.saved["blocks.0.to_q"] == layer / 2
    assert costs.rows_saved == {"blocks.0.to_q": layer / 2 * 18 / 24}
    assert costs_of(profile, workload.model, "flops", {"blocks.0.to_q": -6}).rows_saved == costs.rows_saved
    profile.layers = {"wide": Layer((12288, 3072), True, "", tokens=4608)}
    predicted = costs_of(profile, workload.model, "h200", {"wide": 512})
    assert 0 < predicted.rows_saved["wide"] < predicted.saved["wide"] < predicted.dense_time


def test_text_rows_of_a_joint_sequence() -> None:
    workload = make_workload(1)
    study = Sensitivity(workload, quiet=True)
    assert joint_text_rows(study, ["blocks.0.to_q"]) == {}
    assert joint_text_rows(study, ["blocks.0.to_q", "blocks.1.to_q"], {"blocks.1.*": 6}) == {
        "blocks.1.to_q": 6
    }


def test_text_rows_of_known_models() -> None:
    flux, inputs = zoo.build("FluxTransformer2DModel")
    text = inputs["encoder_hidden_states"].shape[1]
    assert text_rows_of(flux, (), inputs) == ("single_transformer_blocks.*", text)
    z_image, inputs = zoo.build("ZImageTransformer2DModel")
    captions = [torch.randn(tokens, 64) for tokens in (7, 33)]
    call = (inputs["x"] * 2, inputs["t"], captions)
    assert text_rows_of(z_image, call, {"return_dict": False}) == ("layers.*", -64)
    assert text_rows_of(z_image, (*call[:2], [captions]), {}) is None  # an edit: captions in front
    assert text_rows_of(nn.Sequential(nn.Linear(4, 4)), (torch.zeros(4),), {}) is None


def test_the_longest_text_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = zoo.build("ZImageTransformer2DModel")
    study = Sensitivity(Inputs(model, [inputs]), quiet=True)
    calls = [((), {**inputs, "cap_feats": [torch.randn(n, 64)]}) for n in (20, 70, 40)]
    monkeypatch.setattr(study, "first_calls", lambda: calls)
    names = ["layers.0.attention.to_q", "context_refiner.0.attention.to_q"]
    assert joint_text_rows(study, names) == {"layers.0.attention.to_q": -96}


def measured_chooser() -> tuple[Chooser, Profile, Sensitivity]:
    workload = make_workload(2)
    profile = calibrate(workload, rank=16, steps=1, quiet=True)
    study = Sensitivity(workload, quiet=True)
    branches = {name: layer.branch for name, layer in profile.layers.items()}
    return chooser_for(study, profile, branches, "flops", text_rows={"blocks.0.to_q": 12}), profile, study


def test_choice_is_measured_and_fits_the_error() -> None:
    chooser, profile, study = measured_chooser()
    everything = study.sample({name: layer.branch for name, layer in profile.layers.items()})
    told: list[Choice] = []
    choice = chooser.choose(max_error=0.7 * everything, note=told.append)
    assert choice in told
    assert 0 < choice.measured <= 0.7 * everything
    assert 0 < len(choice.sparse) < len(profile.layers)
    at_speed = chooser.choose(speed=choice.speed, note=told.append)
    assert at_speed.speed >= choice.speed * (1 - 1e-9)
    assert at_speed.measured <= choice.measured
    assert at_speed.measured == min(c.measured for c in told if c.speed >= choice.speed * (1 - 1e-9))
    assert chooser.choose(max_error=0.0).sparse == {}
    told.clear()
    best = chooser.choose(speed=1.1, note=told.append)
    ruled = [c for c in told if set(c.sparse) == {f"blocks.{i}.to_{name}" for i in (0, 1) for name in "qk"}]
    assert best.measured <= min(c.measured for c in ruled)  # no worse than without a profile


class Runs:
    """Three calls in a row on each batch, each reading what the last one gave."""

    def __init__(self, count: int) -> None:
        self.batches = make_workload(count)
        self.model, self.identity = self.batches.model, "runs"

    def __len__(self) -> int:
        return len(self.batches)

    @torch.no_grad()
    def run(self, batch: int) -> torch.Tensor:
        x = self.batches.inputs[batch]
        for _ in range(3):
            x = self.model(x)
        return x


def test_what_is_measured_leaves_the_last_steps_dense() -> None:
    workload = Runs(2)
    profile = calibrate(workload, rank=16, steps=3, quiet=True)
    study = Sensitivity(workload, quiet=True)
    branches = {name: layer.branch for name, layer in profile.layers.items()}
    chooser = chooser_for(study, profile, branches, "flops")
    choice = chooser.choose(speed=1.2)
    assert choice.dense_last_steps == 1
    layers = {name: branches[name] for name in choice.sparse}
    sparse = study.sample(layers, lambda call: choice.dense_steps <= call < 2)
    assert choice.measured == pytest.approx(sparse, rel=1e-6)
    assert sparse < study.sample(layers, lambda call: choice.dense_steps <= call)
    assert chooser.ending(0).choose(speed=1.2).dense_last_steps == 0
    with pytest.raises(ValueError, match="3 dense last steps leave none of 3 sparse"):
        chooser_for(study, profile, branches, "flops", dense_last_steps=3)


def test_effects_are_noted_and_add_up() -> None:
    _, profile, study = measured_chooser()
    effects = profile.layers["blocks.0.to_q"].sensitivity
    assert 0 < effects["sample_text_dense"] < effects["sample"]
    alone = study.sample({"blocks.0.to_q": profile.layers["blocks.0.to_q"].branch})
    assert effects["sample"] == pytest.approx(alone, rel=0.01)
    noted = profile.studies["interactions"]
    assert noted["measured_together"] == pytest.approx(noted["sum_of_own"], rel=0.5)
    assert 0 <= noted["adding"] <= 1
    assert min(noted["within"].values()) >= 0
    assert len(noted["within"]) == 7  # six layers, one of them in two ways


def test_text_rows_stay_dense_where_chosen() -> None:
    chooser, profile, _ = measured_chooser()

    def measured(**ways: int) -> Choice:
        wanted = {f"blocks.0.{layer}": tokens for layer, tokens in ways.items()}
        members = np.array([wanted.get(way.layer) == way.tokens for way in chooser.problem.ways])
        return chooser.measure(chooser.problem.choice(members, 0))

    choice = measured(to_q=12, to_k=0)
    assert choice.measured < measured(to_q=0, to_k=0).measured
    apply_choice(profile, choice)
    assert profile.layers["blocks.0.to_q"].branch.dense_tokens == 12
    assert profile.layers["blocks.0.to_k"].branch.dense_tokens == 0
    assert set(profile.sparse_layers()) == {"blocks.0.to_q", "blocks.0.to_k"}
