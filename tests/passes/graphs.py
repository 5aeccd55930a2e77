"""Traced modules and op counts for the tests of single passes."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from lynx_compile import passes
from lynx_compile.layers import attach
from lynx_compile.passes.graph import kind
from lynx_compile.passes.site import META


class Tracer(fx.Tracer):
    """Keeps the test's own calls, inlines every module, lifts nothing: parameters are get_attr nodes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


def names_of(gm: fx.GraphModule) -> list[str]:
    """The layers of each call, in order, "a b" where two run together."""
    notes = [node.meta.get(META) for node in gm.graph.nodes if "sparse_linear" in str(node.target)]
    return [" ".join(n.name for n in (note if isinstance(note, list) else [note])) for note in notes]


def traced(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """The graph of a module, with fake tensors as example values."""
    gm = fx.GraphModule(module, Tracer().trace(module))
    FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)
    return gm


def sparsified(module: nn.Module, *inputs: Tensor, compensation: str = "norm") -> fx.GraphModule:
    """The traced graph, normalised, with every eligible layer sparse and nothing fused yet."""
    gm = traced(module, *inputs)
    passes.normalize(gm.graph)
    linears = [linear for linear in passes.find_linears(gm.graph) if not linear.obstacle]
    passes.sparsify_linears(gm.graph, linears, compensation)
    gm.recompile()
    return gm


def ops_of(gm: fx.GraphModule) -> Counter[str]:
    """How often each op occurs; `sparsify` by its producer, as in "sparsify:gelu"."""
    counts: Counter[str] = Counter()
    for node in gm.graph.nodes:
        name = getattr(node.target, "_opname", None) or kind(node)
        if name == "sparsify":
            name = f"sparsify:{node.args[0]}"
        counts[name] += bool(name)
    return counts


def check_fusion(
    module: nn.Module,
    inputs: Sequence[Tensor],
    fuse: Callable[[fx.Graph], int],
    before: dict[str, int],
    after: dict[str, int],
    count: int = 1,
) -> fx.GraphModule:
    """Op counts before and after a pass, its idempotence, and the same numbers as without it (fp64)."""
    module = module.double().eval().requires_grad_(False)
    inputs = [x.to(torch.float64, copy=True) for x in inputs]
    gm = sparsified(module, *inputs)
    counts = ops_of(gm)
    assert {op: counts[op] for op in before} == before
    want = gm(*[x.clone() for x in inputs])
    assert fuse(gm.graph) == count
    gm.graph.lint()
    gm.recompile()
    counts = ops_of(gm)
    assert {op: counts[op] for op in after} == after
    assert fuse(gm.graph) == 0
    torch.testing.assert_close(gm(*[x.clone() for x in inputs]), want, rtol=1e-10, atol=1e-10)
    return gm


class _Called(nn.Module):
    def __init__(self, call: Callable[..., Any], layers: dict[str, Any]) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            setattr(self, name, layer)


class _One(_Called):
    def forward(self, x: Any) -> Any:
        return self.call(self, x)


class _Two(_Called):
    def forward(self, x: Any, y: Any) -> Any:
        return self.call(self, x, y)


class _Three(_Called):
    def forward(self, x: Any, y: Any, z: Any) -> Any:
        return self.call(self, x, y, z)


class _Four(_Called):
    def forward(self, x: Any, y: Any, z: Any, w: Any) -> Any:
        return self.call(self, x, y, z, w)


def function(call: Callable[..., Any], **layers: Any) -> nn.Module:
    """A module that holds `layers` and whose forward is call(self, one to four tensors)."""
    inputs = len(inspect.signature(call).parameters) - 1
    return (_One, _Two, _Three, _Four)[inputs - 1](call, layers)


def deflating() -> nn.Linear:
    """A layer (64, 64) whose branch takes 16 directions out of X before pruning."""
    down, up = torch.randn(16, 64) / 8, torch.randn(64, 16)
    return attach(nn.Linear(64, 64), down=down, up=up, decision="sparse", deflated=16)
