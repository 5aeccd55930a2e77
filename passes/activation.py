"""Activation in front of a linear layer, folded into `sparsify`.

    h = gelu(x)                                    s = sparsify("gelu", [x])
    s = sparsify("identity", [h])          →       y = sparse_linear(*s, …)
    y = sparse_linear(*s, …)

gelu (erf and tanh), silu (also as x · sigmoid(x)) and relu, in fp32 with a cast back or in x's dtype.
"""

from __future__ import annotations

from torch import fx

from .producer import Producer, activation_of, fold


def fold_activations(graph: fx.Graph) -> int:
    """Run the pass; returns the number of activations folded."""
    return fold(graph, match_activation)


def match_activation(x: fx.Node) -> Producer | None:
    """act(h), for any activation of `semantics.ACTIVATIONS`."""
    found = activation_of(x)
    return None if found is None else Producer(found[0], (found[1],))
