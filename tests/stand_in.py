"""A driver that only writes down what it is told, and operands for it: the host path without a GPU."""

import ctypes
import threading
import types

import torch
from torch._C._dynamo import guards

from lynx_compile.runtime import calls, gemm_mma, gemm_sm90, kernels, launch, sparsify_kernel

M, N, K, RANK = 96, 32, 128, 16


class Driver:
    """Records the parameter buffer of each launch, by kernel and grid."""

    def __init__(self):
        self.launches, self.threads = [], set()

    def __call__(self):
        return self

    def cuLaunchKernelEx(self, config, handle, pointers, extra):
        grid = config._obj.grid_x, config._obj.grid_y, config._obj.grid_z
        kernel, size = handle
        self.launches.append((kernel, grid, ctypes.string_at(pointers[0], size)))
        self.threads.add(threading.get_ident())
        return 0

    def __getattr__(self, name):
        return lambda *arguments: 0


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape).to(dtype)


class Operands:
    """Of one layer with everything in it."""

    def __init__(self, m=M, rank=RANK, samples=1, dtype=torch.bfloat16):
        self.x, self.weight = normal(m, K, dtype=dtype), normal(N, K, dtype=dtype)
        self.down, self.up = normal(rank, K, dtype=dtype), normal(N, rank, dtype=dtype)
        self.bias, self.gate = normal(samples, N, dtype=dtype), normal(samples, N, dtype=dtype)
        self.residual = normal(m, N, dtype=dtype)

    def sparsify(self, **options):
        return kernels._sparsify("identity", [self.x], self.down, **options)

    def linear(self, compressed, **changes):
        names = "values", "metadata", "scale", "t"
        arguments = dict(zip(names, compressed, strict=True))
        arguments |= {"weight": self.weight, "lora_up": self.up, "bias": self.bias, "activation": "silu"}
        arguments |= {"gate": self.gate, "residual": self.residual}
        return kernels._sparse_linear(**(arguments | changes))


def parameters(launched):
    kernel, _, packed = launched
    return kernel._layout.unpack(packed[: kernel._layout.size])


def pointers(*tensors):
    return [tensor.data_ptr() for tensor in tensors]


def pretend(patch, driver, *, multiprocessors=132, empty=guards._empty_strided_cpu):
    """A GPU like an H200 whose launches `driver` takes, on CPU tensors: device -1 instead of 0.

    empty: makes outputs. `forget` undoes what `patch` does not.
    """
    properties = types.SimpleNamespace(
        shared_memory_per_multiprocessor=233472, major=9, multi_processor_count=multiprocessors
    )
    patch.setattr(launch, "_driver", driver)
    patch.setattr(launch.Kernel, "_load", lambda self, device: (self, self._layout.size))
    patch.setattr(launch, "_make_context_current", lambda device: None)
    patch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    patch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    patch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    patch.setattr(calls, "_empty_strided", empty)
    patch.setattr(calls, "empty", empty)
    patch.setattr(sparsify_kernel, "DEVICE_TYPE", "cpu")
    forget()


def forget():
    """What was planned, loaded or asked for on another device."""
    for cached in (
        *(sparsify_kernel.plan, sparsify_kernel._kernel, gemm_sm90.kernel, gemm_mma.kernel),
        *(launch.overlaps, launch.multiprocessors),
    ):
        cached.cache_clear()
