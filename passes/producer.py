"""What all passes share that fold the tensor's producer into `sparsify`.

    x = <producer>(inputs)
    s = sparsify("identity", [x])     →     s = sparsify("<producer>", inputs)

Only when nothing but `sparsify` reads x: otherwise x has to be written anyway, and reading it is cheaper than
computing it twice. Inside a producer nothing may be narrower than x, so that no rounding is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import fx

from ..runtime import ops, semantics
from .graph import CASTS, arg, interior, kind, real_users, same_shape, skip_casts, tensor
from .mutation import Mutations, remove_dead


class Producer(NamedTuple):
    """A producer of `semantics.PRODUCERS` and its inputs there."""

    name: str
    inputs: tuple[fx.Node | None, ...]
    eps: float = 0.0
    mult_offset: float = 0.0


Match = Callable[[fx.Node], "Producer | None"]


def fold(graph: fx.Graph, match: Match) -> int:
    """Fold every producer that `match` recognises into the `sparsify` behind it; returns how many."""
    mutations = Mutations(graph)
    count = 0
    for node in list(graph.nodes):
        if node.target is not ops.sparsify or node.args[0] != "identity":
            continue
        x = node.args[1][0]
        if any(not _is_identity_sparsify(user) for user in real_users(x)):
            continue
        producer = recognise(x, match)
        # Deflation reads X twice. A norm costs more there, with its two passes, than X costs in memory.
        if producer is not None and node.kwargs.get("deflated") and producer.name.endswith("_norm"):
            continue
        if producer is not None and not _outdated(mutations, x, producer, node):
            _rewrite(node, x, producer)
            count += 1
    if count:
        remove_dead(graph)
    return count


def _outdated(mutations: Mutations, x: fx.Node, producer: Producer, sparsify: fx.Node) -> bool:
    """Whether the producer's inputs may no longer hold at `sparsify` what they held when X was computed."""
    if mutations.reach(interior(x, producer.inputs), sparsify):
        return True
    # cat([gelu(a), gelu(a)]) reads gelu(a) and a: a node that is itself an input is not in the interior
    return any(read is not None and mutations.between(read, read, sparsify) for read in producer.inputs)


def recognise(x: fx.Node, match: Match) -> Producer | None:
    """The producer of X if `match` knows it and it may be folded without losing precision."""
    out = tensor(x)
    producer = match(x) if out is not None and out.is_floating_point() else None
    if producer is None or out is None:
        return None
    for node in interior(x, producer.inputs):
        inner = tensor(node)
        if inner is not None and torch.promote_types(inner.dtype, out.dtype) != inner.dtype:
            return None
    first = tensor(producer.inputs[0])
    dtypes = (out.dtype, semantics.compute_dtype(out.dtype))
    for read in producer.inputs:
        example = tensor(read)
        if read is None:
            continue
        if example is None or example.dtype not in dtypes or example.device != out.device:
            return None
    return producer if first is not None and first.dtype == out.dtype else None


def skip_cast_of_result(x: fx.Node) -> fx.Node:
    """What was computed before the result was cast to X's dtype."""
    while kind(x) in CASTS:
        source = arg(x, "input")
        inner, outer = tensor(source), tensor(x)
        if inner is None or outer is None or not inner.is_floating_point() or inner.device != outer.device:
            break
        x = source
    return x


def activation_of(node: fx.Node) -> tuple[str, fx.Node] | None:
    """(name in `semantics.ACTIVATIONS`, input) of an activation in any spelling."""
    core = skip_cast_of_result(node)
    if kind(core) == "gelu":
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(arg(core, "approximate", "none"), "")
    elif kind(core) in ("silu", "relu") and not arg(core, "inplace", False):
        name = kind(core)
    elif kind(core) == "mul":  # x · sigmoid(x)
        a, b = arg(core, "input"), arg(core, "other")
        a, b = (b, a) if kind(a) == "sigmoid" else (a, b)
        if kind(b) != "sigmoid" or arg(b, "input") is not a:
            return None
        return "silu", skip_casts(a)
    else:
        return None
    source = arg(core, "input")
    return (name, skip_casts(source)) if name and isinstance(source, fx.Node) else None


def same_shape_nodes(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes hold tensors of equal shape and dtype."""
    x, y = tensor(a), tensor(b)
    return x is not None and y is not None and same_shape(x.shape, y.shape) and x.dtype == y.dtype


def _is_identity_sparsify(node: fx.Node) -> bool:
    return node.target is ops.sparsify and node.args[0] == "identity"


def _rewrite(sparsify: fx.Node, x: fx.Node, producer: Producer) -> None:
    assert producer.name in semantics.PRODUCERS
    sparsify.args = (producer.name, list(producer.inputs))
    extra = {"eps": producer.eps} if producer.eps else {}
    if producer.mult_offset:
        extra["mult_offset"] = producer.mult_offset
    sparsify.kwargs = {**sparsify.kwargs, **extra}
    first, whole = tensor(producer.inputs[0]), tensor(x)
    if first is not None and whole is not None and same_shape(first.shape[:-1], whole.shape[:-1]):
        for user in list(x.users):
            if kind(user) == "size":  # ask the tensor that stays for its size, so that x can go
                user.args = (producer.inputs[0], *user.args[1:])
