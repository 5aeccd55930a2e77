"""`sparse_linear` on warp-level sparse instructions, for every GPU since Ampere (csrc/sparse_gemm_mma.cu)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .launch import Kernel, empty
from .semantics import ACTIVATIONS

TILE = 128  # rows and columns of y that one block computes
THREADS = 256
SMEM = 3 * (TILE * 64 + TILE * 128 + TILE * 8)  # stages of values, weights and metadata


@functools.cache
def kernel(dtype: torch.dtype, activation: str, overlap: bool) -> Kernel:
    """The variant for an element type and an activation of `semantics.ACTIVATIONS`.

    overlap: launch before the kernel in front is done, which needs compute capability 9.0.
    """
    return Kernel(
        "sparse_gemm_mma.cu",
        "sparse_gemm_mma",
        parameters="PPPPPPPPPPiiiiii",
        threads=THREADS,
        smem=SMEM,
        overlap=overlap,
        defines={"FLOAT16": int(dtype == torch.float16), "ACTIVATION": list(ACTIVATIONS).index(activation)},
    )


def kernel_for(
    device: int, dtype: torch.dtype, m: int, n: int, k: int, activation: str, tail: bool
) -> Kernel:
    """The kernel `sparse_gemm` launches: sizes, gates and residuals are arguments of one kernel."""
    return kernel(dtype, activation, _overlaps(device))


def sparse_gemm(
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    t: Tensor,
    weight: Tensor,
    lora_up: Tensor | None,
    bias: Tensor | None,
    activation: str,
    gate: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """y (M, N) of `ops.sparse_linear`. Operands are checked; rows of t may be apart; rank % 16 == 0."""
    m, half = values.shape
    n = weight.shape[0]
    device = values.get_device()
    y = empty((m, n), values.dtype, device)
    kernel(values.dtype, activation, _overlaps(device))(
        device,
        (-(-m // TILE) * -(-n // TILE), 1, 1),
        values.data_ptr(),
        metadata.data_ptr(),
        scale.data_ptr(),
        weight.data_ptr(),
        t.data_ptr(),
        0 if lora_up is None else lora_up.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if gate is None else gate.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        y.data_ptr(),
        m,
        n,
        2 * half,
        0 if lora_up is None else lora_up.shape[1],
        0 if lora_up is None else t.stride(0),
        m if gate is None else m // (gate.numel() // n),
    )
    return y


@functools.cache
def _overlaps(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)
