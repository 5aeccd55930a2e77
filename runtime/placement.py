"""`sparse_linear` into a part of a larger matrix: beside `left`, below `top` or above `bottom`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import layout
from .calls import Call, Launch
from .operands import ALIGNMENT

_WIDE = torch.complex128


def prepare(
    prepare_gemm: Callable[..., Call],
    layer: Sequence[Any],
    left: Tensor | None,
    top: Tensor | None,
    bottom: Tensor | None,
) -> Call | None:
    """The call that writes y to its place in the whole; `fill` adds the rest. None where no kernel can.

    layer: checked arguments of `prepare_gemm`.
    """
    values, metadata, scale, t, weight, lora_up, bias, activation, gate, residual = layer
    (m, _), n, k = values.shape, weight.shape[0], weight.shape[1]
    device, dtype = values.get_device(), values.dtype
    if left is not None:
        width = left.shape[-1]
        if width * dtype.itemsize % ALIGNMENT:
            return None
        call = prepare_gemm(*layer, y_stride=width + n)
        return Call(device, [((m, width + n), dtype)], _moved(call, width * dtype.itemsize), call.copies)
    other = top if bottom is None else bottom
    assert other is not None
    samples, apart, _ = other.shape
    rows, above = m // samples, apart if bottom is None else 0
    if gate is not None or residual is not None or (samples > 1 and rows % layout.BLOCK_ROWS):
        return None
    if bias is not None and bias.numel() not in (n, samples * n):
        return None
    whole = [((samples * (apart + rows), n), dtype)]
    blocks = metadata.view(-1, k // layout.BLOCK_COLUMNS, layout.WORDS).split(-(-rows // layout.BLOCK_ROWS))
    biases = [bias] * samples if bias is None or bias.numel() == n else bias.reshape(samples, n).unbind(0)
    parts = zip(values.split(rows), blocks, scale.split(rows), t.split(rows), biases, strict=True)
    launches: list[Launch] = []
    for sample, (*compressed, part_t, part_bias) in enumerate(parts):
        call = prepare_gemm(*compressed, part_t, weight, lora_up, part_bias, activation, None, None)
        offset = (sample * (apart + rows) + above) * n * dtype.itemsize
        launches += _moved(call, offset)
    return Call(device, whole, launches)


def fill(y: Tensor, left: Tensor | None, top: Tensor | None, bottom: Tensor | None) -> Tensor:
    """y with `left`, `top` or `bottom` in its place; y itself without any."""
    if left is not None:
        width = left.shape[-1]
        _copy(y[:, :width], left.reshape(y.shape[0], width))
    elif top is not None:
        _copy(y.unflatten(0, (top.shape[0], -1))[:, : top.shape[1]], top)
    elif bottom is not None:
        whole = y.unflatten(0, (bottom.shape[0], -1))
        _copy(whole[:, whole.shape[1] - bottom.shape[1] :], bottom)
    return y


def _copy(to: Tensor, source: Tensor) -> None:
    """to.copy_(source), in elements of 16 bytes: torch copies what has gaps element by element."""
    if _is_wide(to) and _is_wide(source):
        to, source = to.view(_WIDE), source.view(_WIDE)
    to.copy_(source)


def _is_wide(part: Tensor) -> bool:
    """Whether rows are whole numbers of such elements, at addresses where they may lie."""
    *gaps, step = part.stride()
    steps = (part.shape[-1], *gaps, part.storage_offset())
    aligned = not any(size * part.element_size() % _WIDE.itemsize for size in steps)
    return aligned and step == 1 and part.data_ptr() % _WIDE.itemsize == 0


def _moved(call: Call, offset: int) -> list[Launch]:
    """The call's launches with their one output `offset` bytes into another."""
    return [launch._replace(outputs=_after(launch.outputs, offset)) for launch in call.launches]


def _after(encode: Callable[..., bytes], offset: int) -> Callable[..., bytes]:
    return lambda address: encode(address + offset)
