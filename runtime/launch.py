"""Loading and launching kernels with little host time.

    scale = Kernel("scale.cu", "scale", parameters="PPif", threads=256, defines={"UNROLL": 4})
    scale(device, (blocks, 1, 1), x.data_ptr(), y.data_ptr(), n, 2.0)

A kernel is compiled and loaded on first use, per device. It runs on torch's current stream of that device,
from any thread and under CUDA graph capture. The driver is called through ctypes with structures that are
filled once a thread: a call costs two or three microseconds, where wrappers that build them anew take more.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
import threading
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_uint, c_void_p
from typing import Any

import torch

from . import build

Grid = tuple[int, int, int]

# Kernel parameter codes besides struct's own; those of outputs are told apart, because each launch sets them.
TENSOR_MAP, OUTPUT_POINTER, OUTPUT_MAP = "T", "O", "Y"
TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGNMENT = 64

# Values of the driver's enums (cuda.h).
_ATTRIBUTE_CLUSTER, _ATTRIBUTE_PROGRAMMATIC_LAUNCH = 4, 6
_MAX_DYNAMIC_SMEM = 8
_CAPTURE_RELAXED = 2
_MAP_TYPES = {
    torch.uint8: 0,
    torch.int32: 3,
    torch.float16: 6,
    torch.float32: 7,
    torch.bfloat16: 9,
}
_MAP_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_MAP_L2_PROMOTIONS = {0: 0, 64: 1, 128: 2, 256: 3}


class LaunchError(RuntimeError):
    """The driver refused to load or launch a kernel; the message names the call and the driver's error."""


class Kernel:
    """One kernel of `csrc`.

    source, defines: the file and its macros. name: an `extern "C" __global__` function in it.
    parameters: one code each, in order: "P" pointer as int (0 is null), "i" int, "I" unsigned, "q" long long,
    "f" float, "T" a `tensor_map`, passed by value (`const __grid_constant__ TensorMap`); "O" and "Y" are a
    pointer to an output and the tensor map of one, next to each other. A kernel that takes one struct lists
    the struct's fields.
    threads: of a block. smem: dynamic shared memory of a block, bytes. cluster: blocks of one, along x.
    overlap: may start while the kernel before it on the stream still runs (programmatic dependent launch); it
    must then execute `griddepcontrol.wait` before it touches what that kernel wrote.
    """

    def __init__(
        self,
        source: str,
        name: str,
        *,
        parameters: str,
        threads: int,
        defines: build.Defines | None = None,
        smem: int = 0,
        cluster: int = 1,
        overlap: bool = False,
    ) -> None:
        self.source, self.name, self.defines = source, name, dict(defines or {})
        self.parameters, self.threads, self.smem = parameters, threads, smem
        self.cluster, self.overlap = cluster, overlap
        self._layout, self._offsets = _parameter_struct(parameters)
        outputs = [i for i, code in enumerate(parameters) if code in (OUTPUT_POINTER, OUTPUT_MAP)]
        ends = [*self._offsets[1:], self._layout.size]
        self.outputs = slice(self._offsets[outputs[0]], ends[outputs[-1]]) if outputs else slice(0, 0)
        self._handles: dict[int, c_void_p] = {}
        self._loading = threading.Lock()
        self._frames = _Frames()

    def unit(self, arch: str) -> build.Unit:
        """What `build.prebuild` compiles for this kernel on `arch`."""
        return build.unit(self.source, arch, self.defines)

    def pack(self, *arguments: Any) -> bytes:
        """The kernel's parameter buffer, whose outputs may be left for the launch."""
        return self._layout.pack(*arguments)

    def __call__(self, device: int, grid: Grid, *arguments: Any) -> None:
        """Launch on torch's current stream of `device`. Raises LaunchError or build.CompileError."""
        packed = self._layout.pack(*arguments)
        with torch.cuda.device(device):
            self.launch(device, grid, packed, packed[self.outputs])

    def launch(self, device: int, grid: Grid, packed: bytes, outputs: bytes) -> None:
        """As calling, with a parameter buffer from `pack`, on the current device, which `device` must be.

        outputs: what stands in the buffer at `self.outputs`.
        """
        frame = self._frames.of.get(device)
        if frame is None:
            frame = self._prepare(device)
        frame.buffer.raw = packed
        frame.outputs.raw = outputs
        config = frame.config
        if frame.grid != grid:
            frame.grid = grid
            config.grid_x, config.grid_y, config.grid_z = grid
        config.stream = torch._C._cuda_getCurrentRawStream(device)
        status = frame.call(frame.config_pointer, frame.handle, frame.pointers, None)
        if status:
            raise LaunchError(
                f"launching {self.name} ({self.source}, {self.defines}) with grid {grid}, "
                f"cluster {self.cluster}, {self.threads} threads, {self.smem} bytes of shared memory: "
                f"{_error_text(status)}"
            )

    def _prepare(self, device: int) -> _Frame:
        """What one thread needs for launches on one device: a current context and its own structures."""
        with torch.cuda.device(device):
            _make_context_current(device)
            with self._loading:
                if device not in self._handles:
                    self._handles[device] = self._load(device)
            frame = _Frame(self, self._handles[device])
        self._frames.of[device] = frame
        return frame

    def _load(self, device: int) -> c_void_p:
        arch = build.arch_of(torch.cuda.get_device_capability(device))
        code = build.cubin(self.source, arch=arch, defines=self.defines)
        kernel, function, mode = c_void_p(), c_void_p(), c_int(_CAPTURE_RELAXED)
        what = f"loading {self.name} of {self.source} for {arch}"
        _check(_driver().cuThreadExchangeStreamCaptureMode(byref(mode)), what)  # a first call may be captured
        try:
            library = _library(code)
            _check(_driver().cuLibraryGetKernel(byref(kernel), library, self.name.encode()), what)
            _check(
                _driver().cuKernelGetFunction(byref(function), kernel), what
            )  # loads it now, not at launch
            if self.smem:
                status = _driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SMEM, self.smem)
                _check(status, f"{what} with {self.smem} bytes of shared memory a block")
        finally:
            _driver().cuThreadExchangeStreamCaptureMode(byref(mode))
        return function


@functools.lru_cache(maxsize=8192)
def tensor_map(
    pointer: int,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int = 0,
    l2_promotion: int = 256,
) -> bytes:
    """A TMA descriptor of a tensor in global memory, 128 bytes, for a "T" parameter.

    sizes: elements along each dimension, innermost first. strides: bytes between neighbours, from the second
    dimension on. box: the tile one copy moves, innermost first. swizzle: bytes, 0, 32, 64 or 128. Reads past
    the end give zeros. A descriptor is a pure function of these, so entries never go stale.
    Raises LaunchError when the hardware's rules are broken (16-byte alignment above all).
    """
    rank = len(sizes)
    memory = ctypes.create_string_buffer(TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT)
    address = -(-ctypes.addressof(memory) // TENSOR_MAP_ALIGNMENT) * TENSOR_MAP_ALIGNMENT
    status = _driver().cuTensorMapEncodeTiled(
        c_void_p(address),
        c_int(_MAP_TYPES[dtype]),
        c_uint(rank),
        c_void_p(pointer),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        c_int(0),  # no interleave
        c_int(_MAP_SWIZZLES[swizzle]),
        c_int(_MAP_L2_PROMOTIONS[l2_promotion]),
        c_int(0),  # zeros outside
    )
    _check(
        status, f"a tensor map of {dtype} at {pointer:#x}, sizes {sizes}, strides {strides} bytes, box {box}"
    )
    return ctypes.string_at(address, TENSOR_MAP_BYTES)


@functools.cache
def overlaps(device: int) -> bool:
    """Whether kernels of a device may start while the one in front still runs."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def multiprocessors(device: int) -> int:
    """Number of multiprocessors of a device: what a persistent grid fills."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def driver_version() -> tuple[int, int]:
    """(major, minor) of the newest CUDA the installed driver runs. Raises LaunchError without a driver."""
    version = c_int()
    _check(_driver().cuDriverGetVersion(byref(version)), "asking for the driver's version")
    return version.value // 1000, version.value % 1000 // 10


def _parameter_struct(parameters: str) -> tuple[struct.Struct, list[int]]:
    """The packing of a kernel's parameters, and where each lies."""
    layout, offset, offsets = "=", 0, []
    for code in parameters:
        if code in (TENSOR_MAP, OUTPUT_MAP):
            field, size, alignment = f"{TENSOR_MAP_BYTES}s", TENSOR_MAP_BYTES, TENSOR_MAP_ALIGNMENT
        else:
            field = "Q" if code in ("P", OUTPUT_POINTER) else code  # "P" exists only in struct's native mode
            size = alignment = struct.calcsize(f"={field}")
        padding = -offset % alignment
        layout += f"{padding}x{field}" if padding else field
        offsets.append(offset + padding)
        offset += padding + size
    return struct.Struct(layout), offsets


class _Attribute(Structure):
    _fields_ = (("id", c_int), ("pad", c_int), ("value", c_uint * 16))


class _Config(Structure):
    _fields_ = (
        ("grid_x", c_uint),
        ("grid_y", c_uint),
        ("grid_z", c_uint),
        ("block_x", c_uint),
        ("block_y", c_uint),
        ("block_z", c_uint),
        ("smem", c_uint),
        ("stream", c_void_p),
        ("attributes", POINTER(_Attribute)),
        ("attribute_count", c_uint),
    )


class _Frame:
    """Launch structures of one kernel, device and thread: the driver reads them without the GIL."""

    def __init__(self, kernel: Kernel, handle: c_void_p) -> None:
        attributes = []
        if kernel.cluster > 1:
            attributes.append(_Attribute(_ATTRIBUTE_CLUSTER, 0, (c_uint * 16)(kernel.cluster, 1, 1)))
        if kernel.overlap:
            attributes.append(_Attribute(_ATTRIBUTE_PROGRAMMATIC_LAUNCH, 0, (c_uint * 16)(1)))
        array = (_Attribute * max(len(attributes), 1))(*attributes)
        self.config = _Config(1, 1, 1, kernel.threads, 1, 1, kernel.smem, None, array, len(attributes))
        self.config_pointer = byref(self.config)
        self.grid = (1, 1, 1)
        # One pointer for each parameter: given as one block instead, tensor maps arrive misaligned. A struct
        # parameter is read with its trailing padding, which no alignment makes longer than a tensor map's.
        self.buffer = ctypes.create_string_buffer(kernel._layout.size + TENSOR_MAP_ALIGNMENT)
        outputs = kernel.outputs
        self.outputs = (ctypes.c_char * (outputs.stop - outputs.start)).from_buffer(
            self.buffer, outputs.start
        )
        base = ctypes.addressof(self.buffer)
        self.pointers = (c_void_p * len(kernel._offsets))(*[base + offset for offset in kernel._offsets])
        self.handle = handle
        self.call = _driver().cuLaunchKernelEx


class _Frames(threading.local):
    def __init__(self) -> None:
        self.of: dict[int, _Frame] = {}


@functools.cache
def _library(code: bytes) -> c_void_p:
    """Load a cubin, once for all devices. The cache keeps `code` alive: the driver may go on reading it."""
    library = c_void_p()
    status = _driver().cuLibraryLoadData(byref(library), c_char_p(code), None, None, 0, None, None, 0)
    _check(status, f"loading a cubin of {len(code)} bytes")
    return library


def _make_context_current(device: int) -> None:
    """Torch makes a device's context, but it is current only in threads that have called the runtime."""
    context = c_void_p()
    _check(_driver().cuCtxGetCurrent(byref(context)), "asking for the current CUDA context")
    if not context:
        handle = c_int()
        _check(_driver().cuDeviceGet(byref(handle), device), f"opening CUDA device {device}")
        _check(_driver().cuDevicePrimaryCtxRetain(byref(context), handle), f"using CUDA device {device}")
        _check(_driver().cuCtxSetCurrent(context), f"using CUDA device {device}")


@functools.cache
def _driver() -> Any:
    """The CUDA driver's C library."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise LaunchError(f"the CUDA driver library {name} could not be loaded ({error})") from error


def _check(status: int, doing: str) -> None:
    if status:
        raise LaunchError(f"{doing}: {_error_text(status)}")


def _error_text(status: int) -> str:
    name, text = c_char_p(), c_char_p()
    _driver().cuGetErrorName(status, byref(name))
    _driver().cuGetErrorString(status, byref(text))
    if name.value is None or text.value is None:
        return f"CUDA error {status}"
    return f"{name.value.decode()}, {text.value.decode()}"
