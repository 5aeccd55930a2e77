"""A driver that only writes down what it is told, and operands for it: the host path without a GPU."""

import ctypes
import threading

import torch

from lynx_compile.runtime import kernels

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
