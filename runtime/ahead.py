"""Kernels compiled ahead: what a graph will launch, before it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from . import (
    build,
    gemm_mma,
    gemm_sm90,
    kernels,
    launch,
    layout,
    operands,
    ops,
    residual_norm,
    residual_norm_kernel,
    rotary,
    rotary_kernel,
    sparsify_kernel,
)

_OPS = (
    *(ops.sparsify, ops.sparse_linear, ops.sparse_linears, ops.linears),
    *(rotary.rotary, residual_norm.residual_norm),
)


def prepare(graph: fx.Graph, tensor_of: Callable[[fx.Node], Tensor | None]) -> list[Future[bytes]]:
    """Start compiling what the ops in `graph` will launch, in the background.

    tensor_of: what is known of a node's value, e.g. its fake tensor. Symbolic sizes count as their hints.
    Nothing depends on this: a kernel that is missed, or that another size needs, is compiled when it is used.
    """
    units: list[build.Unit] = []
    sparsified: dict[fx.Node, _Size] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _OPS:
            continue
        args, options = fx.map_arg((node.args, node.kwargs), tensor_of)
        if node.target is rotary.rotary:
            units += _rotary_units(*args)
            continue
        if node.target is residual_norm.residual_norm:
            units += _residual_norm_units(*args[:3])
            continue
        if node.target is ops.sparse_linear:
            size = sparsified.get(node.args[0].args[0])  # values are item 0 of what sparsify returns
            if size is not None:
                up, bias, gate, residual = (options.get(n) for n in ("lora_up", "bias", "gate", "residual"))
                activation = options.get("activation", "none")
                layer = operands.Layer(args[3], args[4], up, bias, activation, gate, residual)
                units += _gemm_units(size, [layer], [options.get(side) for side in ops.SIDES], ops.SIDES)
            continue
        if node.target is ops.sparse_linears:
            size = sparsified.get(node.args[0].args[0])
            if size is not None:
                layers = [operands.Layer(*layer) for layer in zip(*args[3:10], strict=True)]
                units += _gemm_units(size, layers, args[10], args[11])
            continue
        producer, inputs = args[:2]
        size = _size(producer, inputs)
        if size is None:
            continue
        sparsified[node] = size
        tensors = {name: options.get(name) for name in ("shift", "score", "lora_down")}
        deflated = options.get("deflated", 0)
        found = sparsify_kernel.kernels_for(
            producer, inputs, size.m, size.k, size.device, **tensors, deflated=deflated
        )
        units += [kernel.unit(size.arch) for kernel in found]
        if node.target is ops.linears:
            names = "lora_ups", "biases", "activations", "gates", "residuals"
            lists = zip(args[2], args[2], *(options[name] for name in names), strict=True)
            layers = [operands.Layer(*layer) for layer in lists]
            units += _gemm_units(size, layers, options["besides"], options["sides"])
    return build.prebuild(units)


class _Size(NamedTuple):
    """X (m, k), its dtype and where it is."""

    m: int
    k: int
    dtype: torch.dtype
    device: int
    arch: str


def _size(producer: str, inputs: Sequence[Tensor | None]) -> _Size | None:
    """The size of a producer's output; None when it is not known or has no kernels."""
    needed = inputs[: 2 if producer.startswith("cat") else 1]
    first = inputs[0]
    if first is None or any(t is None for t in needed) or first.device.type != "cuda":
        return None
    index = torch.cuda.current_device() if first.device.index is None else first.device.index
    if kernels.unavailable_reason(torch.device("cuda", index), first.dtype) is not None:
        return None
    m, k = map(_hint, ops.producer_shape(producer, inputs))
    return _Size(m, k, first.dtype, index, build.arch_of(torch.cuda.get_device_capability(index)))


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _gemm_units(
    size: _Size, layers: Sequence[operands.Layer], besides: Sequence[Tensor | None], sides: Sequence[str]
) -> list[build.Unit]:
    """What the layers of one X launch. Their tensors may be fake: only sizes are read.

    besides: on these sides of them. Rows above or below give each sample a launch of its own (`placement`).
    """
    units = []
    rows_beside = [
        rows for rows, side in zip(besides, sides, strict=True) if rows is not None and side != "left"
    ]
    apart = max((_hint(rows.shape[0]) for rows in rows_beside), default=1)
    tails = any(layer.gate is not None or layer.residual is not None for layer in layers)
    m = size.m
    if apart > 1 and not tails and not m // apart % layout.BLOCK_ROWS:
        m //= apart
    hopper = kernels.is_hopper(size.device)
    known = [layer for layer in layers if layer.weight is not None]
    for group in gemm_sm90.groups(known) if hopper else [[i] for i in range(len(known))]:
        widths = tuple(_hint(known[i].weight.shape[0]) for i in group)
        first = known[group[0]]
        tail = first.gate is not None or first.residual is not None
        vectors = [(known[i].bias, n) for i, n in zip(group, widths, strict=True)] + [(first.gate, widths[0])]
        samples = (operands.samples(vector, n) for vector, n in vectors)
        rows = min([m, *(size.m // max(_hint(count), 1) for count in samples)])
        variant: Any = widths if hopper else widths[0]
        kernel_for = gemm_sm90.kernel_for if hopper else gemm_mma.kernel_for
        kernel = kernel_for(size.device, size.dtype, m, variant, size.k, first.activation, tail, rows)
        units.append(kernel.unit(size.arch))
    return units


def _rotary_units(
    parts: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    eps: Sequence[float | None],
    *tables: Any,
) -> list[build.Unit]:
    size = _size("identity", parts)
    if size is None or any(part is None for part in parts):
        return []
    pair = 2 if tables[0][0] is None else tables[0][0].shape[3]
    found = {
        rotary_kernel.kernel(
            size.dtype,
            size.k,
            e is None or e >= 0,  # dynamic=True makes a symbol of a number that is a module's attribute
            None if w is None else w.dtype,
            pair,
            launch.overlaps(size.device),
        )
        for w, e in zip(weights, eps, strict=True)
    }
    return [kernel.unit(size.arch) for kernel in found]


def _residual_norm_units(x: Tensor | None, weight: Tensor | None, mult: Tensor | None) -> list[build.Unit]:
    size = _size("identity", [x])
    if size is None:
        return []
    types = (None if vector is None else vector.dtype for vector in (weight, mult))
    overlap = launch.overlaps(size.device)
    return [residual_norm_kernel.kernel(size.dtype, size.k, *types, overlap).unit(size.arch)]
