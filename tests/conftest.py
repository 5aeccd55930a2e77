"""What tests of the host path share: the CUDA implementations on CPU tensors, without a driver."""

import pytest

from lynx_compile.runtime import calls, gemm_mma, gemm_sm90, kernels, launch, sparsify_kernel

from .stand_in import Driver, forget, pretend


@pytest.fixture(params=[gemm_sm90, gemm_mma], ids=["sm90", "mma"])
def driver(request, monkeypatch):
    """The ops' CUDA implementations on CPU tensors: device -1 instead of 0."""
    driver = Driver()
    pretend(monkeypatch, driver)
    monkeypatch.setattr(kernels, "_gemms", lambda device, dtype: request.param.prepare_all)
    monkeypatch.setattr(kernels, "_sparsify_calls", calls.Known())
    monkeypatch.setattr(kernels, "_linear_calls", calls.Known())
    monkeypatch.setattr(kernels, "_placed_calls", calls.Known())
    monkeypatch.setattr(kernels, "_together_calls", calls.Known())
    monkeypatch.setattr(kernels, "_placed_together_calls", calls.Known())
    launch.tensor_map.cache_clear()
    yield driver
    launch.tensor_map.cache_clear()
    forget()


@pytest.fixture
def prepared(monkeypatch):
    """Names of the ops whose operands were checked, one for each time."""
    found = []

    def spy(module, function, name):
        original = getattr(module, function)
        monkeypatch.setattr(
            module, function, lambda *args, **kwargs: (found.append(name), original(*args, **kwargs))[1]
        )

    spy(sparsify_kernel, "prepare", "sparsify")
    for module in (gemm_sm90, gemm_mma):
        spy(module, "prepare_all", "linear")
    return found
