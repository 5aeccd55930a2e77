"""`rotary` on the GPU: one launch of csrc/rotary.cu for each part of the sequence."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .calls import Call, Launch
from .launch import Kernel, multiprocessors, overlaps
from .rotary import CHANNELS

SOURCE = "rotary.cu"
ALIGNMENT = 16  # bytes a lane loads at once


class Geometry(NamedTuple):
    """How work is laid out.

    warps: of a block. ahead: loads a lane has on their way. min_blocks: on a multiprocessor at a time, which
    bounds registers. spread: warps a multiprocessor should get in all: with fewer tokens, several share the
    heads of one.
    """

    warps: int = 4
    ahead: int = 4
    min_blocks: int = 8
    spread: int = 32


GEOMETRY = Geometry()


@functools.cache
def kernel(
    dtype: torch.dtype,
    channels: int,
    norm: bool,
    weight: torch.dtype | None,
    pair: int,
    overlap: bool,
    geometry: Geometry = GEOMETRY,
) -> Kernel:
    """The variant for an element type, a head size, with a norm or none, the weight's type, angles a pair.

    overlap: launch before the kernel in front is done, which needs compute capability 9.0.
    """
    return Kernel(
        SOURCE,
        "rotary",
        parameters="PqqqP" + "Pqqqq" * 2 + "Oqiiiif",
        threads=32 * geometry.warps,
        overlap=overlap,
        defines={
            "FLOAT16": int(dtype == torch.float16),
            "LANES": channels // 8,
            "NORM": int(norm),
            "WEIGHT": 0 if weight is None else 1 if weight == dtype else 2,
            "PAIR": pair,
            "WARPS": geometry.warps,
            "AHEAD": geometry.ahead,
            "MIN_BLOCKS": geometry.min_blocks,
        },
    )


def prepare(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    eps: Sequence[float],
    cos: Sequence[Tensor],
    sin: Sequence[Tensor],
    geometry: Geometry = GEOMETRY,
) -> Call:
    """The call that computes `rotary`.

    Parts are bf16 or fp16; weights of the same type or fp32; angles fp32. Raises ValueError for a shape,
    TypeError for a dtype that the kernel does not take.
    """
    samples, _, heads, channels = parts[0].shape
    device, dtype = parts[0].get_device(), parts[0].dtype
    tokens = sum(part.shape[1] for part in parts)
    launches: list[Launch] = []
    copies: list[Tensor] = []
    at = 0
    for x, weight, epsilon, c, s in zip(parts, weights, eps, cos, sin, strict=True):
        _check(x, weight, c, s, (samples, heads, channels), device, dtype)
        x = _loadable(x, copies)
        weight = None if weight is None else _loadable(weight, copies)
        pair = max(c.shape[3], s.shape[3])
        own = None if weight is None else weight.dtype
        variant = kernel(dtype, channels, epsilon >= 0, own, pair, overlaps(device), geometry)
        length = x.shape[1]
        most = -(-heads * channels // (256 * geometry.ahead))  # each warp has a full set of loads
        wanted = -(-geometry.spread * multiprocessors(device) // max(samples * length, 1))
        each = -(-heads // max(min(most, wanted), 1))
        packed = variant.pack(
            x.data_ptr(),
            *x.stride()[:3],
            0 if weight is None else weight.data_ptr(),
            *_table(c, samples),
            *_table(s, samples),
            0,  # y
            tokens * heads * channels,
            samples,
            length,
            heads,
            each,
            max(epsilon, 0.0),
        )
        if samples and length:
            grid = -(-samples * length // geometry.warps), -(-heads // each), 1
            launches.append(Launch(variant, grid, packed, _from(at * heads * channels * dtype.itemsize)))
        at += length
    return Call(device, [((samples, tokens, heads, channels), dtype)], launches, copies)


def _from(offset: int) -> Callable[..., bytes]:
    """`Launch.outputs` for a part that starts `offset` bytes into y."""
    encode = struct.Struct("=Q").pack
    return encode if not offset else lambda address: encode(address + offset)


def _table(angles: Tensor, samples: int) -> tuple[int, ...]:
    sample, token, pair, channel = angles.stride()
    return (
        angles.data_ptr(),
        sample if angles.shape[0] > 1 else 0,
        token,
        pair,
        channel * (angles.shape[3] > 1),
    )


def _loadable(tensor: Tensor, copies: list[Tensor]) -> Tensor:
    """The tensor, or a copy of it that lanes can load 16 bytes of at once."""
    step = ALIGNMENT // tensor.element_size()
    strides = tensor.stride()
    if tensor.data_ptr() % ALIGNMENT == 0 and strides[-1] == 1 and not any(s % step for s in strides[:-1]):
        return tensor
    copies.append(tensor.clone(memory_format=torch.contiguous_format))
    return copies[-1]


def _check(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    sizes: tuple[int, int, int],
    device: int,
    dtype: torch.dtype,
) -> None:
    samples, length, heads, channels = x.shape
    if (samples, heads, channels) != sizes or channels not in CHANNELS:
        raise ValueError(
            f"rotary: a part is {tuple(x.shape)}; all need (B, T, H, D) with one B, H and D, "
            f"D one of {', '.join(map(str, CHANNELS))}"
        )
    for name, angles in (("cos", cos), ("sin", sin)):
        fits = angles.dim() == 4 and angles.shape[0] in (1, samples) and angles.shape[3] in (1, 2)
        if not fits or tuple(angles.shape[1:3]) != (length, channels // 2):
            raise ValueError(
                f"rotary: {name} is {tuple(angles.shape)}; a part of {tuple(x.shape)} needs "
                f"({samples} or 1, {length}, {channels // 2}, 1 or 2)"
            )
    if weight is not None and tuple(weight.shape) != (channels,):
        raise ValueError(f"rotary: weight is {tuple(weight.shape)}; it needs ({channels},)")
    wanted: dict[str, tuple[Tensor, tuple[torch.dtype, ...]]]
    wanted = {"a part": (x, (dtype,)), "cos": (cos, (torch.float32,)), "sin": (sin, (torch.float32,))}
    if weight is not None:
        wanted["weight"] = weight, (dtype, torch.float32)
    for name, (tensor, dtypes) in wanted.items():
        if tensor.dtype not in dtypes or tensor.get_device() != device:
            raise TypeError(
                f"rotary: {name} is {tensor.dtype} on {tensor.device}; it needs "
                f"{' or '.join(map(str, dtypes))} on cuda:{device}"
            )
