"""The eager reference of a model whose linear layers run sparse, and a backend that says which do."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lynx_compile.backend import rewrite, rt_lynx
from lynx_compile.options import Options
from lynx_compile.report import GraphReport, report
from lynx_compile.runtime import ops, semantics

OPTIONS: dict[str, Any] = {"emulate": True, "rest": "eager", "strict": True, "min_tokens": 0}

# fp32 steps inside a model (timesteps, rotary angles, norms) see inputs that differ in the last bits
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}


class SparseLinears(TorchFunctionMode):
    """Eager reference: F.linear with one of the given weights becomes sparsify and sparse_linear."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights, self.used = weights, set[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear or id(args[1]) not in self.weights:
            return func(*args, **(kwargs or {}))
        self.used.add(id(args[1]))
        bound = dict(zip(("x", "weight", "bias"), args, strict=False)) | (kwargs or {})
        x, weight = bound["x"], bound["weight"]
        pruned, _, scale, t = semantics.sparsify(x.reshape(-1, x.shape[-1]))
        y = semantics.sparse_linear(pruned, scale, t, weight, bias=bound.get("bias"))
        return y.unflatten(0, x.shape[:-1])


def call(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)  # some models draw noise
    with torch.no_grad():
        outputs = model(**copy.deepcopy(inputs))
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


@dataclass
class Recorded:
    """What the backend did: the reports of the graphs, and the ids of the weights that ran sparse.

    Blocks share graphs, so weights are noted when a graph runs.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    weights: set[int] = field(default_factory=set)

    def backend(self, options: dict[str, Any]) -> Callable[..., Any]:
        """rt_lynx, checked on its way: without emulation it leaves the graph alone."""

        def checked(gm: fx.GraphModule, example_inputs: Any) -> Any:
            untouched = gm.print_readable(print_output=False)
            dense = rewrite(gm, Options(strict=True))
            assert all(row.decision == "dense" for row in dense.rows)
            assert gm.print_readable(print_output=False) == untouched
            compiled = rt_lynx(gm, example_inputs, options=options)
            self.graphs.append(report().graphs[-1])
            placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
            sparse = [node.args[4] for node in gm.graph.nodes if node.target is ops.sparse_linear]
            together = [node.args[4] for node in gm.graph.nodes if node.target is ops.sparse_linears]
            sparse += [weight for weights in together for weight in weights]
            assert len(sparse) == sum(row.decision == "sparse" for row in self.graphs[-1].rows)
            positions = [placeholders.index(weight) for weight in sparse]

            def run(*inputs: Any) -> Any:
                self.weights |= {id(inputs[position]) for position in positions}
                return compiled(*inputs)

            return run

        return checked


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        error = (a - e).abs().max() / e.abs().max()
        assert error < TOLERANCE[a.dtype], f"relative error {error:.2e}"
