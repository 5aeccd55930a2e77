"""Whole transformers through the real kernels: the emulated picture, within rounding."""

import pytest
import torch

import lynx_compile
from lynx_compile.bench.backends import attach_random_branches

pytest.importorskip("diffusers")

from tests import zoo

OPTIONS = {"rest": "eager", "strict": True, "min_tokens": 0, "only": ["*_blocks.*", "layers.*"]}


def output(model, inputs):
    with torch.no_grad():
        found = model(**inputs, return_dict=False)[0]
    torch.cuda.synchronize()
    return torch.cat([leaf.float().flatten() for leaf in (found if isinstance(found, list) else [found])])


def on_device(value):
    if isinstance(value, torch.Tensor):
        return value.cuda()
    return [on_device(item) for item in value] if isinstance(value, list) else value


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "name", ["FluxTransformer2DModel", "QwenImageTransformer2DModel", "ZImageTransformer2DModel"]
)
def test_kernels_give_the_emulated_picture(name, lora):
    model, inputs = zoo.build(name, torch.bfloat16)
    model = torch.nn.Module.cuda(model)
    inputs = {key: on_device(value) for key, value in inputs.items()}
    if lora:
        attach_random_branches(model, 16, inputs)
    dense = output(model, inputs)
    pictures = []
    for emulate in (False, True):
        torch._dynamo.reset()
        lynx_compile.clear_report()
        lynx_compile.compile_blocks(model, emulate=emulate, **OPTIONS)
        pictures.append(output(model, inputs))
        rows = lynx_compile.report().rows
        assert sum(row.decision == "sparse" for row in rows) >= 5
        assert not lynx_compile.report().notes
    kernels, emulated = pictures
    moved = (emulated - dense).norm() / dense.norm()
    apart = (kernels - emulated).norm() / emulated.norm()
    assert apart < max(0.3 * moved, 2e-2), (
        f"kernels are {apart:.3f} from the emulation, which moved {moved:.3f}"
    )
