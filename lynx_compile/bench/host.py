"""What one call of an op costs the host while its device has nothing else to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..runtime import kernels, ops  # noqa: F401 (importing kernels registers them)

M, N, K, RANK = 64, 32, 128, 16  # small: the host must not wait for the device
BURST = 50  # calls between two waits for the device


def run(device: str = "cuda", calls: int = 3000) -> list[dict[str, Any]]:
    """Medians over `calls` calls in inference mode: [{"call": name, "host_us": microseconds}].

    On a device without kernels it is the reference's time.
    """
    with torch.inference_mode():
        named = _calls(device)
        for call in named.values():  # compiles
            call()
        return [
            {"call": name, "host_us": round(1e6 * median(_times(call, device, calls)), 2)}
            for name, call in named.items()
        ]


def _calls(device: str) -> dict[str, Callable[[], object]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    x, weight, down, up, bias = normal(M, K), normal(N, K), normal(RANK, K), normal(N, RANK), normal(N)
    gate, residual = normal(1, N), normal(M, N)
    adaln = [x, None, None, normal(1, K), normal(1, K)]
    compressed = ops.sparsify("identity", [x], down)
    return {
        "sparsify, LoRA": lambda: ops.sparsify("identity", [x], down),
        "sparsify, no LoRA": lambda: ops.sparsify("identity", [x]),
        "sparsify, adaLN, LoRA": lambda: ops.sparsify("layer_norm", adaln, down, 1e-6, 1.0),
        "sparse_linear, LoRA, bias": lambda: ops.sparse_linear(*compressed, weight, up, bias),
        "sparse_linear, gate and residual too": lambda: ops.sparse_linear(
            *compressed, weight, up, bias, "none", gate, residual
        ),
        "torch linear": lambda: torch.nn.functional.linear(x, weight, bias),
    }


def _times(call: Callable[[], object], device: str, calls: int) -> list[float]:
    times = []
    for i in range(calls):
        if i % BURST == 0 and device.startswith("cuda"):
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times
