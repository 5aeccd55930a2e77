"""Two transformers in one pipeline, each for its part of the steps (Wan 2.2): both are meant or one named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import lynx_compile
from lynx_compile.calibration import Pipeline, calibrate, emulate
from lynx_compile.calibration.choose import apply_choice, chooser_for
from lynx_compile.calibration.costs import costs_of
from lynx_compile.calibration.sensitivity import Sensitivity
from lynx_compile.cli import calibrate as command
from lynx_compile.demo.generation import run as run_demo
from lynx_compile.evaluation.ground import branches_of
from lynx_compile.layers import LynxLinear
from lynx_compile.profile import (
    Branch,
    Layer,
    Profile,
    ProfileError,
    StepSwitch,
    apply_profile,
    fingerprint,
    load_profile,
    merge,
    remove_profile,
)
from lynx_compile.profile.fingerprint import linear_layers

diffusers = pytest.importorskip("diffusers")

COMPONENTS = ("transformer", "transformer_2")
STEPS, BOUNDARY = 6, 2  # the second takes over at step 2
OPTIONS = {"emulate": True, "strict": True, "rest": "eager", "min_tokens": 0}


class Wan(diffusers.WanPipeline):
    """Without a text encoder."""

    def encode_prompt(self, prompt: Any, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return tuple(
            torch.stack(
                [torch.randn(8, 64, generator=torch.Generator().manual_seed(s + len(p))) for p in prompts]
            )
            for s in (0, 100)
        )


def transformer(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        text_dim=64,
        freq_dim=64,
        ffn_dim=128,
        num_layers=1,
        rope_max_seq_len=32,
    )
    return model.eval().requires_grad_(False)


@pytest.fixture
def pipe() -> Any:
    torch._dynamo.reset()
    lynx_compile.clear_report()
    vae = diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipe = Wan(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer(1),
        transformer_2=transformer(2),
        boundary_ratio=0.875,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


SIZE = {"height": 32, "width": 32, "num_frames": 5}
SMALL = {**SIZE, "guidance_scale": 3.0}


@torch.no_grad()
def run(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return pipe(
        "a lynx", num_inference_steps=STEPS, generator=generator, output_type="latent", **SMALL
    ).frames


def make_profile(model: nn.Module, **provenance: str) -> Profile:
    """Every layer of the blocks sparse but in the first and the last step."""
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in linear_layers(model).items()
        if name.startswith("blocks.") and "attn2.to_k" not in name and "attn2.to_v" not in name
    }
    layers = {name: Layer(shape, True, "", Branch()) for name, shape in shapes.items()}
    return Profile(
        fingerprint(model), layers, dense_steps=1, dense_last_steps=1, steps=STEPS, provenance=provenance
    )


def emulated(pipe: Any, profiles: dict[str, Profile]) -> torch.Tensor:
    """The picture by eager emulation; the step is told by counting calls, two of each step."""
    switch, calls = StepSwitch(), [0]

    def before(*_: object) -> None:
        switch.dense = calls[0] // 2 in (0, STEPS - 1)
        calls[0] += 1

    models = [getattr(pipe, name) for name in COMPONENTS]
    handles = [model.register_forward_pre_hook(before) for model in models]
    layers = [profiles[name].sparse_layers() for name in COMPONENTS]
    with emulate(models[0], layers[0], switch), emulate(models[1], layers[1], switch):
        picture = run(pipe)
    for handle in handles:
        handle.remove()
    assert calls[0] == 2 * STEPS
    return picture


def test_a_profile_for_each_and_steps_of_the_whole_run(pipe: Any) -> None:
    profiles = {name: make_profile(getattr(pipe, name), component=name) for name in COMPONENTS}
    dense, expected = run(pipe), emulated(pipe, profiles)
    assert (expected - dense).abs().max() > 0.05
    dense_calls: list[tuple[str, int, bool]] = []
    for name in COMPONENTS:
        apply_profile(pipe, profiles[name])  # which it is for stands in the profile
        model = getattr(pipe, name)
        switch = linear_layers(model)["blocks.0.ffn.net.2"].lynx_switch

        def note(*_: object, name: str = name, switch: StepSwitch = switch) -> None:
            dense_calls.append((name, pipe.scheduler.step_index or 0, switch.dense))

        model.register_forward_pre_hook(note)
    assert lynx_compile.compile_blocks(pipe, fullgraph=True, **OPTIONS) == 1
    torch.testing.assert_close(run(pipe), expected, rtol=1e-4, atol=1e-4)
    steps = [(COMPONENTS[step >= BOUNDARY], step, step in (0, STEPS - 1)) for step in range(STEPS)]
    assert dense_calls == [call for call in steps for _ in range(2)]
    decisions = {row.decision for row in lynx_compile.report().rows}
    assert decisions == {"sparse", "dense"}

    remove_profile(pipe)
    for name in COMPONENTS:
        assert not any(isinstance(module, LynxLinear) for module in getattr(pipe, name).modules())


def test_which_one_has_to_be_said(pipe: Any) -> None:
    second = make_profile(pipe.transformer_2)
    with pytest.raises(ValueError, match=r"Wan has transformer and transformer_2, .*component='transformer'"):
        apply_profile(pipe, second)
    with pytest.raises(
        ValueError, match="no transformer 'unet'; component may be transformer and transformer_2"
    ):
        apply_profile(pipe, second, component="unet")
    with pytest.raises(ValueError, match=r"component='transformer' .* not of a WanTransformer3DModel"):
        apply_profile(pipe.transformer, second, component="transformer")
    with pytest.raises(ProfileError, match="other weights"):
        apply_profile(pipe, second, component="transformer")
    assert not any(isinstance(module, LynxLinear) for module in pipe.transformer_2.modules())
    apply_profile(pipe, second, component="transformer_2")
    assert any(isinstance(module, LynxLinear) for module in pipe.transformer_2.modules())


def test_a_profile_that_knows_its_component(pipe: Any) -> None:
    second = make_profile(pipe.transformer_2, component="transformer_2")
    with pytest.raises(ProfileError, match=r"provenance.component.*is 'transformer_2', not 'transformer'"):
        apply_profile(pipe, second, component="transformer", check_weights=False)
    with pytest.raises(
        ValueError, match="whole run, of which 'transformer_2' makes a part: apply it to the pipeline"
    ):
        apply_profile(pipe.transformer_2, second)
    assert merge(second, second).provenance["component"] == "transformer_2"
    second.dense_steps = second.dense_last_steps = 0
    apply_profile(pipe.transformer_2, second)


def test_each_is_calibrated_in_its_steps(pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"component='transformer' \(--component\)"):
        Pipeline(pipe, ["a"], steps=STEPS)
    found = {}
    for name in COMPONENTS:
        workload = Pipeline(pipe, ["a", "bc"], steps=STEPS, call=SMALL, component=name)
        found[name] = calibrate(workload, rank=8, quiet=True)
        assert found[name].model.weights == fingerprint(getattr(pipe, name)).weights
        assert found[name].provenance["component"] == name
    rows = [found[name].provenance["tokens"] for name in COMPONENTS]
    assert rows[1] == rows[0] * (STEPS - BOUNDARY) // BOUNDARY


@pytest.mark.parametrize(
    ("name", "span"), [("transformer", (0, BOUNDARY)), ("transformer_2", (BOUNDARY, STEPS))]
)
def test_steps_are_chosen_of_those_in_which_it_runs(pipe: Any, name: str, span: tuple[int, int]) -> None:
    workload = Pipeline(pipe, ["a lynx"], steps=STEPS, seed=1, call=SMALL, component=name)
    profile = calibrate(workload, rank=0, shift=False, steps=STEPS, quiet=True)
    study = Sensitivity(workload, quiet=True)
    assert study.span(STEPS) == span
    inside = study.calls_between(3, 5, STEPS)
    assert [inside(call) for call in range(2 * (span[1] - span[0]))] == [
        step in (3, 4) for step in range(*span) for _ in range(2)
    ]
    chooser = chooser_for(study, profile, branches_of(profile, workload.model), "flops", dense_last_steps=1)
    last = span[1] == STEPS
    assert chooser.problem.step_factors.keys() == ({0, 3, 4} if last else {0, 1})
    everything = chooser.problem.choice(np.ones(len(chooser.problem.ways), dtype=bool), 0)
    costs = costs_of(profile, workload.model, "flops", {})
    assert everything.speed == pytest.approx(costs.fastest(3 / 4 if last else 1.0))
    choice = chooser.measure(chooser.problem.choice(chooser.problem.members(everything), 3 if last else 1))
    apply_choice(profile, choice)
    dense = run(pipe)
    apply_profile(pipe, profile)
    lynx_compile.compile_blocks(getattr(pipe, name), **OPTIONS)
    moved = (run(pipe) - dense).norm() / dense.norm()
    assert choice.measured is not None
    assert choice.measured > 0.002
    assert float(moved) == pytest.approx(choice.measured, rel=0.02)


def test_the_demo_compares_variants_of_one(pipe: Any) -> None:
    with pytest.raises(ValueError, match="Wan has transformer and transformer_2"):
        run_demo(pipe, ["a"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Wan has transformer and transformer_2, each with weights of its own; say which"),
        (("--component", "transformer_3"), "no transformer 'transformer_3'; component may be"),
        (
            ("--component", "transformer_2", "--speed", "1.2", "--costs", "flops", "--dense-last", "4"),
            "4 dense last steps of 6 leave none of those sparse in which the model runs, 3 to 6; take fewer",
        ),
        (
            ("--component", "transformer_2", "--speed", "1.6", "--costs", "flops"),
            "--speed 1.6 is out of reach: with all that may be sparse it is 1.",
        ),
        (("--component", "transformer_2"), None),
    ],
)
def test_on_the_command_line(
    pipe: Any,
    arguments: tuple[str, ...],
    message: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "_load", lambda model, device: pipe)
    monkeypatch.setattr(
        Wan,
        "__call__",
        lambda self, *args, **kwargs: diffusers.WanPipeline.__call__(self, *args, **kwargs, **SIZE),
    )
    (tmp_path / "prompts.txt").write_text("a\nbc\nd\n")
    common = ["wan", "--out", str(tmp_path / "profile"), "--prompts", str(tmp_path / "prompts.txt")]
    counts = ["--count", "2", "--held-out", "1", "--steps", str(STEPS), "--rank", "16", "--device", "cpu"]
    result = CliRunner().invoke(command.app, [*common, *counts, *arguments])
    said = re.sub(r"[\s│]+", " ", result.output)
    if message is None:
        assert result.exit_code == 0, said
        profile = load_profile(tmp_path / "profile")
        assert (profile.provenance["component"], profile.dense_last_steps) == ("transformer_2", 1)
        apply_profile(pipe, profile)
    else:
        assert result.exit_code == 2
        assert message in said
