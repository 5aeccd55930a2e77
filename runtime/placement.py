"""Sparse layers into a part of a larger matrix: beside `left`, below `top` or above `bottom`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import add

import torch
from torch import Tensor

from . import layout
from .calls import Call, Launch
from .operands import ALIGNMENT, Layer

_WIDE = torch.complex128


def possible(
    m: int, besides: Sequence[Tensor | None], sides: Sequence[str], tails: Sequence[Tensor | None]
) -> bool:
    """Whether layers of one X (M, K) can write to their places in one call.

    besides, sides: as in `ops.parts`; checked. tails: gates and residuals, whose rows would have to move too.
    """
    if "left" in sides:
        return len(sides) == 1
    samples = _samples(besides)
    whole = samples == 1 or not m // max(samples, 1) % layout.BLOCK_ROWS
    alike = all(rows is None or rows.shape[0] == samples for rows in besides)
    return whole and alike and all(tail is None for tail in tails)


def prepare(
    prepare_all: Callable[..., Call],
    compressed: Sequence[Tensor],
    layers: Sequence[Layer],
    besides: Sequence[Tensor | None],
    sides: Sequence[str],
) -> Call | None:
    """The call that writes each y to its place in its whole; `fill` adds the rest. None where no kernel can.

    compressed, layers: checked, as `prepare_all` takes them. besides, sides: for which it is `possible`.
    """
    if "left" in sides:
        (left,) = besides
        assert left is not None
        return _beside(prepare_all, compressed, layers[0], left)
    values, metadata, scale = compressed
    (m, half), device, dtype = values.shape, values.get_device(), values.dtype
    samples = _samples(besides)
    rows = m // samples
    widths = [layer.weight.shape[0] for layer in layers]
    vectors = [_each(layer.bias, samples, n) for layer, n in zip(layers, widths, strict=True)]
    if not all(vectors):
        return None
    lengths = [rows if beside is None else rows + beside.shape[1] for beside in besides]
    whole = [((samples * length, n), dtype) for length, n in zip(lengths, widths, strict=True)]
    blocks = metadata.view(-1, 2 * half // layout.BLOCK_COLUMNS, layout.WORDS)
    parts = zip(
        values.split(rows), blocks.split(-(-rows // layout.BLOCK_ROWS)), scale.split(rows), strict=True
    )
    launches: list[Launch] = []
    for sample, part in enumerate(parts):
        own = slice(sample * rows, (sample + 1) * rows)
        offsets, of_sample = [], []
        for layer, biases, side, length, n in zip(layers, vectors, sides, lengths, widths, strict=True):
            above = length - rows if side == "top" else 0
            offsets.append((sample * length + above) * n * dtype.itemsize)
            of_sample.append(layer._replace(t=layer.t[own], bias=biases[sample]))
        launches += _moved(prepare_all(*part, of_sample), offsets)
    return Call(device, whole, launches)


def _samples(besides: Sequence[Tensor | None]) -> int:
    """To how many samples the rows belong that stand above or below the layers' own."""
    return next((rows.shape[0] for rows in besides if rows is not None), 1)


def _beside(
    prepare_all: Callable[..., Call], compressed: Sequence[Tensor], layer: Layer, left: Tensor
) -> Call | None:
    values, width, n = compressed[0], left.shape[-1], layer.weight.shape[0]
    m, dtype = values.shape[0], values.dtype
    if width * dtype.itemsize % ALIGNMENT:
        return None
    call = prepare_all(*compressed, [layer], y_stride=width + n)
    launches = _moved(call, [width * dtype.itemsize])
    return Call(values.get_device(), [((m, width + n), dtype)], launches, call.copies)


def _each(bias: Tensor | None, samples: int, n: int) -> Sequence[Tensor | None]:
    """The bias of each sample; empty where it has other samples."""
    if bias is None or bias.numel() == n:
        return [bias] * samples
    return bias.reshape(samples, n).unbind(0) if bias.numel() == samples * n else []


def fill(y: Tensor, beside: Tensor | None, side: str) -> Tensor:
    """y with `beside` in its place on that side; y itself without one."""
    if beside is None:
        return y
    if side == "left":
        width = beside.shape[-1]
        _copy(y[:, :width], beside.reshape(y.shape[0], width))
        return y
    whole, apart = y.unflatten(0, (beside.shape[0], -1)), beside.shape[1]
    _copy(whole[:, :apart] if side == "top" else whole[:, whole.shape[1] - apart :], beside)
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


def _moved(call: Call, offsets: Sequence[int]) -> list[Launch]:
    """The call's launches with each of its outputs so many bytes into another."""
    return [launch._replace(outputs=_after(launch.outputs, offsets)) for launch in call.launches]


def _after(encode: Callable[..., bytes], offsets: Sequence[int]) -> Callable[..., bytes]:
    return lambda *addresses: encode(*map(add, addresses, offsets))
