"""What the sparse GEMMs take: checks of `sparse_linear`'s operands, with errors that name the remedy."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layout

ALIGNMENT = 16  # bytes: the widest access of the kernels
RANK_MULTIPLE = 16  # depth of one tensor-core step
ROWS_MULTIPLE = 16  # of N

Operands = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]


class Layer(NamedTuple):
    """What `sparse_linear` takes besides X: see `semantics.sparse_linear` for the shapes."""

    t: Tensor
    weight: Tensor
    lora_up: Tensor | None
    bias: Tensor | None
    activation: str
    gate: Tensor | None
    residual: Tensor | None


def checked(
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    t: Tensor,
    weight: Tensor,
    lora_up: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
) -> Operands:
    """The operands as the kernels take them: contiguous, but for t's rows, and the rank a multiple of 16.

    Those that are so already are returned as they are. bias, gate: S·N elements, one row a sample, and
    M % S == 0. Raises TypeError for a dtype and ValueError for a device, a shape or an alignment the kernels
    would misread.
    """
    device, dtype = values.get_device(), values.dtype
    (m, half), (n, k) = values.shape, weight.shape
    if n % ROWS_MULTIPLE or k % layout.BLOCK_COLUMNS or not k or 2 * half != k:
        raise ValueError(
            f"sparse_linear: weight is {tuple(weight.shape)} and values {tuple(values.shape)}; the kernels "
            f"need weight (N, K) and values (M, K / 2) with N % {ROWS_MULTIPLE} == 0 and "
            f"K % {layout.BLOCK_COLUMNS} == 0; run this layer dense"
        )
    words = -(-m // layout.BLOCK_ROWS) * (k // layout.BLOCK_COLUMNS) * layout.WORDS
    values = _operand("values", values, dtype, device, m * half)
    metadata = _operand("metadata", metadata, torch.int32, device, words)
    scale = _operand("scale", scale, torch.float32, device, m)
    weight = _operand("weight", weight, dtype, device, n * k)
    if lora_up is not None:
        rank = lora_up.shape[1]
        if rank % RANK_MULTIPLE:
            t, lora_up = (F.pad(x, (0, -rank % RANK_MULTIPLE)) for x in (t, lora_up))
            rank = lora_up.shape[1]
        t = _operand("t", t, dtype, device, m * rank, rows_apart=True)
        lora_up = _operand("lora_up", lora_up, dtype, device, n * rank) if rank else None
    bias = _per_sample("bias", bias, dtype, device, m, n)
    gate = _per_sample("gate", gate, dtype, device, m, n)
    if residual is not None:
        residual = _operand("residual", residual, dtype, device, m * n)
    return values, metadata, scale, t, weight, lora_up, bias, gate, residual


def samples(rows: Tensor | None, n: int) -> int:
    """How many samples hold a row each of a checked bias or gate; 1 without one."""
    return 1 if rows is None else rows.numel() // n


def _per_sample(
    name: str, tensor: Tensor | None, dtype: torch.dtype, device: int, m: int, n: int
) -> Tensor | None:
    if tensor is None:
        return None
    count = tensor.numel() // n
    if not count or m % count:
        raise ValueError(
            f"sparse_linear: {name} has shape {tuple(tensor.shape)}; expected one row of N = {n} for each "
            f"sample, and a number of samples that divides M = {m}"
        )
    return _operand(name, tensor, dtype, device, count * n)


def _operand(
    name: str, tensor: Tensor, dtype: torch.dtype, device: int, elements: int, rows_apart: bool = False
) -> Tensor:
    """The tensor, contiguous. rows_apart: the rows of a matrix need not follow each other."""
    if not tensor.is_contiguous() and not (
        rows_apart and tensor.stride(1) == 1 and tensor.stride(0) * tensor.element_size() % ALIGNMENT == 0
    ):
        tensor = tensor.contiguous()
    if (
        tensor.dtype is not dtype
        or tensor.get_device() != device
        or tensor.numel() != elements
        or tensor.data_ptr() % ALIGNMENT
    ):
        _refuse(name, tensor, dtype, device, elements)
    return tensor


def _refuse(name: str, tensor: Tensor, dtype: torch.dtype, device: int, elements: int) -> NoReturn:
    if tensor.dtype is not dtype:
        raise TypeError(f"sparse_linear: {name} is {tensor.dtype}, expected {dtype}; cast it")
    if tensor.get_device() != device:
        raise ValueError(f"sparse_linear: {name} is on {tensor.device}, expected cuda:{device}; move it")
    if tensor.numel() != elements:
        raise ValueError(
            f"sparse_linear: {name} has shape {tuple(tensor.shape)}, {tensor.numel()} elements, "
            f"expected {elements}"
        )
    raise ValueError(
        f"sparse_linear: {name} starts at {tensor.data_ptr():#x}, not a multiple of {ALIGNMENT} bytes; "
        f"pass {name}.clone()"
    )
