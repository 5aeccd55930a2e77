"""In-place writes: may the value of a node have changed between two points of the graph?

A rewrite that makes a tensor be read earlier or later than before asks this first. The answer errs towards
"yes": whatever is not known to return fresh memory may alias its inputs, and a call that is not known at all
may write to them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from .graph import CASTS, ROW_MAJOR_VIEWS, kind, order

# Ops whose result never shares memory with an input.
_FRESH = frozenset(
    {
        *(
            "linear",
            "matmul",
            "addmm",
            "bmm",
            "baddbmm",
            "sdpa",
            "conv",
            "cat",
            "pad",
            "mv",
            "softmax",
            "size",
        ),
        *("gelu", "silu", "relu", "sigmoid", "tanh", "layer_norm", "rms_norm"),
        *("add", "radd", "sub", "mul", "div", "addcmul", "pow", "square", "mean", "rsqrt", "neg", "stack"),
    }
)
_VIEWS = (
    ROW_MAJOR_VIEWS
    | CASTS
    | {"transpose", "permute", "t", "getattr", "getitem", "chunk", "split", "narrow", "unbind"}
    | {"view_as_complex", "view_as_real"}
)
_WRITING_OPERATORS = frozenset(
    {
        *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod),
        *(operator.imatmul, operator.ipow, operator.ilshift, operator.irshift),
        *(operator.iand, operator.ior, operator.ixor, operator.iconcat),
        *(operator.setitem, operator.delitem, setattr),
    }
)
_PURE_MODULES = ("torch", "_operator", "operator", "builtins", "math", "einops")


class Mutations:
    """The in-place writes of one graph, for questions about the graph as it was when this was made.

    Nodes that a pass has added since are taken as unwritten (passes only add pure operations), unless they
    stand in for one that was there.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._position = order(graph)
        self._parent: dict[fx.Node, fx.Node] = {}
        writes = [(node, written) for node in graph.nodes for written in _written(node)]
        self._writes: dict[fx.Node, list[int]] = {}
        if not writes:
            return
        for node in graph.nodes:
            if node.op not in ("placeholder", "get_attr") and not is_fresh(node):
                for source in node.all_input_nodes:
                    self._join(node, source)
        # two inputs of the graph may be views of one storage
        inputs = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
        if any(self._root(written) in {self._root(node) for node in inputs} for _, written in writes):
            for node in inputs:
                self._join(node, inputs[0])
        for node, written in writes:
            self._writes.setdefault(self._root(written), []).append(self._position[node])

    def between(self, tensor: Any, first: fx.Node, second: fx.Node) -> bool:
        """Whether `tensor` may be written to after one of the two nodes has run and before the other has."""
        if not self._writes or tensor not in self._position:
            return False
        last = len(self._position)
        low, high = sorted((self._position.get(first, last), self._position.get(second, last)))
        return any(low < write < high for write in self._writes.get(self._root(tensor), ()))

    def reach(self, nodes: Iterable[fx.Node], end: fx.Node) -> bool:
        """Whether a tensor that `nodes` read or yield may be written to between there and `end`."""
        return bool(self._writes) and any(
            self.between(tensor, node, end) for node in nodes for tensor in (node, *node.all_input_nodes)
        )

    def stand_in(self, new: fx.Node, old: fx.Node) -> None:
        """`new` takes the place and the memory of `old`."""
        if old in self._position:
            self._position[new] = self._position[old]
            if self._root(old) is not new:
                self._parent[new] = self._root(old)

    def _root(self, node: fx.Node) -> fx.Node:
        while node in self._parent:
            node = self._parent[node]
        return node

    def _join(self, a: fx.Node, b: fx.Node) -> None:
        root_a, root_b = self._root(a), self._root(b)
        if root_a is not root_b:
            self._parent[root_a] = root_b


def is_fresh(node: fx.Node) -> bool:
    """Whether a node is known to return memory that nothing else in the graph can see."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if _flag(node, "inplace"):
        return False
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "rt_lynx":
        return True
    return kind(node) in _FRESH


def remove_dead(graph: fx.Graph) -> None:
    """Erase what nothing uses and what is known to have no effect (FX's own pass also drops `x.add_(1)`)."""
    for node in reversed(list(graph.nodes)):
        known = is_fresh(node) or kind(node) in _VIEWS or node.op == "get_attr"
        if not node.users and known and not _written(node):
            graph.erase_node(node)


def _flag(node: fx.Node, name: str) -> bool:
    """An `inplace` argument, by keyword or in its usual last place."""
    if node.kwargs.get(name):
        return True
    position = {"silu": 1, "relu": 1, "dropout": 3}.get(kind(node))
    return (
        position is not None
        and node.op == "call_function"
        and position < len(node.args)
        and bool(node.args[position])
    )


def _written(node: fx.Node) -> list[fx.Node]:
    """The tensors a node writes to."""
    if node.op in ("placeholder", "get_attr", "output"):
        return []
    if node.op == "call_module":
        return list(node.all_input_nodes)
    if node.kwargs.get("out") is not None:
        return list(node.all_input_nodes)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    by_name = name.endswith("_") and not name.endswith("__")
    by_name = by_name or (name.startswith("__i") and name not in _NO_WRITE)
    if node.target in _WRITING_OPERATORS or by_name or _flag(node, "inplace"):
        target = node.args[0] if node.args else None
        return [target] if isinstance(target, fx.Node) else list(node.all_input_nodes)
    if node.op == "call_method":
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        return list(node.all_input_nodes) if node.target._schema.is_mutable else []
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        overloads = [getattr(node.target, overload) for overload in node.target.overloads()]
        mutable = any(overload._schema.is_mutable for overload in overloads)
        return list(node.all_input_nodes) if mutable else []
    module = getattr(node.target, "__module__", None) or "builtins"
    known = module.split(".")[0] in _PURE_MODULES
    if isinstance(node.target, torch._ops.HigherOrderOperator) or not known:
        return list(node.all_input_nodes)
    return []


_NO_WRITE = frozenset({"__invert__", "__index__", "__int__", "__init__", "__iter__", "__instancecheck__"})
