"""Dense or sparse by the number of tokens, where that is known only at run time.

    s = sparsify("layer_norm", inputs, …)                 q, k = linears("layer_norm", inputs, [W, V],
    q = sparse_linear(*s, W, bias=b)             →                       min_tokens=…, biases=[b, c], …)
    k = sparse_linear(*s, V, bias=c)

One graph then serves every resolution without a guard on it. Layers with a known M, or with an M that is
always large enough, keep the two ops. Runs near the end.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..runtime import ops
from .graph import getitem, insert, order, replace
from .mutation import Mutations, remove_dead
from .site import META, Site, besides_of, sites_of
from .together import hoist


def choose_at_run_time(graph: fx.Graph) -> int:
    """Run the pass; returns the number of layers that choose at run time."""
    mutations = Mutations(graph)
    count = 0
    for sparsify in [node for node in graph.nodes if node.target is ops.sparsify]:
        layers = sites_of(sparsify)
        if layers and max(site.note.min_tokens for site in layers) > 1:
            count += _rewrite(layers, mutations)
    if count:
        remove_dead(graph)
    return count


def _rewrite(layers: list[Site], mutations: Mutations) -> int:
    """One op for all layers, but for those whose operands are ready too late, which get one of their own."""
    sparsify, count = layers[0].sparsify, 0
    min_tokens = max(site.note.min_tokens for site in layers)
    position = order(sparsify.graph)
    waiting = sorted(layers, key=lambda site: position[site.y])
    while waiting:
        (first, *others), waiting = waiting, []
        if any(mutations.between(read, sparsify, first.y) for read in sparsify.all_input_nodes):
            waiting = others
            continue
        group = [first]
        for site in others:
            (group if _joins(site, first.y, position, mutations) else waiting).append(site)
        _choose(group, min_tokens, mutations)
        count += len(group)
        position = order(sparsify.graph)
    return count


def _joins(site: Site, first: fx.Node, position: dict[fx.Node, int], mutations: Mutations) -> bool:
    """Whether all that a layer reads, dense or sparse, is or can be made ready before another."""
    operands = [node for node in _operands(site) if node is not None]
    if any(mutations.between(node, first, site.y) for node in operands):
        return False
    return all(hoist(node, first, position, mutations) for node in operands)


def _choose(layers: list[Site], min_tokens: int, mutations: Mutations) -> None:
    sparsify, first = layers[0].sparsify, layers[0].y
    columns: list[int] = []
    for index, site in enumerate(layers):
        for branch in site.note.branches:
            columns += [index, *sparsify.meta[META][branch.down], int(branch.own)]
    producer, inputs = sparsify.args
    names = ("bias", "lora_up", "gate", "residual")
    lists = {name: [site.y.kwargs.get(name) for site in layers] for name in names}
    besides, sides = besides_of(layers)
    outputs = insert(
        first,
        ops.linears,
        (producer, inputs, [site.y.args[4] for site in layers], min_tokens),
        sparsify,
        **sparsify.kwargs,
        biases=lists["bias"],
        dense_biases=[_dense_bias(site) for site in layers],
        lora_ups=lists["lora_up"],
        columns=columns,
        activations=[site.y.kwargs.get("activation", "none") for site in layers],
        gates=lists["gate"],
        residuals=lists["residual"],
        besides=besides,
        sides=sides,
    )
    outputs.meta[META] = [site.note for site in layers]
    outputs_of = [getitem(outputs, index, first) for index in range(len(layers))]
    for site, output in zip(layers, outputs_of, strict=True):
        mutations.stand_in(output, site.y)
        replace(site.y, output)


def _operands(site: Site) -> list[Any]:
    names = ("bias", "lora_up", "gate", "residual", *ops.SIDES)
    return [site.y.args[4], *(site.y.kwargs.get(name) for name in names), _dense_bias(site)]


def _dense_bias(site: Site) -> fx.Node | None:
    bias: Any = site.y.kwargs.get("bias")
    return site.note.dense_bias if site.note.folded else bias
