"""What follows a sparse linear layer, folded into `sparse_linear`.

    y = sparse_linear(*s, W)                       y = sparse_linear(*s, W, bias=b)
    y = y + b

    y = sparse_linear(*s, W, bias=b)               y = sparse_linear(*s, W, bias=b, activation="gelu")
    h = gelu(y)                            →

    y = sparse_linear(*s, W, bias=b)               h = sparse_linear(*s, W, bias=b,
    h = x + gate[:, None] * y                                        gate=gate, residual=x)

Runs after the passes that fold an activation into the *next* `sparsify`, which is the better place. A gate is
one row a sample; a residual has y's shape. All in y's dtype: a wider operand is left to the compiler.

    y = sparse_linear(*s, W)                       h = sparse_linear(*s, W, left=x)
    h = cat([x, y], -1)                    →

    y = sparse_linear(*s, W)                       h = sparse_linear(*s, W, top=x)
    h = cat([x, y], 1)                     →

    y = sparse_linear(*s, W)                       h = sparse_linear(*s, W, bottom=x)
    h = cat([y, x], 1)                     →

The layer writes its part of what is concatenated, and only x is copied, unless the run time chooses to run it
dense. (A concatenation that a `sparsify` reads was folded there before.)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from .graph import (
    arg,
    insert,
    is_one,
    kind,
    operands,
    order,
    per_sample,
    real_users,
    same_shape,
    same_size,
    tensor,
)
from .mutation import Mutations, remove_dead
from .site import Site, sites, sites_of, some_choose
from .together import hoistable

_COLUMNS = 8  # of 16 bits: what the kernels store at once


def fold_epilogues(graph: fx.Graph) -> int:
    """Run the pass; returns the number of operations folded."""
    mutations = Mutations(graph)
    count = 0
    for site in sites(graph):
        for step in (_bias, _activation, _gated_residual, _gate, _residual, _concatenation):
            count += step(site, mutations)
    if count:
        remove_dead(graph)
    return count


def _only_reader(site: Site) -> fx.Node | None:
    """The one node that reads the layer's output, if it yields the same shape and dtype."""
    readers = real_users(site.out)
    before = tensor(site.out)
    after = tensor(readers[0]) if len(readers) == 1 else None
    if before is None or after is None or len(site.out.users) != 1:
        return None
    same = before.dtype == after.dtype and same_shape(before.shape, after.shape)
    return readers[0] if same else None


def _other_operand(node: fx.Node, one: fx.Node) -> Any:
    """The operand beside `one` of a sum or product, None if it is no tensor or `one` stands on both sides."""
    for a, b in operands(node):
        if a is one:
            return b if isinstance(b, fx.Node) and b is not one and tensor(b) is not None else None
    return None


def _bias(site: Site, mutations: Mutations) -> bool:
    reader = _only_reader(site)
    if (
        reader is None
        or kind(reader) != "add"
        or arg(reader, "alpha", 1) != 1
        or _has(site, "bias", "activation", "gate", "residual")
    ):
        return False
    other = _other_operand(reader, site.out)
    out, bias = tensor(site.out), tensor(other)
    if out is None or bias is None or bias.dtype != out.dtype or not same_shape(bias.shape, out.shape[-1:]):
        return False
    return site.absorb(reader, mutations, bias=other)


def _activation(site: Site, mutations: Mutations) -> bool:
    reader = _only_reader(site)
    if reader is None or _has(site, "activation", "gate", "residual"):
        return False
    if kind(reader) == "gelu":
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(arg(reader, "approximate", "none"), "")
    elif kind(reader) in ("silu", "relu") and not arg(reader, "inplace", False):
        name = kind(reader)
    else:
        return False
    return bool(name) and site.absorb(reader, mutations, activation=name)


def _gated_residual(site: Site, mutations: Mutations) -> bool:
    """addcmul(residual, gate, y)."""
    reader = _only_reader(site)
    if (
        reader is None
        or kind(reader) != "addcmul"
        or arg(reader, "value", 1) != 1
        or _has(site, "gate", "residual")
    ):
        return False
    factors = [arg(reader, "tensor1"), arg(reader, "tensor2")]
    residual = arg(reader, "input")
    if site.out not in factors or factors[0] is factors[1] or residual is site.out:
        return False
    gate = factors[1 - factors.index(site.out)]
    if not _is_gate(gate, site) or not _is_residual(residual, site) or _siblings_choose(site):
        return False
    return site.absorb(reader, mutations, gate=gate, residual=residual)


def _gate(site: Site, mutations: Mutations) -> bool:
    reader = _only_reader(site)
    if reader is None or kind(reader) != "mul" or _has(site, "gate", "residual"):
        return False
    gate = _other_operand(reader, site.out)
    if not _is_gate(gate, site) or _siblings_choose(site):
        return False
    return site.absorb(reader, mutations, gate=gate)


def _residual(site: Site, mutations: Mutations) -> bool:
    reader = _only_reader(site)
    if reader is None or kind(reader) != "add" or arg(reader, "alpha", 1) != 1 or _has(site, "residual"):
        return False
    residual = _other_operand(reader, site.out)
    if not _is_residual(residual, site) or _siblings_choose(site):
        return False
    return site.absorb(reader, mutations, residual=residual)


def _concatenation(site: Site, mutations: Mutations) -> bool:
    """cat([x, y]), along the channels or along the tokens of (samples, tokens, channels)."""
    readers = real_users(site.out)
    if len(readers) != 1 or len(site.out.users) != 1 or kind(readers[0]) != "cat":
        return False
    cat, out = readers[0], tensor(site.out)
    parts = arg(cat, "tensors")
    if len(parts) != 2 or parts[0] is parts[1] or out is None:
        return False
    first = parts[0] is site.out
    beside = parts[1] if first else parts[0]
    other, dims = tensor(beside), out.dim()
    if other is None or not _alike(other, out) or other.dim() != dims:
        return False
    if _siblings_choose(site):
        position = order(cat.graph)
        earliest = min((layer.y for layer in sites_of(site.sparsify)), key=position.__getitem__)
        if not hoistable(beside, earliest, position, mutations):
            return False
    axis = arg(cat, "dim", 0) % dims
    if not all(
        same_size(a, b) for i, (a, b) in enumerate(zip(other.shape, out.shape, strict=True)) if i != axis
    ):
        return False
    sizes: list[Any] = list(site.out.args[1]) if site.out is not site.y else []  # type: ignore[arg-type]
    if axis == dims - 1:
        width = other.shape[-1]
        if first or not isinstance(width, int) or width % _COLUMNS:
            return False
        if sizes:
            sizes[-1] += width
        return site.absorb(cat, mutations, sizes, left=beside)
    if axis != 1 or dims != 3 or _has(site, "gate", "residual"):
        return False
    rows = other.shape[1]
    if not isinstance(rows, int):
        rows = insert(cat, torch.ops.aten.sym_size.int, (beside, 1), cat)
    both = isinstance(rows, int) and isinstance(sizes[1], int)
    sizes[1] = rows + sizes[1] if both else insert(cat, operator.add, (rows, sizes[1]), cat)
    return site.absorb(cat, mutations, sizes, **{"bottom" if first else "top": beside})


def _has(site: Site, *names: str) -> bool:
    return any(name in site.y.kwargs for name in names)


def _is_gate(node: Any, site: Site) -> bool:
    """One row of channels per sample, in y's dtype; one per token would cost more here than behind."""
    gate, out = tensor(node), tensor(site.out)
    if gate is None or out is None or not _alike(gate, out) or not per_sample(gate, out):
        return False
    return gate.dim() < out.dim() or is_one(gate.shape[-2])


def _is_residual(node: Any, site: Site) -> bool:
    residual, out = tensor(node), tensor(site.out)
    if residual is None or out is None or not _alike(residual, out):
        return False
    return same_shape(residual.shape, out.shape)


def _alike(operand: Tensor, out: Tensor) -> bool:
    return operand.dtype == out.dtype and operand.device == out.device


def _siblings_choose(site: Site) -> bool:
    """Layers of one X that choose together at run time cannot wait for each other's output."""
    return len(sites_of(site.sparsify)) > 1 and some_choose(site)
