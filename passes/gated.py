"""Gated activation (SwiGLU, GEGLU, …) in front of a linear layer, folded into `sparsify`.

    gate, up = proj(x).chunk(2, -1)                     s = sparsify("silu_mul", [gate, up])
    h = silu(gate) * up                        →        y = sparse_linear(*s, …)
    s = sparsify("identity", [h])
    y = sparse_linear(*s, …)

The halves may be chunks of one tensor (strided views, not copied) or come from two layers.
"""

from __future__ import annotations

from torch import fx

from .graph import kind, operands, skip_casts
from .producer import Producer, activation_of, fold, same_shape_nodes, skip_cast_of_result


def fold_gated(graph: fx.Graph) -> int:
    """Run the pass; returns the number of gated activations folded."""
    return fold(graph, match_gated)


def match_gated(x: fx.Node) -> Producer | None:
    """act(gate) · up with gate and up of x's shape, in either order."""
    core = skip_cast_of_result(x)
    if kind(core) != "mul":
        return None
    for activated, other in operands(core):
        if not isinstance(activated, fx.Node) or not isinstance(other, fx.Node):
            return None
        found = activation_of(activated)
        up = skip_casts(other)
        if found is not None and same_shape_nodes(found[1], up) and same_shape_nodes(found[1], x):
            name, gate = found
            return Producer(f"{name}_mul", (gate, up))
    return None
