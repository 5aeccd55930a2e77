"""What follows a sparse linear layer, folded into `sparse_linear`.

    y = sparse_linear(*s, W)                       y = sparse_linear(*s, W, bias=b)
    y = y + b

    y = sparse_linear(*s, W, bias=b)               y = sparse_linear(*s, W, bias=b, activation="gelu")
    h = gelu(y)                            →

    y = sparse_linear(*s, W, bias=b)               h = sparse_linear(*s, W, bias=b,
    h = x + gate[:, None] * y                                        gate=gate, residual=x)

Runs after the passes that fold an activation into the *next* `sparsify`, which is the better place. A gate is
one row a sample; a residual has y's shape. All in y's dtype: a wider operand is left to the compiler.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from .graph import arg, is_one, kind, operands, per_sample, real_users, same_shape, tensor
from .mutation import Mutations, remove_dead
from .site import Site, sites, sites_of


def fold_epilogues(graph: fx.Graph) -> int:
    """Run the pass; returns the number of operations folded."""
    mutations = Mutations(graph)
    count = 0
    for site in sites(graph):
        for step in (_bias, _activation, _gated_residual, _gate, _residual):
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
    return site.note.min_tokens > 1 and len(sites_of(site.sparsify)) > 1
