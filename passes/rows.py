"""First or last tokens of each sample that stay dense beside the sparse rest (text in a joint sequence).

    x = gelu(h)                                             u = gelu(h[:, :T]);  v = gelu(h[:, T:])
    y = rt_lynx::linear(x, W, b, …, dense_tokens=T)   →     text = linear(u, W, b)
                                                            rest = rt_lynx::linear(v, W, b, …)
                                                            y = cat([text, rest], 1)

(dense_tokens=-T: the last T of each sample; the parts change places.)

Layers that read one x share its parts, so that they can share one `sparsify` too. What makes x is done for
each part, where nothing else reads it, so that it folds into that `sparsify` and never needs all of x;
`epilogue` then lets the sparse layer write its rows of y.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..runtime import semantics
from .graph import (
    ROW_MAJOR_VIEWS,
    insert,
    interior,
    is_one,
    kind,
    order,
    real_users,
    replace,
    same_size,
    tensor,
)
from .linear import Linear, refreshed
from .mutation import Mutations
from .producers import producer_of

_DENSE_TOKENS = 9  # position of the argument in rt_lynx::linear
_TOKENS = 1  # dimension of the tokens


def split_rows(graph: fx.Graph, linears: Sequence[Linear]) -> list[Linear]:
    """Split the layers that ask for it; returns the layers to make sparse, in the order given."""
    splitter = _Splitter(graph, linears)
    split = [splitter.split(linear) if linear.dense_tokens else linear for linear in linears]
    return [refreshed(linear) for linear in split]  # which may read what another's parts were joined to


class _Splitter:
    def __init__(self, graph: fx.Graph, linears: Sequence[Linear]) -> None:
        self._mutations = Mutations(graph)
        self._asking = {linear.node: linear.dense_tokens for linear in linears}
        self._parts: dict[tuple[fx.Node, int], tuple[fx.Node, fx.Node]] = {}

    def split(self, linear: Linear) -> Linear:
        node, tokens = linear.node, linear.dense_tokens
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        example, out = tensor(x), tensor(node)
        if example is None or out is None or example.dim() != 3:
            return linear
        if (x, tokens) not in self._parts:
            self._parts[x, tokens] = self._parts_of(x, tokens, node)
        text, image = self._parts[x, tokens]
        dense = insert(node, torch._C._nn.linear, (text, *node.args[1:3]), node)
        dense.meta["example_value"], of_rest = semantics.split_tokens(out, tokens)
        # of the marker's arguments all but dense_tokens, which is 0 for what is left
        rest = insert(node, node.target, (image, *node.args[1:_DENSE_TOKENS], 0, *node.args[10:]), node)
        rest.meta["example_value"] = of_rest
        joined = [dense, rest] if tokens > 0 else [rest, dense]
        replace(node, insert(node, torch.cat, (joined, _TOKENS), node))
        return dataclasses.replace(linear, node=rest)

    def _parts_of(self, x: fx.Node, tokens: int, before: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The dense and the other tokens of x, from parts of its makers where only such layers read x."""
        parts = slice(None, tokens), slice(tokens, None)
        if tokens < 0:
            parts = parts[1], parts[0]
        only_here = all(self._asking.get(user) == tokens for user in real_users(x))
        made_of = self._made_of(x, before) if only_here else None
        if made_of is None:
            text, image = (_part(x, part, before) for part in parts)
        else:
            text, image = (_remade(x, *made_of, part, before) for part in parts)
        return text, image

    def _made_of(self, x: fx.Node, before: fx.Node) -> tuple[list[fx.Node], list[fx.Node]] | None:
        """What of a producer has a row a token: its inputs, and in order the nodes that make x of them."""
        producer = producer_of(x)
        if producer is None:
            return None
        inside = interior(x, producer.inputs)
        if self._mutations.reach(inside, before):
            return None
        reads = [read for read in producer.inputs if read is not None]
        if any(self._mutations.between(read, read, before) for read in reads):
            return None
        position = order(x.graph)
        steps = sorted((node for node in inside if _has_tokens(node, x)), key=position.__getitem__)
        if any(kind(node) in ROW_MAJOR_VIEWS for node in steps):  # their sizes are spelled out
            return None
        if any(_broadcasts_along_tokens(node) for node in steps):
            return None
        return [read for read in reads if _has_tokens(read, x)], steps


def _has_tokens(node: fx.Node, x: fx.Node) -> bool:
    """Whether a node holds one row for each token of x, (samples, tokens, …)."""
    example, whole = tensor(node), tensor(x)
    if example is None or whole is None or example.dim() != 3:
        return False
    return same_size(example.shape[_TOKENS], whole.shape[_TOKENS])


def _broadcasts_along_tokens(node: fx.Node) -> bool:
    """Whether a step reads a tensor (tokens, channels), which has no dimension of samples."""
    examples = [tensor(read) for read in node.all_input_nodes]
    return any(e is not None and e.dim() == 2 and not is_one(e.shape[0]) for e in examples)


def _part(x: fx.Node, tokens: slice, before: fx.Node) -> fx.Node:
    """x[:, tokens]."""
    part = insert(before, operator.getitem, (x, (slice(None), tokens)), x)
    example: Any = tensor(x)
    part.meta["example_value"] = example[:, tokens]
    return part


def _remade(
    x: fx.Node, inputs: list[fx.Node], steps: list[fx.Node], tokens: slice, before: fx.Node
) -> fx.Node:
    """The part of x, computed by the steps from that part of the inputs."""
    made = {node: _part(node, tokens, before) for node in inputs}
    for node in steps:
        with before.graph.inserting_before(before):
            made[node] = before.graph.node_copy(node, lambda read: made.get(read, read))
        example: Any = tensor(node)
        made[node].meta["example_value"] = example[:, tokens]
    return made[x]
