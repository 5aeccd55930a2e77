"""Leading tokens of each sample that stay dense beside the sparse rest (text in a joint sequence).

    y = rt_lynx::linear(x, W, b, …, dense_tokens=T)     text = linear(x[:, :T], W, b)
                                                →       rest = rt_lynx::linear(x[:, T:], W, b, …)
                                                        y = cat([text, rest], 1)

Layers that read one x share its slices, so that they can share one `sparsify` too.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from .graph import insert, replace, tensor
from .linear import Linear, match_linear

_DENSE_TOKENS = 9  # position of the argument in rt_lynx::linear


def split_rows(graph: fx.Graph, linears: Sequence[Linear]) -> list[Linear]:
    """Split the layers that ask for it; returns the layers to make sparse, in the order given."""
    slices: dict[tuple[fx.Node, int, bool], fx.Node] = {}
    return [_split(linear, slices) if linear.dense_tokens else linear for linear in linears]


def _split(linear: Linear, slices: dict[tuple[fx.Node, int, bool], fx.Node]) -> Linear:
    node, tokens = linear.node, linear.dense_tokens
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    example, out = tensor(x), tensor(node)
    if example is None or out is None or example.dim() != 3:
        return linear

    def part(text: bool) -> fx.Node:
        key = (x, tokens, text)
        if key not in slices:
            index = (slice(None), slice(None, tokens) if text else slice(tokens, None))
            slices[key] = insert(node, operator.getitem, (x, index), x)
            slices[key].meta["example_value"] = example[index]
        return slices[key]

    dense = insert(node, torch._C._nn.linear, (part(True), *node.args[1:3]), node)
    data = (*node.args[1:_DENSE_TOKENS], 0, *node.args[_DENSE_TOKENS + 1 :])
    rest = insert(node, node.target, (part(False), *data), node)
    rest.meta["example_value"] = out[:, tokens:]
    replace(node, insert(node, torch.cat, ([dense, rest], 1), node))
    found = match_linear(rest)
    assert found is not None
    found.min_tokens = linear.min_tokens
    return found
