"""A drawn graph run as it is, rewritten, and by the definition: what the three must agree on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lynx_compile import passes
from lynx_compile.passes.mutation import Mutations
from lynx_compile.passes.site import META
from lynx_compile.runtime import ops, semantics


@dataclass
class Drawn:
    """A graph, the values of its inputs, and which of its layers were chosen to be sparse.

    min_tokens: of the layers but for those in `always`, which are sparse with any number of tokens.
    """

    graph: fx.Graph
    inputs: list[Tensor]
    chosen: set[str] = field(default_factory=set)
    min_tokens: int = 0
    always: set[str] = field(default_factory=set)
    compensation: str = "norm"
    exact: bool = True  # False where part of it runs in fp32

    def fresh_inputs(self) -> list[Tensor]:
        """The inputs as they were before any in-place operation; aliases stay aliases."""
        return copy.deepcopy(self.inputs)


def run(graph: fx.Graph, inputs: Sequence[Tensor], call: Callable[..., Any] | None = None) -> Any:
    """Execute a graph node by node. call(node, values) may stand in for a node."""
    values: dict[fx.Node, Any] = {}
    left = list(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = left.pop(0)
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "output":
            return args[0]
        result = NotImplemented if call is None else call(node, values)
        if result is NotImplemented:
            target = getattr(args[0], node.target) if node.op == "call_method" else node.target
            result = target(*(args[1:] if node.op == "call_method" else args), **kwargs)
        values[node] = result
    raise AssertionError("a graph ends in its output")


def by_definition(drawn: Drawn, dense: frozenset[str] = frozenset()) -> tuple[Any, list[Tensor]]:
    """Run the drawn graph with `semantics` in place of each chosen layer; (outputs, inputs afterwards).

    dense: layers that were chosen but run dense, by the number of their tokens.
    """

    def call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        layer = node.meta.get("layer")
        if layer is None or layer.name not in drawn.chosen or layer.name in dense:
            return NotImplemented
        parts = {part: values[source] for part, source in layer.parts.items()}
        y = _sparse_layer(parts, drawn.compensation)
        if not layer.dense_tokens or y.dim() != 3:
            return y
        whole = parts["x"], parts["weight"], parts.get("bias"), layer.dense_tokens
        return semantics.with_dense_tokens(y, *whole)

    inputs = drawn.fresh_inputs()
    return run(drawn.graph, inputs, call), inputs


def rewritten(drawn: Drawn, fusions: Sequence[Callable[[fx.Graph], int]] = passes.FUSIONS) -> fx.Graph:
    """A rewritten copy of the drawn graph, checked for consistency; `chosen` keeps what could be sparse."""
    graph = copy.deepcopy(drawn.graph)
    passes.normalize(graph)
    linears = [
        linear for linear in passes.find_linears(graph) if linear.name in drawn.chosen and not linear.obstacle
    ]
    drawn.chosen = {linear.name for linear in linears}
    for linear in linears:
        linear.min_tokens = 0 if linear.name in drawn.always else drawn.min_tokens
    passes.sparsify_linears(graph, passes.split_rows(graph, linears), drawn.compensation)
    for fuse in fusions:
        fuse(graph)
    passes.lower_markers(graph)
    graph.lint()
    return graph


def dense_at_run_time(graph: fx.Graph, drawn: Drawn) -> frozenset[str]:
    """The layers of a rewritten graph that choose at run time, and choose dense."""
    names: set[str] = set()
    for node in graph.nodes:
        if node.target is ops.linears:
            rows = node.args[1][0].meta["example_value"]
            if rows.numel() // rows.shape[-1] < drawn.min_tokens:
                names |= {note.name for note in node.meta[META]}
    return frozenset(names)


def _always_sparse(graph: fx.Graph) -> set[str]:
    """Layers left in ops that do not choose, though they, or others of their X, should."""
    left = [node for node in graph.nodes if node.target in (ops.sparse_linear, ops.sparse_linears)]
    alone = [node.meta[META] for node in left if node.target is ops.sparse_linear]
    together = [note for node in left if node.target is ops.sparse_linears for note in node.meta[META]]
    return {note.name for note in (*alone, *together) if note.min_tokens > 1}


def check(drawn: Drawn, fusions: Sequence[Callable[[fx.Graph], int]] = passes.FUSIONS) -> fx.Graph:
    """Assert that the rewritten graph computes what the definition does, in-place effects included."""
    graph = rewritten(drawn, fusions)
    nodes = list(drawn.graph.nodes)
    # a write may come between a layer and what it would read if it were computed later
    if tuple(fusions) == passes.FUSIONS and not Mutations(drawn.graph).reach(nodes, nodes[-1]):
        assert not _always_sparse(graph), "layers that should choose at run time are always sparse"
    want, want_inputs = by_definition(drawn, dense_at_run_time(graph, drawn))
    inputs = drawn.fresh_inputs()
    got = run(graph, inputs)
    for name, a, b in [
        *((f"output {i}", a, b) for i, (a, b) in enumerate(zip(got, want, strict=True))),
        *((f"input {i}", a, b) for i, (a, b) in enumerate(zip(inputs, want_inputs, strict=True))),
    ]:
        assert a.shape == b.shape, f"{name}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        assert a.dtype == b.dtype, f"{name}: {a.dtype}, expected {b.dtype}"
        close = torch.isclose(a, b, rtol=1e-8, atol=1e-8) if drawn.exact else torch.isclose(a, b, 1e-3, 1e-3)
        # in fp32 a rounding may tip the choice of which two of four are kept
        enough = 1.0 if drawn.exact else 0.97
        assert a.numel() == 0 or close.double().mean() >= enough, f"{name}: off by {(a - b).abs().max():.3g}"
    return graph


def _sparse_layer(parts: dict[str, Tensor], compensation: str) -> Tensor:
    x, weight, bias = parts["x"], parts["weight"], parts.get("folded", parts.get("bias"))
    down, up, shift, score = (parts.get(name) for name in ("down", "up", "shift", "score"))
    rows = x.reshape(-1, x.shape[-1])
    s = semantics.sparsify(rows, shift=shift, score=score, lora_down=down, compensation=compensation)
    y = semantics.sparse_linear(s.pruned, s.scale, s.t, weight, lora_up=up, bias=bias)
    return y.reshape(*x.shape[:-1], weight.shape[0])
