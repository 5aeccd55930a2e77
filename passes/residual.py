"""RMS norm and gate behind a block's attention or MLP, and the residual they are added to, in one pass.

    n = rms_norm(y, weight, eps)                  h = residual_norm(y, weight, gate, x, eps)
    h = x + gate[:, None] * n              →

The norm may be spelled out and the gate absent, and y come from anything. The compiler's own kernel reads y
twice, for the norm and for the product, and computes the gate anew for each token.
"""

from __future__ import annotations

from torch import fx

from ..runtime import kernels
from ..runtime.residual_norm import CHANNELS, residual_norm
from .graph import arg, insert, interior, kind, operands, replace, same_shape, tensor
from .mutation import Mutations, remove_dead
from .norm import match_norm
from .producer import Producer, recognise


def fold_residual_norms(graph: fx.Graph) -> int:
    """Run the pass; returns the number of residual sums folded."""
    mutations = Mutations(graph)
    count = 0
    for node in list(graph.nodes):
        found = _match(node)
        if found is None:
            continue
        producer, normed, residual = found
        inside = [node, *interior(normed, producer.inputs)]
        reads = [read for read in (*producer.inputs, residual) if read is not None]
        read_elsewhere = any(user not in inside for inner in inside[1:] for user in inner.users)
        outdated = mutations.reach(inside, node) or any(mutations.between(r, r, node) for r in reads)
        if read_elsewhere or outdated:
            continue
        x, weight, _, mult, _ = producer.inputs
        new = insert(
            node, residual_norm, (x, weight, mult, residual, producer.eps, producer.mult_offset), node
        )
        mutations.stand_in(new, node)
        replace(node, new)
        count += 1
    if count:
        remove_dead(graph)
    return count


def _match(node: fx.Node) -> tuple[Producer, fx.Node, fx.Node] | None:
    """(norm, its node, residual) of the sum that `node` is."""
    out = tensor(node)
    if kind(node) != "add" or out is None or arg(node, "alpha", 1) != 1 or out.dim() < 2:
        return None
    width = out.shape[-1]
    if not isinstance(width, int) or width not in CHANNELS:
        return None
    if out.device.type == "cuda" and out.dtype not in kernels.DTYPES:
        return None
    for normed, residual in operands(node):
        if not isinstance(normed, fx.Node) or not isinstance(residual, fx.Node) or normed is residual:
            continue
        parts = tensor(normed), tensor(residual)
        if any(p is None or p.dtype != out.dtype or not same_shape(p.shape, out.shape) for p in parts):
            continue
        producer = recognise(normed, match_norm)
        if producer is None or producer.name != "rms_norm" or residual in interior(normed, producer.inputs):
            continue
        _, _, bias, _, add = producer.inputs
        if bias is None and add is None:
            return producer, normed, residual
    return None
