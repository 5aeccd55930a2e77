"""csrc/sparsify.cu on the CPU, launched by the real launcher: no GPU needed.

`emulation/` replaces the two headers that hold PTX and runs threads as fibers in random order, with
asynchronous copies that land as early and as late as they may. That tries indices, barriers, the rings of
shared memory and the order of sums; what instructions do on a chip is the matter of tests/gpu.
"""

import ctypes
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import torch
from torch._C._dynamo import guards

from lynx_compile.runtime import calls, launch, layout, semantics, sparsify_kernel
from lynx_compile.runtime.sparsify_geometry import Geometry

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

HERE = Path(__file__).parent / "emulation"
CSRC = Path(__file__).parents[1] / "csrc"
ENTRY = """
extern "C" void entry(const void* p) { lynx::sparsify(*static_cast<const lynx::SparsifyParams*>(p)); }
extern "C" void begin(int rank) { shared_begins(rank, lynx::dynamic_memory()); }
"""


def compile_library(folder, source, output, *options):
    """A library of one C++ file. Its statics stay its own, as shared memory is a block's own."""
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-w", "-fno-gnu-unique", "-Wl,-Bsymbolic"]
    command = ["g++", *flags, *options, source, "-o", output]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:4000]
    return folder / output


class Emulator:
    """Stands for the driver: compiles a kernel's variant when it is launched, and runs it."""

    def __init__(self, folder):
        self.folder, self.entries, self.seed, self.late, self.launches = folder, {}, 0, False, []
        for file in (*CSRC.glob("*.cu*"), *HERE.glob("*.*")):
            shutil.copy(file, folder)
        fibers = compile_library(folder, "fibers.cpp", "libfibers.so")
        self.library = ctypes.CDLL(str(fibers), mode=ctypes.RTLD_GLOBAL)
        with (folder / "sparsify.cu").open("a") as file:
            file.write(ENTRY)

    def blocks(self, kernel):
        """The entry of each block of a cluster, from as many copies of the library."""
        key = (*sorted(kernel.defines.items()),)
        if key not in self.entries:
            number = len(self.entries)
            defines = [f"-D{name}={value}" for name, value in kernel.defines.items()]
            built = compile_library(
                self.folder, "sparsify.cu", f"kernel{number}.so", "-xc++", "-D__CUDA_ARCH__=900", *defines
            )
            copies = [
                shutil.copy(built, self.folder / f"kernel{number}_{rank}.so")
                for rank in range(kernel.cluster)
            ]
            self.entries[key] = [ctypes.CDLL(str(copy)) for copy in copies]
        for rank, block in enumerate(self.entries[key]):
            block.begin(rank)
        return self.entries[key]

    def __call__(self):
        return self

    def cuLaunchKernelEx(self, config, handle, pointers, extra):
        kernel, size = handle
        blocks = self.blocks(kernel)
        entries = (ctypes.c_void_p * len(blocks))(
            *[ctypes.cast(b.entry, ctypes.c_void_p).value for b in blocks]
        )
        grid = config._obj.grid_x
        self.launches.append((kernel, grid))
        parameters = ctypes.create_string_buffer(ctypes.string_at(pointers[0], size), size + 64)
        stuck = self.library.emulate(
            entries, parameters, grid, kernel.threads, kernel.cluster, self.seed, int(self.late)
        )
        assert not stuck, "threads wait for ever"
        return 0

    def __getattr__(self, name):
        return lambda *arguments: 0


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("emulation"))


def poisoned(shape, strides, dtype):
    tensor = guards._empty_strided_cpu(shape, strides, dtype)
    return tensor.fill_(torch.nan if dtype.is_floating_point else 0x7FFFFFFF)


@pytest.fixture
def device(emulator, monkeypatch):
    """A GPU like an H200 whose launches the emulator runs on CPU tensors."""
    properties = types.SimpleNamespace(
        shared_memory_per_multiprocessor=233472, major=9, multi_processor_count=132
    )
    monkeypatch.setattr(launch, "_driver", emulator)
    monkeypatch.setattr(launch.Kernel, "_load", lambda self, device: (self, self._layout.size))
    monkeypatch.setattr(launch, "_make_context_current", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(calls, "_empty_strided", poisoned)
    monkeypatch.setattr(calls, "empty", poisoned)
    monkeypatch.setattr(sparsify_kernel, "DEVICE_TYPE", "cpu")
    cached = sparsify_kernel.plan, sparsify_kernel._kernel, launch.multiprocessors
    for cache in cached:
        cache.cache_clear()
    yield emulator
    for cache in cached:
        cache.cache_clear()


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
