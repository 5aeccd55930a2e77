"""csrc/sparsify.cu on the CPU, launched by the real launcher: no GPU needed (see `emulation`)."""

import shutil

import pytest
import torch

from lynx_compile.runtime import layout, semantics, sparsify_kernel
from lynx_compile.runtime.sparsify_geometry import Geometry

from .emulation import Emulator, install
from .stand_in import forget

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def device(emulator, monkeypatch):
    install(monkeypatch, emulator)
    yield emulator
    forget()


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape).to(dtype)


def modulation(samples, k, dtype=torch.bfloat16):
    return normal(samples, 1, 2 * k, dtype=dtype).chunk(2, -1)


K, LONG = 448, 1280  # in LONG rows the rings of shared memory go round
CASES = {
    "plain": ("identity", lambda: [normal(70, K)], None, 0, {}),
    "clusters of two, fp16": (
        "identity", lambda: [normal(70, LONG, dtype=torch.float16)], Geometry(4, 3, 3, 1, 2), 64, {}
    ),
    "blocks with little to do": ("gelu_tanh", lambda: [normal(40, K)], Geometry(2, 5, 3, 1, 3), 48, {}),
    "two launches": ("identity", lambda: [normal(33, K)], None, 160, {}),
    "cat": (
        "cat_gelu_tanh", lambda: [normal(70, 192), normal(70, LONG - 192)], Geometry(5, 3, 3, 1, 2), 64, {}
    ),
    "two inputs": ("silu_mul", lambda: list(normal(70, 2 * K).chunk(2, -1)), Geometry(4, 2, 3, 1, 2), 64, {}),
    "samples within a warp": (
        "layer_norm", lambda: [normal(60, K), normal(K), torch.randn(K), *modulation(3, K)],
        Geometry(4, 2, 2, 1, 2), 64, {"shift": lambda: torch.randn(2, K)},
    ),
    "rows too long for shared memory": (
        "rms_norm", lambda: [normal(16, 8192), None, None, *modulation(1, 8192)],
        Geometry(1, 4, 3, 2, 1), 0, {}
    ),
    "score": (
        "identity", lambda: [normal(40, K)], Geometry(2, 5, 2, 1, 2), 16,
        {"shift": lambda: normal(2, K), "score": lambda: torch.rand(K)},
    ),
    "deflated": ("identity", lambda: [normal(70, LONG)], Geometry(4, 2, 3, 1, 2), 64, {"deflated": 64}),
    "deflated in part, a norm": (
        "layer_norm",
        lambda: [normal(60, K, dtype=torch.float16), None, None, *modulation(3, K, torch.float16)],
        Geometry(2, 3, 2, 1, 2), 48, {"deflated": 21, "shift": lambda: torch.randn(2, K)},
    ),
    "deflated, many directions": (
        "cat_gelu_tanh", lambda: [normal(33, 192), normal(33, K - 192)], None, 160,
        {"deflated": 150, "score": lambda: torch.rand(K)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("code", ["warpgroup", "hopper", "portable"])
def test_as_the_definition(case, code, device, monkeypatch):
    """With a warpgroup that multiplies, with warps that do it themselves, and as older GPUs."""
    producer, inputs, geometry, rank, options = CASES[case]
    portable = code == "portable"
    if portable and case not in ("cat", "samples within a warp", "score", "deflated in part, a norm"):
        pytest.skip("the code for older GPUs differs in clusters and comparisons")
    if code == "warpgroup" and rank != 64:
        pytest.skip("a warpgroup multiplies by 64, 96 or 128 rows")
    if geometry is not None:
        helpers = 4 if code == "warpgroup" else int(rank > 0)
        chosen = geometry._replace(helpers=helpers, stages=max(geometry.stages, 3 if helpers == 4 else 2))
        if portable:
            chosen = chosen._replace(splits=1)
        deflating = chosen._replace(helpers=1)
        monkeypatch.setattr(sparsify_kernel, "choose", lambda v, *_: deflating if v.deflate else chosen)
    if portable:
        defines = sparsify_kernel.defines
        monkeypatch.setattr(sparsify_kernel, "defines", lambda *a: {**defines(*a), "PORTABLE": 1})
    torch.manual_seed(1)
    inputs = inputs()
    dtype = inputs[0].dtype
    options = {name: make() if callable(make) else make for name, make in options.items()}
    exact = semantics.produce(producer, [None if t is None else t.double() for t in inputs], 1e-6, 1.0)
    x = exact.to(dtype)
    size = x.shape[1] ** -0.5 if "deflated" in options else 1.0
    down = normal(rank, x.shape[1], dtype=dtype) * size if rank else None
    expected = semantics.sparsify(x, lora_down=down, **options)
    expected_values, expected_metadata = layout.pack(expected.pruned, expected.keep)
    for device.seed, device.late in ((1, False), (2, True), (3, True)):
        values, metadata, scale, t = sparsify_kernel.sparsify(
            producer, inputs, eps=1e-6, mult_offset=1.0, lora_down=down, **options
        )
        if producer == "identity" and "deflated" not in options:
            assert torch.equal(values.view(torch.int16), expected_values.view(torch.int16))
            assert torch.equal(metadata, expected_metadata)
        else:  # ties of rounding may fall the other way
            assert (metadata != expected_metadata).float().mean() < 0.01
            assert (values != expected_values).float().mean() < 0.01
        torch.testing.assert_close(scale, expected.scale, rtol=1e-3, atol=0)
        torch.testing.assert_close(t, expected.t, rtol=2**-6, atol=0.05)
    if geometry is not None and not portable:
        assert device.launches[-1][0].cluster == geometry.splits
