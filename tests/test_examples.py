"""The examples' own code paths, on small geometry and without a network."""

import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import typer

import lynx_compile
from lynx_compile import models

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {
    "flux": {"num_attention_heads": 2, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24),
             "joint_attention_dim": 64, "pooled_projection_dim": 64},
    "qwen_image": {"num_attention_heads": 2, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24),
                   "joint_attention_dim": 64},
    "z_image": {"dim": 128, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [16, 24, 24], "cap_feat_dim": 64,
                "n_refiner_layers": 1},
}  # fmt: skip


@pytest.fixture(params=sorted(SMALL))
def example(request, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    spec = importlib.util.spec_from_file_location(
        f"example_{request.param}", EXAMPLES / f"{request.param}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    name = request.param.replace("_", "-")
    known = models.KNOWN[name]
    small = replace(known, config={**known.config, **SMALL[request.param]})
    monkeypatch.setitem(models.KNOWN, name, small)
    assert known.repository == module.MODEL
    torch._dynamo.reset()
    lynx_compile.clear_report()
    return module


def test_random_weights_denoise_by_blocks(example, monkeypatch, capsys):
    emulated = partial(lynx_compile.compile_blocks, emulate=True, rest="eager", strict=True)
    monkeypatch.setattr(lynx_compile, "compile_blocks", emulated, raising=False)
    example.main(random_weights=True, size=64, steps=2, blocks=1)
    said = capsys.readouterr().out
    assert "random weights, 64×64" in said
    assert "% of the linear FLOPs" in said
    assert lynx_compile.report().sparse_share > 0.05


def test_without_the_weights_the_way_on_is_said(example, monkeypatch, capsys):
    import diffusers

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", offline)
    with pytest.raises(typer.Exit):
        example.main()
    said = capsys.readouterr().out
    assert "could not be fetched (OSError)" in said
    assert "--random-weights" in said
