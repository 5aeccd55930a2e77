"""`residual_norm` on the GPU: one launch of csrc/residual_norm.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .calls import Call, Launch, pointers
from .launch import Kernel, overlaps
from .residual_norm import CHANNELS

SOURCE = "residual_norm.cu"
ALIGNMENT = 16  # bytes a lane loads at once
WARPS = 4  # of a block, which takes a row
REGISTERS = 64 * 1024  # of a multiprocessor
SPARE = 40  # registers of a thread beside what it holds of x and of the residual


@functools.cache
def kernel(
    dtype: torch.dtype,
    columns: int,
    weight: torch.dtype | None,
    mult: torch.dtype | None,
    overlap: bool,
) -> Kernel:
    """The variant for an element type, a width, and the types of weight and mult.

    overlap: launch before the kernel in front is done, which needs compute capability 9.0.
    """
    registers = SPARE + 8 * -(-columns // (256 * WARPS))
    return Kernel(
        SOURCE,
        "residual_norm",
        parameters="PqPPqPqOiff",
        threads=32 * WARPS,
        overlap=overlap,
        defines={
            "FLOAT16": int(dtype == torch.float16),
            "COLUMNS": columns,
            "WEIGHT": _kind(weight, dtype),
            "MULT": _kind(mult, dtype),
            "WARPS": WARPS,
            "MIN_BLOCKS": min(REGISTERS // (32 * WARPS * registers), 8),
        },
    )


def prepare(
    x: Tensor,
    weight: Tensor | None,
    mult: Tensor | None,
    residual: Tensor,
    eps: float,
    mult_offset: float = 0.0,
) -> Call:
    """The call that computes `residual_norm`.

    x and residual are bf16 or fp16; weight and mult of the same type or fp32. Raises ValueError for a shape,
    TypeError for a dtype that the kernel does not take.
    """
    _check(x, weight, mult, residual)
    device, columns = x.get_device(), x.shape[-1]
    copies: list[Tensor] = []
    rows, onto = (_loadable(t.reshape(-1, columns), t, copies) for t in (x, residual))
    weight = None if weight is None else _loadable(weight.reshape(1, columns), weight, copies)
    mult = None if mult is None else _loadable(mult.reshape(-1, columns), mult, copies)
    count, samples = rows.shape[0], 1 if mult is None else mult.shape[0]
    types = (None if vector is None else vector.dtype for vector in (weight, mult))
    variant = kernel(x.dtype, columns, *types, overlaps(device))
    packed = variant.pack(
        rows.data_ptr(),
        rows.stride(0),
        0 if weight is None else weight.data_ptr(),
        0 if mult is None else mult.data_ptr(),
        0 if mult is None else mult.stride(0),
        onto.data_ptr(),
        onto.stride(0),
        0,  # y
        max(count // max(samples, 1), 1),
        eps,
        mult_offset,
    )
    launches = [Launch(variant, (count, 1, 1), packed, pointers(1))] if count else []
    return Call(device, [(tuple(residual.shape), x.dtype)], launches, copies)


def _kind(vector: torch.dtype | None, dtype: torch.dtype) -> int:
    return 0 if vector is None else 1 if vector == dtype else 2


def _loadable(rows: Tensor, given: Tensor, copies: list[Tensor]) -> Tensor:
    """The rows of a tensor, or a copy of them that lanes can load 16 bytes of at once."""
    step = ALIGNMENT // rows.element_size()
    apart = rows.stride(0) % step == 0 or rows.shape[0] == 1
    if rows.data_ptr() % ALIGNMENT or rows.stride(1) != 1 or not apart:
        rows = rows.clone(memory_format=torch.contiguous_format)
    if rows.data_ptr() != given.data_ptr():
        copies.append(rows)
    return rows


def _check(x: Tensor, weight: Tensor | None, mult: Tensor | None, residual: Tensor) -> None:
    columns = x.shape[-1]
    if columns not in CHANNELS or x.shape != residual.shape:
        raise ValueError(
            f"residual_norm: x is {tuple(x.shape)}, residual {tuple(residual.shape)}; both need one shape, "
            f"whose last size is a multiple of {CHANNELS.step} up to {CHANNELS[-1]}"
        )
    rows = x.numel() // columns
    samples = 1 if mult is None else mult.numel() // columns
    if weight is not None and tuple(weight.shape) != (columns,):
        raise ValueError(f"residual_norm: weight is {tuple(weight.shape)}; it needs ({columns},)")
    if mult is not None and (mult.shape[-1] != columns or (rows and not samples) or rows % max(samples, 1)):
        raise ValueError(
            f"residual_norm: mult is {tuple(mult.shape)}; {rows} rows need one row of {columns} a sample"
        )
    own, any_of = (x.dtype,), (x.dtype, torch.float32)
    wanted = {"residual": (residual, own), "weight": (weight, any_of), "mult": (mult, any_of)}
    for name, (tensor, dtypes) in wanted.items():
        if tensor is not None and (tensor.dtype not in dtypes or tensor.device != x.device):
            raise TypeError(
                f"residual_norm: {name} is {tensor.dtype} on {tensor.device}; it needs "
                f"{' or '.join(map(str, dtypes))} on {x.device}"
            )
