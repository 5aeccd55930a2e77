"""What tests of the host path share: the CUDA implementations on CPU tensors, without a driver."""

import types

import pytest
import torch
from torch._C._dynamo import guards

from lynx_compile.runtime import calls, gemm_mma, gemm_sm90, kernels, launch, sparsify_kernel

from .stand_in import Driver


@pytest.fixture(params=[gemm_sm90, gemm_mma], ids=["sm90", "mma"])
def driver(request, monkeypatch):
    """The ops' CUDA implementations on CPU tensors: device -1 instead of 0."""
    driver = Driver()
    properties = types.SimpleNamespace(
        shared_memory_per_multiprocessor=233472, major=9, multi_processor_count=132
    )
    monkeypatch.setattr(launch, "_driver", driver)
    monkeypatch.setattr(launch.Kernel, "_load", lambda self, device: (self, self._layout.size))
    monkeypatch.setattr(launch, "_make_context_current", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(calls, "_empty_strided", guards._empty_strided_cpu)
    monkeypatch.setattr(calls, "empty", guards._empty_strided_cpu)
    monkeypatch.setattr(sparsify_kernel, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(kernels, "_gemm", lambda device, dtype: request.param.prepare)
    monkeypatch.setattr(kernels, "_sparsify_calls", calls.Known())
    monkeypatch.setattr(kernels, "_linear_calls", calls.Known())
    monkeypatch.setattr(kernels, "_together_calls", calls.Known())
    for cached in (sparsify_kernel.plan, sparsify_kernel._kernel, gemm_sm90.kernel, gemm_mma.kernel,
                   gemm_mma._overlaps, launch.multiprocessors, launch.tensor_map):  # fmt: skip
        cached.cache_clear()
    yield driver
    for cached in (sparsify_kernel.plan, sparsify_kernel._kernel, gemm_sm90.kernel, gemm_mma.kernel,
                   gemm_mma._overlaps, launch.multiprocessors, launch.tensor_map):  # fmt: skip
        cached.cache_clear()


@pytest.fixture
def prepared(monkeypatch):
    """Names of the ops whose operands were checked, one for each time."""
    found = []

    def spy(module, name):
        original = module.prepare
        monkeypatch.setattr(
            module, "prepare", lambda *args, **kwargs: (found.append(name), original(*args, **kwargs))[1]
        )

    for module, name in ((sparsify_kernel, "sparsify"), (gemm_sm90, "linear"), (gemm_mma, "linear")):
        spy(module, name)
    return found
