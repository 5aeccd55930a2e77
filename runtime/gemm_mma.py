"""`sparse_linear` on warp-level sparse instructions, for every GPU since Ampere (csrc/sparse_gemm_mma.cu)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .calls import Call, Launch, pointers
from .launch import Kernel
from .operands import samples
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
        parameters="PPPPPPPPPOiiiiiii",
        threads=THREADS,
        smem=SMEM,
        overlap=overlap,
        defines={"FLOAT16": int(dtype == torch.float16), "ACTIVATION": list(ACTIVATIONS).index(activation)},
    )


def kernel_for(
    device: int,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    activation: str,
    tail: bool,
    bias_rows: int | None = None,
) -> Kernel:
    """The kernel `sparse_gemm` launches: sizes, gates and residuals are arguments of one kernel."""
    return kernel(dtype, activation, _overlaps(device))


def prepare(
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
) -> Call:
    """The call that computes y (M, N) of `ops.sparse_linear`.

    Operands are checked; rows of t may be apart; rank % 16 == 0.
    """
    m, half = values.shape
    n = weight.shape[0]
    device = values.get_device()
    variant = kernel(values.dtype, activation, _overlaps(device))
    packed = variant.pack(
        values.data_ptr(),
        metadata.data_ptr(),
        scale.data_ptr(),
        weight.data_ptr(),
        t.data_ptr(),
        0 if lora_up is None else lora_up.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if gate is None else gate.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0,  # y
        m,
        n,
        2 * half,
        0 if lora_up is None else lora_up.shape[1],
        0 if lora_up is None else t.stride(0),
        m // samples(bias, n),
        m // samples(gate, n),
    )
    grid = -(-m // TILE) * -(-n // TILE), 1, 1
    return Call(device, [((m, n), values.dtype)], [Launch(variant, grid, packed, pointers(1))])


def sparse_gemm(*operands: Any, **options: Any) -> Tensor:
    """y (M, N): `prepare` and run."""
    return prepare(*operands, **options).run()[0]


@functools.cache
def _overlaps(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)
