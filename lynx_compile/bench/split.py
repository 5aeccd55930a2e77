"""Where the GPU time of one step goes, by the names of its kernels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any

import torch

OTHER = "elementwise_ms"
# The first kind whose pattern a kernel has in its name; what matches none is elementwise. Inductor names
# a fused kernel after the ops around it: norm and rotation in front of attention carry its name.
KINDS = {
    OTHER: re.compile(r"^triton_(poi|red|per|mix)_"),
    "sparsify_ms": re.compile(r"^sparsify"),
    "attention_ms": re.compile(r"flash|fmha|attention|sdpa|cudnn_generated_fort_native", re.IGNORECASE),
    "gemm_ms": re.compile(r"gemm|gemv|cutlass|nvjet|xmma|cublas|wgmma|triton_\w*mm|splitk", re.IGNORECASE),
}
LONGEST_NAME = 80  # characters of a kernel's name that are kept


def kind_of(kernel: str) -> str:
    """ "gemm_ms", "sparsify_ms", "attention_ms" or "elementwise_ms"."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(kernel)), OTHER)


def kernels(call: Callable[[], Any]) -> list[tuple[str, int]]:
    """(name, nanoseconds) of what one call ran on the GPU, as the profiler saw it (ops, without a GPU).

    A kernel that starts while those before it still run (programmatic dependent launch) waits for them: its
    time counts from their end, so that all of them together are the time the GPU was busy.
    """
    on_gpu = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    recorded: Any = profile.profiler
    ran = [
        (event.name(), event.start_ns(), event.duration_ns())
        for event in recorded.kineto_results.events()
        if event.device_type() == device and not _is_annotation(event)
    ]
    return in_turn(ran) if on_gpu else [(name, taken) for name, _, taken in ran]


def in_turn(ran: Iterable[tuple[str, int, int]]) -> list[tuple[str, int]]:
    """(name, nanoseconds after the kernels before it) of each (name, start, nanoseconds)."""
    found, done = [], 0
    for name, start, taken in sorted(ran, key=itemgetter(1)):
        end = start + taken
        found.append((name, max(end - max(start, done), 0)))
        done = max(done, end)
    return found


def _is_annotation(event: Any) -> bool:
    """Ranges that frame kernels on the GPU's time line: a compiled region, a record_function."""
    return event.is_user_annotation() or event.name().startswith(("## ", "Torch-Compiled Region"))


def total_ms(kernels: Iterable[tuple[str, int]]) -> dict[str, float]:
    """Sums of (kernel name, nanoseconds) by kind, in ms; every kind is present."""
    totals = dict.fromkeys(KINDS, 0.0)
    for name, nanoseconds in kernels:
        totals[kind_of(name)] += nanoseconds / 1e6
    return totals


def heaviest(kernels: Iterable[tuple[str, int]], count: int = 12) -> list[dict[str, Any]]:
    """The kernels that take most of the time, together: {kernel, kind, launches, ms}."""
    launches: Counter[str] = Counter()
    nanoseconds: Counter[str] = Counter()
    for name, taken in kernels:
        launches[name] += 1
        nanoseconds[name] += taken
    return [
        {
            "kernel": name[:LONGEST_NAME],
            "kind": kind_of(name).removesuffix("_ms"),
            "launches": launches[name],
            "ms": round(taken / 1e6, 3),
        }
        for name, taken in nanoseconds.most_common(count)
    ]
