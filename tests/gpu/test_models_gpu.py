"""Whole transformers through the real kernels: the emulated picture, within rounding."""

from fnmatch import fnmatchcase

import pytest
import torch

import lynx_compile
from lynx_compile import attach
from lynx_compile.bench.backends import attach_random_branches
from lynx_compile.calibration.text_rows import text_rows_of

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


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "ZImageTransformer2DModel"])
def test_text_rows_stay_dense(name):
    """In front of the image and behind it."""
    model, inputs = zoo.build(name, torch.bfloat16)
    model = torch.nn.Module.cuda(model)
    inputs = {key: on_device(value) for key, value in inputs.items()}
    glob, tokens = text_rows_of(model, (), inputs)
    dense = output(model, inputs)
    for path, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear:
            sparse = fnmatchcase(path, glob) and "adaLN" not in path and "norm" not in path
            attach(module, decision="sparse" if sparse else "dense", dense_tokens=tokens if sparse else 0)
    pictures = []
    for emulate in (False, True):
        torch._dynamo.reset()
        lynx_compile.compile_blocks(model, emulate=emulate, rest="eager", strict=True, min_tokens=0)
        pictures.append(output(model, inputs))
    kernels, emulated = pictures
    moved = (emulated - dense).norm() / dense.norm()
    apart = (kernels - emulated).norm() / emulated.norm()
    assert moved > 1e-3
    assert apart < max(0.3 * moved, 2e-2), (
        f"kernels are {apart:.3f} from the emulation, which moved {moved:.3f}"
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["FluxTransformer2DModel", "QwenImageTransformer2DModel", "ZImageTransformer2DModel"]
)
def test_blocks_from_disk_give_the_same_picture(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LYNX_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    model, inputs = zoo.build(name, torch.bfloat16)
    model = torch.nn.Module.cuda(model)
    inputs = {key: on_device(value) for key, value in inputs.items()}
    pictures, graphs = [], []
    for precompile in (False, True, True):  # compiled as usual, onto disk, from disk
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        lynx_compile.compile_blocks(
            model, fullgraph=True, precompile=precompile, strict=True, min_tokens=0, only=OPTIONS["only"]
        )
        pictures.append(output(model, inputs))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert torch.equal(pictures[1], pictures[0])
    assert torch.equal(pictures[2], pictures[0])
    assert graphs[0] > 0
    assert graphs[2] == 0
