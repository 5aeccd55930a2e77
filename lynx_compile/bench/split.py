"""Where the GPU time of one step goes, by the names of its kernels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

# The first kind whose pattern a kernel's name matches has it; what matches none is elementwise.
KINDS = {
    "sparsify_ms": re.compile(r"^sparsify"),
    "attention_ms": re.compile(r"flash|fmha|attention|sdpa|cudnn_generated_fort_native", re.IGNORECASE),
    "gemm_ms": re.compile(r"gemm|gemv|cutlass|nvjet|xmma|cublas|wgmma|triton_\w*mm|splitk", re.IGNORECASE),
}
OTHER = "elementwise_ms"


def kind_of(kernel: str) -> str:
    """ "gemm_ms", "sparsify_ms", "attention_ms" or "elementwise_ms"."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(kernel)), OTHER)


def split_ms(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of one call by kind of kernel, from the CUDA activities of the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return total_ms((event.name, event.duration_ns()) for event in _kernels(profile))


def total_ms(kernels: Iterable[tuple[str, int]]) -> dict[str, float]:
    """Sums of (kernel name, nanoseconds) by kind, in ms; every kind is present."""
    totals = dict.fromkeys([*KINDS, OTHER], 0.0)
    for name, nanoseconds in kernels:
        totals[kind_of(name)] += nanoseconds / 1e6
    return totals


def _kernels(profile: torch.profiler.profile) -> list[Any]:
    result: Any = profile.profiler
    on_device = [
        e for e in result.kineto_results.events() if e.device_type() == torch.autograd.DeviceType.CUDA
    ]
    return [event for event in on_device if event.duration_ns() > 0]
