"""Dense first and last steps in the FLUX pipeline of diffusers: two compiled variants, one set of weights."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import lynx_compile
from lynx_compile.calibration import emulate
from lynx_compile.profile import Branch, Layer, Profile, StepSwitch, apply_profile, fingerprint
from lynx_compile.profile.fingerprint import linear_layers

diffusers = pytest.importorskip("diffusers")

DENSE_STEPS, DENSE_LAST_STEPS, STEPS = 2, 1, 4
OPTIONS = {"emulate": True, "strict": True, "rest": "eager"}
SIZE = {"height": 64, "width": 64}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    lynx_compile.clear_report()
    yield
    torch._dynamo.reset()


def make_pipe() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,  # a second one reads slices of the first: other strides, one more graph
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    )
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(scheduler=scheduler, transformer=transformer.eval(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, steps: int = STEPS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, 8, 64, generator=generator)
    pooled = torch.randn(1, 32, generator=generator)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        return pipe(
            prompt_embeds=text,
            pooled_prompt_embeds=pooled,
            num_inference_steps=steps,
            generator=noise,
            output_type="latent",
            **SIZE,
        ).images


def make_profile(model: nn.Module) -> Profile:
    branches = {
        name: Branch()
        for name, module in linear_layers(model).items()
        if "transformer_blocks" in name and "norm" not in name and module.in_features % 64 == 0
    }
    layers = {
        name: Layer(tuple(linear_layers(model)[name].weight.shape), True, "", branch)
        for name, branch in branches.items()
    }
    ends = {"dense_steps": DENSE_STEPS, "dense_last_steps": DENSE_LAST_STEPS}
    return Profile(fingerprint(model), layers, **ends, steps=STEPS)


def emulated(pipe: Any, profile: Profile, steps: int) -> torch.Tensor:
    """The picture by eager emulation, the switch set by counting calls."""
    switch, calls, scale = StepSwitch(), [0], steps // STEPS

    def before(*_: object) -> None:
        switch.dense = not DENSE_STEPS * scale <= calls[0] < steps - DENSE_LAST_STEPS * scale
        calls[0] += 1

    handle = pipe.transformer.register_forward_pre_hook(before)
    with emulate(pipe.transformer, profile.sparse_layers(), switch):
        picture = run(pipe, steps)
    handle.remove()
    return picture


def whole(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="rt_lynx", options=OPTIONS, fullgraph=True)


def blocks(pipe: Any) -> None:
    lynx_compile.compile_blocks(pipe.transformer, fullgraph=True, **OPTIONS)


def repeated_blocks(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(backend="rt_lynx", options=OPTIONS, fullgraph=True)


@pytest.mark.parametrize(("compiled", "graphs"), [(whole, 2), (blocks, 4), (repeated_blocks, 4)])
def test_two_variants_and_no_recompile(compiled: Callable[[Any], None], graphs: int) -> None:
    pipe = make_pipe()
    profile = make_profile(pipe.transformer)
    reference = {steps: emulated(pipe, profile, steps) for steps in (STEPS, 2 * STEPS)}
    dense = run(pipe)
    parameters = {name: p.data_ptr() for name, p in pipe.transformer.named_parameters()}
    apply_profile(pipe, profile)
    compiled(pipe)
    for _ in range(2):
        torch.testing.assert_close(run(pipe), reference[STEPS], rtol=1e-3, atol=1e-3)
        assert len(lynx_compile.report().graphs) == graphs, lynx_compile.report()
    torch.testing.assert_close(run(pipe, 2 * STEPS), reference[2 * STEPS], rtol=1e-3, atol=1e-3)
    assert len(lynx_compile.report().graphs) == graphs  # twice the steps, twice the dense ones, the same code
    assert not torch.allclose(run(pipe), dense, rtol=1e-3, atol=1e-3)
    decisions = [{row.decision for row in graph.rows} for graph in lynx_compile.report().graphs]
    assert sum("sparse" in found for found in decisions) == graphs / 2
    model = getattr(pipe.transformer, "_orig_mod", pipe.transformer)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == parameters


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copied_transformer_follows_its_own_schedule(copied: Callable[[nn.Module], nn.Module]) -> None:
    pipe, other = make_pipe(), make_pipe()
    profile = make_profile(pipe.transformer)
    reference = emulated(pipe, profile, STEPS)
    apply_profile(pipe, profile)
    other.transformer = copied(pipe.transformer)
    pipe.scheduler.set_timesteps(STEPS, mu=1.0)
    pipe.scheduler._step_index = STEPS  # where a copy must not look
    blocks(other)
    for _ in range(2):
        torch.testing.assert_close(run(other), reference, rtol=1e-3, atol=1e-3)


def test_another_pipeline_of_the_same_transformer_has_its_own_schedule(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipe, other = make_pipe(), make_pipe()
    other.transformer = pipe.transformer
    apply_profile(pipe, make_profile(pipe.transformer))
    switch = pipe.transformer.transformer_blocks[0].ff.net[2].lynx_switch
    seen: list[bool] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(switch.dense))
    ends = [True] * DENSE_STEPS + [False] + [True] * DENSE_LAST_STEPS
    for running in (other, pipe, other, pipe):  # before the profile's own has run, and after
        seen.clear()
        run(running)
        assert seen == ends
    said = [record.getMessage() for record in caplog.records if "apply the profile" in record.getMessage()]
    assert len(said) == 1
