"""Hopper kernels on the CPU: their source, compiled by g++ against stand-ins for the raw instructions.

It shows wrong indices, barriers that do not fit, slots given up too early and parameters packed in another
order than the kernel reads them. It says nothing about speed, registers or the instructions themselves.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from lynx_compile.runtime import build
from lynx_compile.runtime.calls import Call
from lynx_compile.runtime.launch import Kernel

HERE = Path(__file__).parent
SHARED = "extern __shared__ __align__(1024) unsigned char shared[];"


def tensor_map(pointer, dtype, sizes, strides, box, swizzle=0, l2_promotion=256):
    """Stands in for `launch.tensor_map`, with the hardware's rules."""
    assert pointer % 16 == 0
    assert strides[0] % 16 == 0
    assert box[0] * dtype.itemsize <= swizzle
    assert box[1] <= 256
    return struct.pack("=QQQQIIII80x", pointer, *sizes, *strides, *box, swizzle, 1)


class Emulator:
    """Compiles kernels into `folder` and runs calls with them. edit: changes the source, to plant a fault."""

    def __init__(self, folder: Path, edit: Callable[[str], str] = lambda source: source) -> None:
        self.folder, self.edit = folder, edit

    def run(self, call: Call, outputs: list[torch.Tensor], seed: int) -> None:
        """Every launch of the call on CPU tensors. Raises RuntimeError for what would hang or corrupt."""
        for kernel, grid, packed, encode in call.launches:
            library = self._library(kernel)
            padding = library.params_bytes() - len(packed)
            assert 0 <= padding < 64, "the kernel's parameters have another size"
            buffer = bytearray(packed + bytes(padding))
            addresses = encode(*[y.data_ptr() for y in outputs])
            buffer[kernel.outputs.start : kernel.outputs.start + len(addresses)] = addresses
            fault = library.launch(bytes(buffer), grid[0], kernel.threads, kernel.cluster, kernel.smem, seed)
            if fault:
                raise RuntimeError(fault.decode())

    def _library(self, kernel: Kernel) -> ctypes.CDLL:
        source = self.edit((build.SOURCES / kernel.source).read_text())
        assert SHARED in source
        source = source.replace(SHARED, "unsigned char* shared = emulator::shared_memory();")
        source = source.replace('extern "C" __global__', "static")
        name = hashlib.sha256(repr((source, sorted(kernel.defines.items()))).encode()).hexdigest()[:16]
        path = self.folder / f"{name}.so"
        if not path.exists():
            copy = self.folder / f"{name}.inc"
            copy.write_text(source)
            # Headers that need no stand-in are taken from where they are, by name: their neighbours are not.
            (self.folder / "epilogue.cuh").write_text((build.SOURCES / "epilogue.cuh").read_text())
            macros = [f"-D{key}={value}" for key, value in kernel.defines.items()]
            command = ["g++", "-std=c++17", "-O2", "-w", "-fPIC", "-shared", f'-DKERNEL="{copy}"', *macros]
            subprocess.run(
                [*command, f"-I{self.folder}", f"-I{HERE}", "-o", str(path), str(HERE / "main.cpp")],
                check=True,
            )
        library = ctypes.CDLL(str(path))
        library.launch.restype = ctypes.c_char_p
        return library
