"""`sparse_linear` on warp-level sparse instructions, for every GPU since Ampere (csrc/sparse_gemm_mma.cu)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .calls import Call, Launch, pointers
from .launch import Grid, Kernel, overlaps
from .operands import Layer, samples
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
        parameters="PPPPPPPPPOiiiiiiii",
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
    return kernel(dtype, activation, overlaps(device))


def prepare_all(
    values: Tensor, metadata: Tensor, scale: Tensor, layers: Sequence[Layer], *, y_stride: int = 0
) -> Call:
    """The call that computes y (M, N) of each layer of one X, one launch for each.

    Operands are checked; rows of t may be apart; rank % 16 == 0. y_stride: elements from row to row of each
    y, an even number; N by default.
    """
    outputs = [((values.shape[0], layer.weight.shape[0]), values.dtype) for layer in layers]
    pack, launches = pointers(1), []
    for i, layer in enumerate(layers):
        kernel, grid, packed = _pack(values, metadata, scale, layer, y_stride)
        own = pack if len(layers) == 1 else lambda *addresses, i=i: pack(addresses[i])
        launches.append(Launch(kernel, grid, packed, own))
    return Call(values.get_device(), outputs, launches)


def _pack(
    values: Tensor, metadata: Tensor, scale: Tensor, layer: Layer, y_stride: int
) -> tuple[Kernel, Grid, bytes]:
    """Kernel, grid and parameters of one launch."""
    m, half = values.shape
    n = layer.weight.shape[0]
    up, bias, gate, residual = layer.lora_up, layer.bias, layer.gate, layer.residual
    variant = kernel(values.dtype, layer.activation, overlaps(values.get_device()))
    packed = variant.pack(
        values.data_ptr(),
        metadata.data_ptr(),
        scale.data_ptr(),
        layer.weight.data_ptr(),
        layer.t.data_ptr(),
        0 if up is None else up.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if gate is None else gate.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0,  # y
        m,
        n,
        2 * half,
        0 if up is None else up.shape[1],
        0 if up is None else layer.t.stride(0),
        y_stride or n,
        m // samples(bias, n),
        m // samples(gate, n),
    )
    return variant, (-(-m // TILE) * -(-n // TILE), 1, 1), packed


def sparse_gemm(values: Tensor, metadata: Tensor, scale: Tensor, *layer: Any, **fields: Any) -> Tensor:
    """y (M, N): `prepare_all` for one layer, the fields of `Layer`, and run."""
    return prepare_all(values, metadata, scale, [Layer(*layer, **fields)]).run()[0]
