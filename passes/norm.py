"""Layer norm or RMS norm with adaLN modulation in front of linear layers, folded into `sparsify`.

    n = layer_norm(x, (K,), weight, bias, eps)
    h = n * (1 + scale[:, None]) + shift[:, None]       s = sparsify("layer_norm",
    s = sparsify("identity", [h])              →             [x, weight, bias, scale, shift],
    q = sparse_linear(*s, …)                                 eps=eps, mult_offset=1)
    k = sparse_linear(*s, …)                            q, k = sparse_linear(*s, …), sparse_linear(*s, …)

Every part behind the norm may be absent. RMS norm is also recognised spelled out, x · rsqrt(mean(x²) + eps),
and both in fp32 with a cast back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..runtime.semantics import compute_dtype
from .graph import arg, kind, operands, per_sample, same_shape, scalar, skip_casts, tensor
from .producer import Producer, fold, skip_cast_of_result

_SLOTS = ("weight", "bias", "mult", "add")  # in the order they apply


def fold_norms(graph: fx.Graph) -> int:
    """Run the pass; returns the number of norms folded."""
    return fold(graph, match_norm)


def match_norm(x: fx.Node) -> Producer | None:
    """((norm(h) · weight + bias) · (mult + offset)) + add, with any of them absent."""
    out = tensor(x)
    return None if out is None else _peel(x, out, [])


def _peel(node: fx.Node, out: Tensor, affine: list[tuple[str, fx.Node]]) -> Producer | None:
    """Follow sums and products inwards to the norm. affine: ("mul" | "add", operand), outermost first."""
    core = skip_cast_of_result(node)
    norm = _norm(core)
    if norm is not None:
        return _assemble(norm, affine, out)
    if kind(core) not in ("mul", "add") or len(affine) == len(_SLOTS):
        return None
    if kind(core) == "add" and arg(core, "alpha", 1) != 1:
        return None
    for main, operand in operands(core):
        inner, other = tensor(main), tensor(operand)
        if inner is None or other is None or not same_shape(inner.shape, out.shape):
            continue
        producer = _peel(main, out, [*affine, (kind(core), operand)]) if per_sample(other, out) else None
        if producer is not None:
            return producer
    return None


class _Norm(NamedTuple):
    name: str
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float


def _norm(node: fx.Node) -> _Norm | None:
    """A norm over the last dimension, as one op or spelled out."""
    if kind(node) not in ("layer_norm", "rms_norm"):
        return _rms_norm_spelled_out(node)
    source, shape, eps = arg(node, "input"), arg(node, "normalized_shape"), arg(node, "eps")
    example = tensor(source)
    if example is None or not isinstance(shape, (list, tuple)) or len(shape) != 1:
        return None
    if kind(node) == "layer_norm":
        eps = 1e-5 if eps is None else eps
        bias = arg(node, "bias")
    else:
        eps = torch.finfo(compute_dtype(example.dtype)).eps if eps is None else eps
        bias = None
    weight = arg(node, "weight")
    weight, bias = (None if vector is None else skip_casts(vector) for vector in (weight, bias))
    return _Norm(kind(node), skip_casts(source), weight, bias, eps)


def _rms_norm_spelled_out(node: fx.Node) -> _Norm | None:
    """x · rsqrt(mean(x²) + eps)."""
    if kind(node) != "mul":
        return None
    for scaled, factor in operands(node):
        if kind(factor) != "rsqrt" or not isinstance(scaled, fx.Node):
            continue
        shifted = arg(factor, "input")
        if kind(shifted) != "add" or arg(shifted, "alpha", 1) != 1:
            continue
        for variance, constant in operands(shifted):
            eps, squared = scalar(constant), _mean_of_square(variance)
            if eps is None or squared is None:
                continue
            source = skip_casts(squared)
            if source is skip_casts(scaled):
                return _Norm("rms_norm", source, None, None, eps)
    return None


def _mean_of_square(variance: Any) -> fx.Node | None:
    """x of mean(x², -1, keepdim=True)."""
    if kind(variance) != "mean" or arg(variance, "keepdim", False) is not True:
        return None
    square, dim = arg(variance, "input"), arg(variance, "dim")
    example = tensor(square)
    dims = tuple(dim) if isinstance(dim, (list, tuple)) else (dim,)
    if example is None or len(dims) != 1 or dims[0] not in (-1, example.dim() - 1):
        return None
    if kind(square) == "square" or (kind(square) == "pow" and scalar(arg(square, "exponent")) == 2.0):
        return arg(square, "input")
    if kind(square) == "mul" and arg(square, "input") is arg(square, "other"):
        return arg(square, "input")
    return None


def _assemble(norm: _Norm, affine: list[tuple[str, fx.Node]], out: Tensor) -> Producer | None:
    """Put each factor and summand into the first slot that is free, in the order they apply."""
    slots: dict[str, fx.Node | None] = {"weight": norm.weight, "bias": norm.bias, "mult": None, "add": None}
    example = tensor(norm.x)
    if example is None or not same_shape(example.shape, out.shape):
        return None
    next_slot = 2 if norm.bias is not None else 1 if norm.weight is not None else 0
    offset = 0.0
    for what, operand in reversed(affine):
        operand = skip_casts(operand)
        shape = tensor(operand)
        vector = shape is not None and shape.dim() == 1 and same_shape(shape.shape, out.shape[-1:])
        late, early = ("mult", "weight") if what == "mul" else ("add", "bias")
        slot = early if vector and _SLOTS.index(early) >= next_slot else late
        if _SLOTS.index(slot) < next_slot:
            return None
        next_slot = _SLOTS.index(slot) + 1
        if slot == "mult":
            operand, offset = _without_offset(operand)
        slots[slot] = operand
    inputs = (norm.x, *(slots[name] for name in _SLOTS))
    return Producer(norm.name, inputs, norm.eps, offset)


def _without_offset(mult: fx.Node) -> tuple[fx.Node, float]:
    """(scale, 1.0) for 1 + scale, also behind views that add dimensions; (mult, 0.0) for anything else."""
    node = mult
    while kind(node) in ("unsqueeze", "squeeze") or _adds_dimensions(node):
        node = arg(node, "input")
    node = skip_casts(node)
    if kind(node) not in ("add", "radd") or (kind(node) == "add" and arg(node, "alpha", 1) != 1):
        return mult, 0.0
    for scale, constant in operands(node):
        offset, before, after = scalar(constant), tensor(scale), tensor(node)
        if offset is not None and before is not None and after is not None and before.dtype == after.dtype:
            return skip_casts(scale), offset
    return mult, 0.0


def _adds_dimensions(node: fx.Node) -> bool:
    """t[:, None] and its like: every element once, in the same order."""
    if kind(node) != "getitem" or tensor(arg(node, "input")) is None:
        return False
    index = arg(node, "index")
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None) for part in parts)
