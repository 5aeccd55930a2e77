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
    """Milliseconds of one call by kind of kernel, as the profiler saw them on the GPU (ops, without one)."""
    on_gpu = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    recorded: Any = profile.profiler
    return total_ms(
        (event.name(), event.duration_ns())
        for event in recorded.kineto_results.events()
        if event.device_type() == device and not _is_annotation(event)
    )


def _is_annotation(event: Any) -> bool:
    """Ranges that frame kernels on the GPU's time line: a compiled region, a record_function."""
    return event.is_user_annotation() or event.name().startswith(("## ", "Torch-Compiled Region"))


def total_ms(kernels: Iterable[tuple[str, int]]) -> dict[str, float]:
    """Sums of (kernel name, nanoseconds) by kind, in ms; every kind is present."""
    totals = dict.fromkeys([*KINDS, OTHER], 0.0)
    for name, nanoseconds in kernels:
        totals[kind_of(name)] += nanoseconds / 1e6
    return totals
