"""Layers of one X in one call, which the GPU works off as one product.

    q = sparse_linear(*s, W, bias=b)                   q, k, v = sparse_linears(*s[:3], [t, t, t], [W, V, U],
    k = sparse_linear(*s, V, bias=c)            →                               biases=[b, c, d], …)
    v = sparse_linear(*s, U, bias=d)

As good as one wide weight, without a second copy of it: no part of the chip waits at the end of each layer.
A layer that needs something else first (a gate, a residual, columns beside it) runs where it did; one that
writes its rows above or below others takes those along. No more at once than one launch takes: what else
reads X, of another block perhaps, would only hold its output early. Runs last.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..runtime import ops
from ..runtime.gemm_sm90 import LAYERS
from .graph import CASTS, getitem, insert, kind, order, replace, same_size, tensor
from .mutation import Mutations, is_fresh, remove_dead
from .site import META, Site, besides_of, sites_of

_OF_A_LAYER = ("lora_up", "bias")  # what the layers of a group may have, beside an activation
_SPARSE = (ops.sparsify, ops.sparse_linear, ops.sparse_linears, ops.linears)


def run_together(graph: fx.Graph) -> int:
    """Run the pass; returns the number of layers that run with others."""
    mutations = Mutations(graph)
    count = 0
    for sparsify in [node for node in graph.nodes if node.target is ops.sparsify]:
        position = order(graph)
        layers = sorted(sites_of(sparsify), key=lambda site: position[site.y])
        waiting = [
            site for site in layers if set(site.y.kwargs) <= {*_OF_A_LAYER, *ops.SIDES[1:], "activation"}
        ]
        while len(waiting) > 1:
            group, waiting = waiting[:1], waiting[1:]
            for site in list(waiting):
                alike = len(group) < LAYERS and _same_samples(site, group)
                if alike and _moves(site, group[0].y, position, mutations):
                    group.append(site)
                    waiting.remove(site)
            if len(group) > 1:
                _rewrite(group, mutations)
                count += len(group)
                position = order(graph)
    if count:
        remove_dead(graph)
    return count


def _moves(site: Site, before: fx.Node, position: dict[fx.Node, int], mutations: Mutations) -> bool:
    """Whether all that a layer reads is, or can be made, ready `before` another."""
    reads = site.y.all_input_nodes
    if any(mutations.between(read, before, site.y) for read in reads):
        return False
    return all(hoist(read, before, position, mutations) for read in reads)


def _same_samples(site: Site, group: list[Site]) -> bool:
    """Whether the rows beside a layer belong to as many samples as those beside the others."""
    given = [tensor(one.y.kwargs[one.side]) for one in (*group, site) if one.side]
    counts = [None if rows is None else rows.shape[0] for rows in given]
    return all(count is not None and same_size(count, counts[0]) for count in counts)


def _rewrite(group: list[Site], mutations: Mutations) -> None:
    first = group[0].y
    lists = {name: [site.y.kwargs.get(name) for site in group] for name in _OF_A_LAYER}
    activations = [site.y.kwargs.get("activation", "none") for site in group]
    none = [None] * len(group)
    ts, weights = ([site.y.args[i] for site in group] for i in (3, 4))
    outputs = insert(
        first,
        ops.sparse_linears,
        (
            *first.args[:3],
            ts,
            weights,
            lists["lora_up"],
            lists["bias"],
            activations,
            none,
            none,
            *besides_of(group),
        ),
        first,
    )
    outputs.meta[META] = [site.note for site in group]
    outputs_of = [getitem(outputs, index, first) for index in range(len(group))]
    for site, output in zip(group, outputs_of, strict=True):
        mutations.stand_in(output, site.y)
        replace(site.y, output)


def hoist(node: Any, before: fx.Node, position: dict[fx.Node, int], mutations: Mutations) -> bool:
    """Move what computes an operand (its factors, what stands beside it) in front of `before`.

    False, and everything where it was, if that could change a value.
    """
    if not hoistable(node, before, position, mutations):
        return False
    _move(node, before, position)
    return True


def hoistable(node: Any, before: fx.Node, position: dict[fx.Node, int], mutations: Mutations) -> bool:
    """Whether `hoist` can."""
    if node not in position or position[node] < position[before]:
        return True
    pure = node.op == "get_attr" or is_fresh(node) or kind(node) in CASTS or kind(node) == "narrow"
    if not pure or node.target in _SPARSE or mutations.reach([node], before):
        return False
    return all(hoistable(source, before, position, mutations) for source in node.all_input_nodes)


def _move(node: Any, before: fx.Node, position: dict[fx.Node, int]) -> None:
    if node in position and position[node] > position[before]:
        for source in node.all_input_nodes:
            _move(source, before, position)
        before.prepend(node)
        position[node] = position[before] - 1
