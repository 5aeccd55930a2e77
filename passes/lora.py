"""The user's LoRA adapters, joined with the compensating branch of a sparse layer.

    s = sparsify("identity", [x], lora_down=D)              s = sparsify("identity", [x], lora_down=[D; A])
    y = sparse_linear(*s, W, lora_up=U)             →       y = sparse_linear(*s, W, lora_up=[U  scale·B])
    y = y + linear(linear(x, A), B) * scale

Any number of adapters. The scale is a number or, under hot-swapping, a tensor of one element; casts around
the adapter (PEFT keeps it in fp32) end in the layer's dtype; ranks are padded with zeros to a multiple of 16.
The factors stay inputs of the graph, so loading other values into them needs no compilation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from .graph import (
    CASTS,
    arg,
    insert,
    interior,
    kind,
    operands,
    order,
    real_users,
    same_shape,
    scalar,
    skip_row_views,
    tensor,
)
from .mutation import Mutations, remove_dead
from .site import Site, arrange_branches, padded_branch, runs_together, sites


class _Adapter(NamedTuple):
    x: fx.Node
    down: fx.Node
    up: fx.Node
    scales: tuple[Any, ...]


def join_lora(graph: fx.Graph) -> int:
    """Run the pass; returns the number of adapters joined."""
    mutations, position = Mutations(graph), order(graph)
    changed: dict[fx.Node, None] = {}
    count = 0
    for site in sites(graph):
        while _join(site, mutations, position):
            changed[site.sparsify] = None
            count += 1
    for sparsify in changed:
        arrange_branches(sparsify)
    if count:
        remove_dead(graph)
    return count


def _join(site: Site, mutations: Mutations, position: dict[fx.Node, int]) -> bool:
    """Join the adapter that is added to the layer's output, if there is one."""
    total = _only_sum(site)
    if total is None or any(name in site.y.kwargs for name in ("activation", "gate", "residual")):
        return False
    found = None
    for base, term in operands(total):
        if _skip_casts(base) is site.out and isinstance(term, fx.Node):
            found = found or _match_adapter(term)
    if found is None or not _reads_the_same(found, total, site, mutations, position):
        return False
    result = _cast_back(total, site)
    if result is None:
        return False
    dtype = tensor(site.out).dtype  # type: ignore[union-attr]
    if not site.absorb(result, mutations):
        return False
    up = found.up
    for scale in found.scales:
        up = insert(site.y, torch.mul, (up, scale), site.y)
    branch = padded_branch(found.down, up, site.sparsify, site.y, dtype, own=False)
    site.note.branches.append(branch)
    shift = site.sparsify.kwargs.get("shift")
    if shift is not None:  # the adapter reads x, but t is made from z = x − μ
        constant = insert(
            site.y, torch.mv, (branch.up, insert(site.y, torch.mv, (branch.down, shift), site.y)), site.y
        )
        bias = site.y.kwargs.get("bias")
        bias = constant if bias is None else insert(site.y, torch.add, (bias, constant), site.y)
        site.y.kwargs = {**site.y.kwargs, "bias": bias}
    return True


def _only_sum(site: Site) -> fx.Node | None:
    """The sum that alone reads the layer's output, perhaps behind a cast."""
    node = site.out
    while True:
        readers = real_users(node)
        if len(readers) != 1 or len(node.users) != 1:
            return None
        node = readers[0]
        if kind(node) == "add" and arg(node, "alpha", 1) == 1:
            return node
        if kind(node) not in CASTS:
            return None


def _cast_back(total: fx.Node, site: Site) -> fx.Node | None:
    """The node that carries the sum in the dtype and shape of the layer's output."""
    wanted = tensor(site.out)
    node = total
    while True:
        found = tensor(node)
        if wanted is None or found is None or not same_shape(found.shape, wanted.shape):
            return None
        if found.dtype == wanted.dtype:
            return node
        readers = list(node.users)
        adds_on = len(readers) == 1 and kind(readers[0]) in CASTS
        if not adds_on:
            return None
        node = readers[0]


def _match_adapter(term: fx.Node) -> _Adapter | None:
    """linear(linear(x, A), B), times any number of scales, with casts and identity dropout between."""
    scales: list[Any] = []
    node = _skip_casts(term)
    while kind(node) == "mul":
        for inner, scale in operands(node):
            example = tensor(scale)
            one = example is not None and example.numel() == 1 and example.dim() <= 1
            if isinstance(inner, fx.Node) and (scalar(scale) is not None or one or _is_symbol(scale)):
                scales.append(scale)
                node = _skip_casts(inner)
                break
        else:
            return None
    if kind(node) != "linear" or arg(node, "bias") is not None:
        return None
    first = _skip_casts(arg(node, "input"))
    if kind(first) != "linear" or arg(first, "bias") is not None or len(real_users(first)) != 1:
        return None
    down, up = arg(first, "weight"), arg(node, "weight")
    a, b = tensor(down), tensor(up)
    if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        return None
    if not a.is_floating_point() or not b.is_floating_point():
        return None
    return _Adapter(arg(first, "input"), down, up, tuple(scales))


def _is_symbol(scale: Any) -> bool:
    return isinstance(scale, fx.Node) and isinstance(
        scale.meta.get("example_value"), (torch.SymFloat, torch.SymInt, float)
    )


def _reads_the_same(
    adapter: _Adapter, total: fx.Node, site: Site, mutations: Mutations, position: dict[fx.Node, int]
) -> bool:
    """Whether the adapter reads the X of the layer, unchanged, and its factors are there where t is made."""
    inputs: Any = site.sparsify.args[1]
    if site.sparsify.args[0] != "identity":
        return False
    x = skip_row_views(_skip_casts(adapter.x))
    if x is not skip_row_views(_skip_casts(inputs[0])):
        return False
    here = site.sparsify
    if runs_together(here):  # those layers' columns of t are settled
        return False
    if position.get(adapter.down, len(position)) > position.get(here, -1):
        return False
    scales = [scale for scale in adapter.scales if isinstance(scale, fx.Node)]
    inside = interior(total, [site.out, x, adapter.x, adapter.down, adapter.up, *scales])
    return not mutations.reach(inside, total) and not mutations.reach(inside, here)


def _skip_casts(node: Any) -> Any:
    """The tensor behind casts among floating dtypes: an adapter is computed in the layer's dtype."""
    while kind(node) in CASTS:
        source = arg(node, "input")
        inner, outer = tensor(source), tensor(node)
        if inner is None or outer is None or not inner.is_floating_point() or not outer.is_floating_point():
            break
        node = source
    return node
