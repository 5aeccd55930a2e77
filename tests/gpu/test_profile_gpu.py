"""A calibrated profile on the kernels: whole, by blocks and under a user's adapter, the emulated picture."""

from dataclasses import replace

import pytest
import torch

import lynx_compile
from lynx_compile.calibration import Inputs, calibrate
from lynx_compile.profile import Branch, Profile, apply_profile, load_profile, save_profile

pytest.importorskip("diffusers")

from tests import zoo

pytestmark = pytest.mark.gpu
TEXT = 16  # rows of a joint sequence that stay dense
OPTIONS = {"rest": "eager", "strict": True, "min_tokens": 0}


def output(model, inputs):
    with torch.no_grad():
        found = model(**inputs, return_dict=False)[0].float()
    torch.cuda.synchronize()
    return found


def chosen(model, inputs, deflate: bool) -> Profile:
    """A profile with sparse layers, layers with dense text rows and layers that stay dense."""
    batches = [{**inputs, "hidden_states": inputs["hidden_states"] * scale} for scale in (1.0, 0.8)]
    profile = calibrate(Inputs(model, batches), rank=16, deflate=deflate, quiet=True)
    for name, layer in profile.layers.items():
        layer.sparse, layer.reason = "add_" not in name and "to_out" not in name, "chosen here"
        if not layer.sparse:
            layer.branch = Branch()
        elif name.startswith("single_") and "proj" in name:
            layer.branch = replace(layer.branch, dense_tokens=TEXT)
    return profile


@pytest.mark.parametrize("adapter", [False, True], ids=["alone", "user's adapter"])
@pytest.mark.parametrize("deflate", [True, False], ids=["deflated", "lora"])
def test_a_profile_gives_the_emulated_picture(deflate, adapter, tmp_path):
    model, inputs = zoo.build("FluxTransformer2DModel", torch.bfloat16)
    model = torch.nn.Module.cuda(model)
    inputs = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }
    save_profile(chosen(model, inputs, deflate), tmp_path)
    if adapter:
        peft = pytest.importorskip("peft")
        targets = ["to_q", "to_v", "proj_mlp"]
        model.add_adapter(peft.LoraConfig(r=8, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    dense = output(model, inputs)
    apply_profile(model, load_profile(tmp_path))
    pictures = {}
    for way in ("emulated", "whole", "by blocks"):
        torch._dynamo.reset()
        lynx_compile.clear_report()
        for module in model.modules():
            module._compiled_call_impl = None
        if way == "by blocks":
            lynx_compile.compile_blocks(model, fullgraph=True, **OPTIONS)
        else:
            options = {**OPTIONS, "emulate": way == "emulated"}
            model.compile(backend="rt_lynx", fullgraph=True, options=options)
        pictures[way] = output(model, inputs)
        rows = lynx_compile.report().rows
        assert sum(row.decision == "sparse" for row in rows) >= 5
        assert not lynx_compile.report().notes
    moved = (pictures["emulated"] - dense).norm() / dense.norm()
    assert moved > 1e-3
    for way in ("whole", "by blocks"):
        apart = (pictures[way] - pictures["emulated"]).norm() / dense.norm()
        assert apart < max(0.3 * moved, 2e-2), f"{way} is {apart:.3f} from the emulation, moved {moved:.3f}"
