"""Kernels on the CPU: their source, compiled by g++ against stand-ins for the headers that hold PTX.

Threads are fibers in random order, asynchronous copies land as early and as late as they may, and matrix
instructions of a warpgroup run when somebody waits for them. That tries indices, barriers, the rings of
shared memory, the order of sums and the parameters as the launcher packs them; what instructions do on a
chip, registers and speed are the matter of tests/gpu.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._C._dynamo import guards

from lynx_compile.runtime import build, gemm_sm90
from lynx_compile.runtime.launch import Kernel

from ..stand_in import pretend

HERE = Path(__file__).parent
SHARED = "extern __shared__ __align__(1024) unsigned char shared[];"
ENTRIES = {
    "sparsify.cu": ("lynx::sparsify", "lynx::SparsifyParams", "lynx::dynamic_memory()"),
    "sparse_gemm_sm90.cu": ("sparse_gemm", "Params", "ptx::shared_memory"),
}
ENTRY = """
extern "C" void entry(const void* p) {{ {0}(*static_cast<const {1}*>(p)); }}
extern "C" void begin(int rank) {{ shared_begins(rank, reinterpret_cast<char*>({2})); }}
extern "C" int size() {{ return sizeof({1}); }}
"""


def _compiled(folder: Path, source: str, output: str, *options: str) -> Path:
    """A library of one C++ file. Its statics stay its own, as shared memory is a block's own."""
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-w", "-fno-gnu-unique", "-Wl,-Bsymbolic"]
    command = ["g++", *flags, *options, source, "-o", output]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:4000]
    return folder / output


@functools.cache
def _fibers() -> ctypes.CDLL:
    """The scheduler, one for all emulators: kernels find its functions among the global symbols."""
    folder = Path(tempfile.mkdtemp(prefix="emulation"))
    for name in ("cuda.h", "fibers.cpp"):
        shutil.copy(HERE / name, folder)
    library = ctypes.CDLL(str(_compiled(folder, "fibers.cpp", "libfibers.so")), mode=ctypes.RTLD_GLOBAL)
    library.emulate.restype = ctypes.c_char_p
    shutil.rmtree(folder)
    return library


class Emulator:
    """Stands for the driver: compiles a kernel's variant into `folder` when it is launched, and runs it.

    edit: changes the source, to plant a fault. seed, late: the order of the threads, and whether copies land
    as late as they may. launches: (kernel, blocks) of each. A launch raises RuntimeError for what would hang
    or corrupt.
    """

    def __init__(self, folder: Path, edit: Callable[[str], str] = lambda source: source) -> None:
        self.folder, self.edit, self.seed, self.late = folder, edit, 0, False
        self.launches: list[tuple[Kernel, int]] = []
        self._entries: dict[Any, list[ctypes.CDLL]] = {}
        for file in build.SOURCES.glob("*.cuh"):
            shutil.copy(file, folder)
        for file in (*HERE.glob("*.cuh"), HERE / "cuda.h"):
            shutil.copy(file, folder)
        self.library = _fibers()

    def _blocks(self, kernel: Kernel) -> list[ctypes.CDLL]:
        """A library for each block of a cluster."""
        key = (kernel.source, *sorted(kernel.defines.items()))
        if key not in self._entries:
            number = len(self._entries)
            text = self.edit((build.SOURCES / kernel.source).read_text())
            text = text.replace(SHARED, "unsigned char* const shared = ptx::shared_memory;")
            (self.folder / f"kernel{number}.cu").write_text(text + ENTRY.format(*ENTRIES[kernel.source]))
            defines = [f"-D{name}={value}" for name, value in kernel.defines.items()]
            defines += [f"-DSHARED_BYTES={kernel.smem}", "-D__CUDA_ARCH__=900", "-xc++"]
            built = _compiled(self.folder, f"kernel{number}.cu", f"kernel{number}.so", *defines)
            copies = [
                shutil.copy(built, self.folder / f"kernel{number}_{r}.so") for r in range(kernel.cluster)
            ]
            self._entries[key] = [ctypes.CDLL(str(copy)) for copy in copies]
        for rank, block in enumerate(self._entries[key]):
            block.begin(rank)
        return self._entries[key]

    def __call__(self) -> Emulator:
        return self

    def cuLaunchKernelEx(self, config: Any, handle: tuple[Kernel, int], pointers: Any, extra: Any) -> int:
        kernel, size = handle
        blocks = self._blocks(kernel)
        entries = (ctypes.c_void_p * len(blocks))(
            *[ctypes.cast(b.entry, ctypes.c_void_p).value for b in blocks]
        )
        assert 0 <= blocks[0].size() - size < 64, "the kernel's parameters have another size"
        grid = config._obj.grid_x
        self.launches.append((kernel, grid))
        memory = ctypes.create_string_buffer(size + 128)
        start = -ctypes.addressof(memory) % 64
        ctypes.memmove(ctypes.addressof(memory) + start, pointers[0], size)
        fault = self.library.emulate(
            entries,
            ctypes.c_void_p(ctypes.addressof(memory) + start),
            grid,
            kernel.threads,
            kernel.cluster,
            self.seed,
            int(self.late),
        )
        if fault:
            raise RuntimeError(fault.decode())
        return 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *arguments: 0


def tensor_map(
    pointer: int,
    dtype: torch.dtype,
    sizes: Any,
    strides: Any,
    box: Any,
    swizzle: int = 0,
    l2_promotion: int = 256,
) -> bytes:
    """Stands in for `launch.tensor_map`, with the hardware's rules."""
    assert pointer % 16 == 0
    assert strides[0] % 16 == 0
    assert box[0] * dtype.itemsize <= swizzle
    assert box[1] <= 256
    return struct.pack("=QQQQIIII80x", pointer, *sizes, *strides, *box, swizzle, 1)


def poisoned(shape: Any, strides: Any, dtype: torch.dtype) -> torch.Tensor:
    """An output nobody has written."""
    tensor = guards._empty_strided_cpu(shape, strides, dtype)
    return tensor.fill_(torch.nan if dtype.is_floating_point else 0x7FFFFFFF)


def install(patch: Any, emulator: Emulator, multiprocessors: int = 132) -> None:
    """A GPU like an H200 whose launches `emulator` runs on CPU tensors, for as long as `patch` holds."""
    pretend(patch, emulator, multiprocessors=multiprocessors, empty=poisoned)
    patch.setattr(gemm_sm90, "tensor_map", tensor_map)
