"""Calibration: closed forms, shared statistics, resuming, processes, sensitivity, choice, training."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lynx_compile.calibration import Inputs, calibrate, emulate
from lynx_compile.calibration.collect import Collector
from lynx_compile.calibration.refine import (
    distill_layers,
    random_branches,
    record,
    split_calls,
)
from lynx_compile.calibration.sensitivity import Sensitivity, block_of, class_of
from lynx_compile.calibration.solve import allocate_ranks, deflations, lora_branches
from lynx_compile.calibration.statistics import Moments, moments_bytes, rows_of, spread_over
from lynx_compile.profile import Branch
from lynx_compile.runtime import semantics


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.softmax(self.to_q(x) @ self.to_k(x).transpose(-1, -2) / 8, -1)
        return x + self.to_out(scores @ x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 64)
        self.blocks = nn.ModuleList([Attention(), Attention()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


def make_workload(batches: int = 6, seed: int = 0) -> Inputs:
    torch.manual_seed(0)
    model = Model().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(9)) / 4
    return Inputs(model, [torch.randn(2, 24, 64, generator=generator) @ mix + 0.5 for _ in range(batches)])


def spread_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(900, 64) @ torch.randn(64, 64) + torch.randn(64)
    return x, torch.randn(48, 64), x.mean(0)


def test_deflation_leaves_the_least_energy_and_predicts_its_error() -> None:
    x, weight, mean = spread_inputs()
    x = (x - mean) @ torch.diag(0.9 ** torch.arange(64)) + mean
    moments = Moments.zeros(64, x.device)
    moments.update(x, mean, "norm")
    fit = deflations(moments, mean, {"layer": weight}, 48)["layer"]
    down = fit.down(8)
    torch.testing.assert_close(down @ down.T, torch.eye(8), atol=1e-5, rtol=0)
    z = x - mean
    left = (z - z @ down.T @ down).square().sum()
    torch.testing.assert_close(left, torch.linalg.svdvals(z)[8:].square().sum(), rtol=1e-3, atol=0)
    errors = [0.0, 0.0]
    layer = nn.Linear(64, 48, bias=False).requires_grad_(False)
    layer.weight.copy_(weight)
    for i, branch in enumerate((Branch(shift=mean), Branch(down, fit.up(8), mean, deflate=True))):
        errors[i] = float((branch(layer, x) - layer(x)).norm() / layer(x).norm())
    assert errors[0] == pytest.approx(fit.error(0), rel=1e-3)
    assert errors[1] == pytest.approx(fit.error(8), rel=0.15)
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("rank", [0, 8, 48])
def test_errors_are_those_of_the_branch(rank: int) -> None:
    x, weight, mean = spread_inputs()
    moments = Moments.zeros(64, x.device)
    for rows in x.split(250):
        moments.update(rows, mean, "norm")
    branches = lora_branches(moments, mean, {"layer": weight}, 48, ridge=1e-4)["layer"]
    z = x - mean
    sparse = semantics.sparsify(z)
    residual = (z - sparse.scale[:, None] * sparse.pruned) @ weight.T
    down, up = branches.down(rank), branches.up(rank)
    left = (residual - z @ down.T @ up.T).norm() / (x @ weight.T).norm()
    assert branches.error(rank) == pytest.approx(float(left), rel=1e-3)
    torch.testing.assert_close((z @ down.T).square().mean(0), torch.ones(rank), rtol=0.05, atol=0.05)


def test_closed_form_is_the_best_branch_of_its_rank() -> None:
    x, weight, mean = spread_inputs()
    moments = Moments.zeros(64, x.device)
    moments.update(x, mean, "norm")
    branches = lora_branches(moments, mean, {"layer": weight}, 4, ridge=1e-4)["layer"]
    down, up = branches.down(4), branches.up(4)
    z = x - mean
    sparse = semantics.sparsify(z)
    residual = (z - sparse.scale[:, None] * sparse.pruned) @ weight.T
    least = (residual - z @ down.T @ up.T).square().sum()
    factors = [nn.Parameter(down.clone()), nn.Parameter(up.clone())]
    optimizer = torch.optim.Adam(factors, lr=1e-3)
    for _ in range(200):
        loss = (residual - z @ factors[0].T @ factors[1].T).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) > float(least) * (1 - 1e-3)


def test_the_ridge_keeps_a_branch_from_learning_few_samples_by_heart() -> None:
    generator = torch.Generator().manual_seed(3)
    mix, weight = torch.randn(64, 64, generator=generator), torch.randn(48, 64, generator=generator)

    def error_on_others(ridge: float) -> float:
        x, others = (torch.randn(count, 64, generator=generator) @ mix for count in (150, 2000))
        moments = Moments.zeros(64, x.device)
        moments.update(x, None, "norm")
        fit = lora_branches(moments, None, {"layer": weight}, 16, ridge)["layer"]
        sparse = semantics.sparsify(others)
        kept = sparse.scale[:, None] * sparse.pruned
        y = kept @ weight.T + others @ fit.down(16).T @ fit.up(16).T
        return float((y - others @ weight.T).norm())

    assert error_on_others(0.1) < 0.97 * error_on_others(1e-4)


def test_layers_of_one_input_share_the_best_down_projection() -> None:
    x, weight, mean = spread_inputs()
    moments = Moments.zeros(64, x.device)
    moments.update(x, mean, "norm")
    weights = {"q": weight[:16], "k": 10 * weight[16:]}
    branches = lora_branches(moments, mean, weights, 8, ridge=1e-4)
    assert branches["q"].directions is branches["k"].directions
    z = x - mean
    sparse = semantics.sparsify(z)
    lost = z - sparse.scale[:, None] * sparse.pruned
    down, total = branches["q"].down(4), 0.0
    for name, w in weights.items():
        residual = lost @ w.T
        left = (residual - z @ down.T @ branches[name].up(4).T).norm() / (x @ w.T).norm()
        assert branches[name].error(4) == pytest.approx(float(left), rel=1e-3)
        alone = lora_branches(moments, mean, {name: w}, 8, ridge=1e-4)[name]
        assert alone.error(4) < branches[name].error(4)
        t = z @ down.T
        best = torch.linalg.lstsq(t, residual).solution
        assert float((residual - t @ best).norm()) == pytest.approx(
            branches[name].error(4) * float((x @ w.T).norm()), rel=1e-3
        )
        total += branches[name].error(4) ** 2
    # Both layers' relative errors count: no other A of this rank has a smaller sum, one's own included.
    for name in weights:
        other = z @ lora_branches(moments, mean, {name: weights[name]}, 8, ridge=1e-4)[name].down(4).T
        sums = 0.0
        for w in weights.values():
            residual = lost @ w.T
            left = residual - other @ torch.linalg.lstsq(other, residual).solution
            sums += float(left.norm() / (x @ w.T).norm()) ** 2
        assert total < sums


def test_layers_of_one_input_share_statistics_and_embedders_are_left_out() -> None:
    profile = calibrate(make_workload(), rank=8, quiet=True)
    assert set(profile.layers) == {
        f"blocks.{i}.{name}" for i in range(2) for name in ("to_q", "to_k", "to_out")
    }
    layers = profile.layers
    for kind in ("shift", "down"):
        q, k, out = (getattr(layers[f"blocks.0.{name}"].branch, kind) for name in ("to_q", "to_k", "to_out"))
        assert q is k
        assert q is not out
    for layer in layers.values():
        assert layer.error_after < layer.error_before
        assert layer.tokens == 24


def same(first: object, second: object) -> bool:
    pairs = zip(first.layers.values(), second.layers.values(), strict=True)
    return all(
        torch.equal(a.branch.down, b.branch.down)
        and torch.equal(a.branch.up, b.branch.up)
        and torch.equal(a.branch.shift, b.branch.shift)
        for a, b in pairs
    )


def test_deterministic_and_resumable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lynx_compile.calibration import collect

    monkeypatch.setattr(collect, "SAVE_EVERY_S", 0.0)
    whole = calibrate(make_workload(), rank=8, quiet=True)
    assert same(whole, calibrate(make_workload(), rank=8, quiet=True))
    memory = 2 * collect.moments_bytes(64)  # two inputs a pass: two passes for four inputs
    killed = make_workload()
    runs = itertools.count()

    def dies(batch: int) -> torch.Tensor:
        if next(runs) == 10:  # in the second pass
            raise KeyboardInterrupt
        return Inputs.run(killed, batch)

    killed.run = dies
    with pytest.raises(KeyboardInterrupt):
        calibrate(killed, rank=8, quiet=True, memory=memory, state=tmp_path)
    resumed = make_workload()
    counted = []
    resumed.run = lambda batch: counted.append(batch) or Inputs.run(make_workload_like(resumed), batch)
    assert same(whole, calibrate(resumed, rank=8, quiet=True, memory=memory, state=tmp_path))
    assert len(counted) < 6


@pytest.mark.parametrize(("rows", "most"), [(100, 100), (101, 100), (300, 100), (4096, 1000), (8192, 512)])
def test_rows_that_count_are_spread_over_the_columns_of_a_picture(rows: int, most: int) -> None:
    kept = spread_over(torch.arange(rows)[:, None], most)[:, 0]
    assert most // 3 < len(kept) <= most
    assert kept.diff().unique().numel() == 1
    assert (kept % 16).unique().numel() == 16  # a picture of 16 columns


def test_calls_of_many_tokens_are_sampled() -> None:
    moments = []
    for most in (16, 48):
        collector = Collector(make_workload(), quiet=True, most_rows=most)
        seen: dict[str, Moments] = {}
        collector.run(lambda names, found, _, seen=seen: seen.update({names[0]: found}) or {})  # type: ignore[misc,func-returns-value]
        moments.append(seen)
    for few, every in zip(moments[0].values(), moments[1].values(), strict=True):
        assert (few.rows, every.rows) == (6 * 16, 6 * 48)
        near = few.gram / few.rows - every.gram / every.rows
        assert near.norm() < 0.5 * (every.gram / every.rows).norm()


def test_branches_of_their_own_fit_better() -> None:
    shared, own = (
        calibrate(make_workload(), rank=8, deflate=False, shared=s, quiet=True).layers for s in (True, False)
    )
    pair = [f"blocks.0.{name}" for name in ("to_q", "to_k")]
    assert torch.equal(shared[pair[0]].branch.down, shared[pair[1]].branch.down)
    assert not torch.equal(own[pair[0]].branch.down, own[pair[1]].branch.down)
    assert sum(own[name].error_after for name in pair) < sum(shared[name].error_after for name in pair)
    assert own[pair[1]].branch.shift is own[pair[0]].branch.shift


def test_state_of_another_rank_is_not_used(tmp_path: Path) -> None:
    calibrate(make_workload(), rank=8, quiet=True, state=tmp_path)
    profile = calibrate(make_workload(), rank=16, quiet=True, state=tmp_path)
    assert {layer.branch.rank for layer in profile.layers.values()} == {16}


def make_workload_like(workload: Inputs) -> Inputs:
    return Inputs(workload.model, workload.inputs)


def test_one_call_finds_the_inputs_where_no_mean_is_wanted() -> None:
    workload = make_workload()
    calls = []
    handle = workload.model.register_forward_hook(lambda *_: calls.append(1))
    options = {"shift": False, "deflate": False, "quiet": True}
    found = calibrate(workload, rank=8, **options)
    assert len(calls) == 1 + len(workload)
    handle.remove()
    again = calibrate(workload, rank=8, memory=2 * moments_bytes(64), **options)  # in several passes
    assert found.layers.keys() == again.layers.keys() == calibrate(workload, rank=8, quiet=True).layers.keys()
    for name, layer in found.layers.items():
        assert layer.branch.shift is None
        assert layer.tokens == again.layers[name].tokens == 24
        torch.testing.assert_close(layer.branch.down, again.layers[name].branch.down)


def test_memory_budget_must_hold_one_input() -> None:
    with pytest.raises(ValueError, match="raise it"):
        calibrate(make_workload(), rank=8, quiet=True, memory=1000)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": -1},
        {"rank": 257},
        {"rank": 2.5},
        {"total_rank": -3},
        {"steps": 0},
    ],
)
def test_counts_are_checked_before_anything_runs(options: dict[str, Any]) -> None:
    workload = make_workload()
    workload.inputs = []  # running it would find no layer
    with pytest.raises(ValueError, match=next(iter(options))):
        calibrate(workload, quiet=True, **options)


def test_two_processes_give_the_same_profile(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "from tests.test_calibration import make_workload\n"
        "from lynx_compile.calibration import calibrate\n"
        "from lynx_compile.profile import save_profile\n"
        "torch.set_num_threads(1)\n"
        "dist.init_process_group('gloo')\n"
        "profile = calibrate(make_workload(8), rank=8, quiet=True)\n"
        f"save_profile(profile, '{tmp_path}/' + str(dist.get_rank()), torch.float32)\n"
        "dist.destroy_process_group()\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    root = Path(__file__).parent.parent
    subprocess.run(command, check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, timeout=120)
    from lynx_compile.profile import load_profile

    alone = calibrate(make_workload(8), rank=8, quiet=True)
    for rank in range(2):
        loaded = load_profile(tmp_path / str(rank))
        for name, layer in alone.layers.items():
            other = loaded.layers[name]
            assert other.error_after == pytest.approx(layer.error_after, rel=1e-4)
            product, expected = (b.down.T @ b.down for b in (other.branch, layer.branch))
            assert (product - expected).norm() < 1e-3 * expected.norm()


def test_ranks_go_where_they_take_off_most() -> None:
    x, weight, mean = spread_inputs()
    easy, hard = Moments.zeros(64, x.device), Moments.zeros(64, x.device)
    easy.update(x, mean, "norm")
    hard.update(x, mean, "norm")
    branches = {
        "easy": lora_branches(easy, mean, {"easy": weight}, 32),
        "hard": lora_branches(hard, mean, {"hard": weight}, 32),
    }
    assert allocate_ranks(branches, {"hard": 100.0}, 32, multiple=8) == {"easy": 0, "hard": 32}
    assert sum(allocate_ranks(branches, {}, 48, multiple=8).values()) == 48
    two = {"pair": lora_branches(hard, mean, {"a": weight[:24], "b": weight[24:]}, 32)}
    ranks = allocate_ranks(branches | two, {}, 50, multiple=8)
    assert sum(ranks[name] * count for name, count in (("easy", 1), ("hard", 1), ("pair", 2))) == 48


def test_training_keeps_what_is_shared() -> None:
    workload = make_workload()
    layers = calibrate(workload, rank=8, deflate=False, quiet=True).layers
    names = ["blocks.0.to_q", "blocks.0.to_k", "blocks.0.to_out"]
    start = {name: layers[name].branch for name in names}
    q, k, out = distill_layers(
        workload.model, record(workload, quiet=True), start, steps=2, quiet=True
    ).values()
    assert q.down is k.down
    assert q.down is not out.down
    assert not torch.equal(q.down, start[names[0]].down)
    with pytest.raises(ValueError, match=r"'blocks\.0\.to_k' deflates"):
        distill_layers(workload.model, [], calibrate(workload, rank=8, quiet=True).sparse_layers())


def test_emulation_restores_the_model() -> None:
    workload = make_workload()
    before = workload.run(0)

    def fails_inside() -> None:
        with emulate(workload.model, {"blocks.0.to_q": Branch()}):
            assert not torch.equal(workload.run(0), before)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails_inside()
    assert torch.equal(workload.run(0), before)
    with pytest.raises(KeyError, match="no linear layer"):
        emulate(workload.model, {"blocks.7.to_q": Branch()}).__enter__()


@pytest.mark.parametrize(
    ("tokens", "dense", "others"),
    [(3, slice(0, 3), slice(3, 10)), (-3, slice(7, 10), slice(0, 7)), (-12, slice(0, 10), slice(0, 0))],
)
def test_tokens_of_one_end_stay_dense(tokens: int, dense: slice, others: slice) -> None:
    layer, x = nn.Linear(64, 64), torch.randn(2, 10, 64)
    y = Branch(dense_tokens=tokens)(layer, x)
    assert y.shape == (2, 10, 64)
    torch.testing.assert_close(y[:, dense], layer(x)[:, dense])
    torch.testing.assert_close(y[:, others], Branch()(layer, x[:, others]))
    assert torch.equal(rows_of(x, tokens), x[:, others].reshape(-1, 64))


def test_sensitivity_by_layer_class_and_block() -> None:
    workload = make_workload(2)
    layers = {f"blocks.{i}.{name}": Branch() for i in range(2) for name in ("to_q", "to_k", "to_out")}
    study = Sensitivity(workload, quiet=True)
    by_layer, by_block = study.measure(layers, "layer"), study.measure(layers, "block")
    assert set(by_block) == {"blocks.0", "blocks.1"}
    assert set(study.measure(layers, "class", sample=False)) == {"q", "k", "out"}
    # One call is the whole run here, so the velocity is the sample.
    for effect in by_layer.values():
        assert effect.velocity == pytest.approx(effect.sample, rel=1e-4)
    assert study.sample(layers, lambda call: False) == 0.0
    assert study.estimate_s(layers, "layer") > 0
    assert class_of("transformer_blocks.0.attn.add_k_proj") == "text"
    assert class_of("single_transformer_blocks.3.proj_out") == "down"
    assert block_of("single_transformer_blocks.3.attn.to_q") == "single_transformer_blocks.3"


def test_training_recipes_lower_their_losses() -> None:
    workload = make_workload(8)
    model = workload.model
    calls = record(workload, quiet=True)
    assert len(split_calls(calls, 1)) == 16
    names = ["blocks.0.to_q", "blocks.1.to_out"]
    start = random_branches(model, {name: Branch() for name in names}, 16)
    seen: list[int] = []
    trained = distill_layers(
        model, calls, start, steps=60, quiet=True, report=lambda s, _: seen.append(s), report_every=30
    )
    assert seen == [30, 60]
    closed = calibrate(workload, rank=16, shift=False, deflate=False, quiet=True).layers
    study = Sensitivity(workload, quiet=True)
    for name in names:
        bare, after = (study.velocity({name: branch}).velocity for branch in (Branch(), trained[name]))
        best = study.velocity({name: closed[name].branch}).velocity
        assert after < bare
        assert best < after * 1.02
    assert all(not p.requires_grad for p in model.parameters())
