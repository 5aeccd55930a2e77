"""Every diffusers transformer under the rt_lynx backend, whole and by blocks.

    dense      without kernels the graph that Inductor gets is the graph that Dynamo made
    emulated   equals the method's definition applied to one layer after the other in eager mode

Models run in fp64, where the rounding that a fused rewrite saves cannot flip a top-2 choice.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lynx_compile.backend import rewrite, rt_lynx
from lynx_compile.options import Options
from lynx_compile.report import GraphReport, report
from lynx_compile.runtime import ops, semantics
from tests import zoo

OPTIONS: dict[str, Any] = {"emulate": True, "rest": "eager", "strict": True, "min_tokens": 0}
BY_BLOCKS = [
    name for name, cls in zoo.transformer_classes().items() if getattr(cls, "_repeated_blocks", None)
]

# models that cast to fp32 by name or autocast and then refuse fp64
DTYPES = dict.fromkeys(
    ["CosmosTransformer3DModel", "Kandinsky5Transformer3DModel", "MotifVideoTransformer3DModel"],
    torch.float32,
)

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


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="module")
def _quiet_diffusers():
    logging.getLogger("diffusers").setLevel(logging.ERROR)


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


def test_the_zoo_holds_every_class():
    assert set(zoo.ZOO) == set(zoo.transformer_classes())
    assert len(zoo.ZOO) > 50


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_whole_model(name):
    model, inputs = zoo.build(name, DTYPES.get(name, torch.float64))
    dense = call(model, inputs)
    recorded = Recorded()
    actual = call(torch.compile(model, backend=recorded.backend(OPTIONS | {"only": "*"})), inputs)
    reference = SparseLinears(recorded.weights)
    with reference:
        expected = call(model, inputs)
    assert len(reference.used) > 0
    assert reference.used == recorded.weights
    assert_close(actual, expected)
    assert any((a - d).abs().max() > 1e-3 * d.abs().max() for a, d in zip(actual, dense, strict=True))
    if len(recorded.graphs) == 1:
        names = {name for name, _ in [*model.named_modules(), *model.named_parameters()]}
        assert {row.name for row in recorded.graphs[0].rows} <= names


@pytest.mark.parametrize("name", BY_BLOCKS)
def test_by_blocks(name):
    model, inputs = zoo.build(name, DTYPES.get(name, torch.float64))
    recorded = Recorded()
    model.compile_repeated_blocks(backend=recorded.backend(OPTIONS))
    actual = call(model, inputs)
    for block in model.modules():
        block._compiled_call_impl = None
    reference = SparseLinears(recorded.weights)
    with reference:
        expected = call(model, inputs)
    assert_close(actual, expected)
