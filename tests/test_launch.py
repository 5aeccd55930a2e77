"""What a launch needs and a machine without a GPU can check: parameter packing, strides, reasons."""

import ctypes
import struct

import pytest
import torch

from lynx_compile.runtime import calls, kernels, launch


class Parameters(ctypes.Structure):
    """The C compiler's own idea of the layout that "iPfqiI" describes."""

    _fields_ = (
        ("a", ctypes.c_int),
        ("b", ctypes.c_void_p),
        ("c", ctypes.c_float),
        ("d", ctypes.c_longlong),
        ("e", ctypes.c_int),
        ("f", ctypes.c_uint),
    )


def test_parameters_are_laid_out_as_in_c():
    values = (-3, 0x7F0012345678, 0.25, -(1 << 40), 7, 0xFFFFFFFF)
    layout, offsets = launch._parameter_struct("iPfqiI")
    assert offsets == [getattr(Parameters, name).offset for name, _ in Parameters._fields_]
    assert layout.pack(*values) == bytes(Parameters(*values))


def test_tensor_maps_are_aligned():
    layout, offsets = launch._parameter_struct("iTPT")
    assert offsets == [0, 64, 192, 256]
    packed = layout.pack(5, b"\1" * 128, 9, b"\2" * 128)
    assert struct.unpack_from("=i", packed)[0] == 5
    assert packed[64:192] == b"\1" * 128
    assert packed[256:] == b"\2" * 128


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (0, 7), (7, 0)])
def test_strides_are_those_of_a_contiguous_tensor(shape):
    tensor = torch.empty(shape)
    assert torch.empty_strided(shape, calls._strides(shape)[: len(shape)]).is_contiguous()
    if shape:
        assert calls._strides(shape) == tensor.stride()


def test_a_kernel_knows_what_to_compile():
    kernel = launch.Kernel("a.cu", "a", parameters="P", threads=32, defines={"B": 2, "A": 1})
    assert kernel.unit("sm_80") == ("a.cu", "sm_80", (("A", 1), ("B", 2)))


@pytest.mark.parametrize(
    ("device", "dtype", "words"),
    [
        ("cpu", torch.bfloat16, "'cpu'"),
        ("cuda", torch.float32, "torch.float32"),
        ("cuda", torch.float64, "torch.bfloat16 or torch.float16"),
    ],
)
def test_reasons_name_what_is_missing(device, dtype, words):
    reason = kernels.unavailable_reason(torch.device(device), dtype)
    assert reason.startswith("no kernels: ")
    assert words in reason


def pretend_gpu(monkeypatch, capability, nvrtc=(13, 0), driver=(13, 0)):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "Some GPU")
    monkeypatch.setattr(kernels.build, "nvrtc_version", lambda: nvrtc)
    monkeypatch.setattr(kernels.build, "supported_archs", lambda: frozenset({80, 90}))
    monkeypatch.setattr(kernels.launch, "driver_version", lambda: driver)
    kernels._device_reason.cache_clear()


@pytest.mark.parametrize(
    ("capability", "nvrtc", "words"),
    [
        ((8, 0), (13, 0), None),
        ((9, 0), (12, 9), None),
        ((7, 5), (13, 0), "7.5"),
        ((12, 0), (13, 0), "NVRTC 13.0 does not know Some GPU"),
        ((9, 0), (14, 1), "newer driver"),
    ],
)
def test_reasons_on_a_gpu(monkeypatch, capability, nvrtc, words):
    pretend_gpu(monkeypatch, capability, nvrtc)
    reason = kernels.unavailable_reason(torch.device("cuda", 0), torch.bfloat16)
    kernels._device_reason.cache_clear()
    assert (reason is None) if words is None else (words in reason)
