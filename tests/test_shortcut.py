"""The way past the dispatcher: for what went through it before, and for nothing else that it would see."""

import types

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lynx_compile.runtime import calls, kernels, ops

from .stand_in import RANK, M, N, Operands


@pytest.fixture
def dispatched(driver):
    """The same implementations behind `torch.ops`, and the names of those that the dispatcher reached."""
    reached = []
    library = torch.library.Library(ops.NAMESPACE, "IMPL", "CPU")
    for name, implementation in (("sparsify", kernels._sparsify), ("sparse_linear", kernels._sparse_linear)):
        library.impl(name, lambda *a, n=name, f=implementation, **k: (reached.append(n), f(*a, **k))[1])
    shortcuts = [(op, op._op) for op in (ops.sparsify, ops.sparse_linear)]
    for op, known, key in (
        (ops.sparsify, kernels._sparsify_calls, kernels._sparsify_key),
        (ops.sparse_linear, kernels._linear_calls, kernels._linear_key),
    ):
        op._op = calls.Shortcut(types.SimpleNamespace(_op=op._op.through, _schema=op._schema), known, key)
    yield reached
    for op, shortcut in shortcuts:
        op._op = shortcut
    library._destroy()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_known_operands_skip_the_dispatcher(driver, dispatched, prepared, mode):
    layer = Operands()
    layer.weight = torch.nn.Parameter(layer.weight)
    with mode():
        compressed = ops.sparsify("identity", [layer.x], layer.down)
        results = []
        for _ in range(4):
            again = ops.sparsify("identity", [layer.x], lora_down=layer.down)
            results.append((again, ops.sparse_linear(*compressed, layer.weight, layer.up)))
    assert dispatched == ["sparsify", "sparse_linear"]
    assert prepared == ["sparsify", "linear"]
    assert len(driver.launches) == 9
    for again, y in results:
        assert [(t.shape, t.dtype) for t in again] == [(t.shape, t.dtype) for t in compressed]
        assert [t.is_inference() for t in again] == [t.is_inference() for t in compressed]
        assert (y.shape, y.requires_grad) == ((M, N), False)


class Seeing(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, kinds, args=(), kwargs=None):
        self.seen.append(op)
        return op(*args, **(kwargs or {}))


class SeeingFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, op, kinds, args=(), kwargs=None):
        self.seen.append(op)
        return op(*args, **(kwargs or {}))


@torch.no_grad()
def test_whoever_watches_ops_sees_them(driver, dispatched):
    layer = Operands()

    def call():
        return ops.sparsify("identity", [layer.x], layer.down)

    for _ in range(3):
        call()
    assert dispatched == ["sparsify"]
    with Seeing() as mode:
        call()
        call()
    assert mode.seen.count(ops.sparsify) == 2
    with SeeingFunctions() as mode:
        call()
    assert ops.sparsify in mode.seen
    with torch.profiler.profile() as profile:
        call()
    assert "rt_lynx::sparsify" in {event.name for event in profile.events()}
    traced = make_fx(lambda: call()[0] + 1)()
    assert ops.sparsify in {node.target for node in traced.graph.nodes}
    with FakeTensorMode() as fakes:
        fake = fakes.from_tensor(layer.x)
        assert isinstance(ops.sparsify("identity", [fake])[0], FakeTensor)
    with torch.enable_grad():
        count = len(dispatched)
        call()
        call()
        assert len(dispatched) == count + 2
    count = len(dispatched)
    call()
    assert len(dispatched) == count


@torch.no_grad()
def test_proxies_leave_nothing_but_the_op():
    """As when a graph that calls the ops is traced again, which unpickling it does."""
    names = "values", "metadata", "scale", "t", "weight", "left", "top"
    graph = torch.fx.Graph()
    tracer = torch.fx.proxy.GraphAppendingTracer(graph)
    values = {name: torch.fx.Proxy(graph.placeholder(name), tracer) for name in names}
    *layer, left, top = values.values()
    ops.sparsify("identity", [layer[0]])
    ops.sparse_linear(*layer)
    ops.sparse_linear(*layer, left=left)
    ops.sparse_linear(*layer, top=top)
    ops.sparse_linear(*layer, bottom=top)
    ops.sparse_linears(*layer[:3], layer[3:4], layer[4:5], [None], [None], ["none"], [None], [None], [], [])
    called = [node.target for node in graph.nodes if node.op != "placeholder"]
    assert called == [ops.sparsify, *[ops.sparse_linear] * 4, ops.sparse_linears]


@torch.no_grad()
def test_transforms_are_not_cut_short(driver, dispatched):
    layer = Operands()
    for _ in range(2):
        ops.sparsify("identity", [layer.x])
    count = len(dispatched)
    torch.vmap(lambda row: row + ops.sparsify("identity", [layer.x])[2].sum())(torch.zeros(3))
    ops.sparsify("identity", [layer.x])
    assert len(dispatched) == count + 1


@torch.no_grad()
def test_subclasses_go_through_the_dispatcher(driver, dispatched):
    class Other(torch.Tensor):
        pass

    layer = Operands()
    for _ in range(2):
        ops.sparsify("identity", [layer.x])
    count = len(dispatched)
    other = layer.x.as_subclass(Other)
    for _ in range(2):
        ops.sparsify("identity", [other])
    assert len(dispatched) == count + 2


@torch.no_grad()
def test_wrong_calls_are_refused_by_the_op(driver, dispatched):
    layer = Operands()
    ops.sparsify("identity", [layer.x])
    for args, kwargs in (
        (("identity",), {}),
        (("identity", [layer.x]), {"unknown": 1}),
        ((1, [layer.x]), {}),
    ):
        with pytest.raises(RuntimeError, match="rt_lynx::sparsify"):
            ops.sparsify(*args, **kwargs)


@pytest.mark.parametrize("rank", [0, RANK, 320])
@torch.no_grad()
def test_results_have_the_type_the_dispatcher_gives(driver, dispatched, rank):
    layer = Operands(rank=rank)
    compressed = ops.sparsify("identity", [layer.x], layer.down)
    for _ in range(2):
        assert type(ops.sparsify("identity", [layer.x], layer.down)) is tuple
        assert type(ops.sparse_linear(*compressed, layer.weight)) is torch.Tensor
    assert dispatched == ["sparsify", "sparse_linear"]


def test_an_op_stays_the_key_it_was():
    for op in (ops.sparsify, ops.sparse_linear):
        assert hash(op) == hash(op._op.through)
        assert {op: 1}[getattr(torch.ops.rt_lynx, op._opname).default] == 1
        assert op._op.__name__ == op._op.through.__name__


def test_a_torch_without_the_way_in_keeps_its_ops(monkeypatch):
    op = types.SimpleNamespace(_schema=ops.sparsify._schema)
    calls.Shortcut.install(op, calls.Known(), kernels._sparsify_key)
    assert not hasattr(op, "_op")
    op._op = sum
    monkeypatch.setattr(calls, "_guard_type", calls.Facts)
    calls.Shortcut.install(op, calls.Known(), kernels._sparsify_key)
    assert op._op is sum


class Wrapped(torch.Tensor):
    """A subclass that sees each op, in `seen`."""

    def __new__(cls, inner, seen):
        wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        wrapped.inner, wrapped.seen = inner, seen
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, op, kinds, args=(), kwargs=None):
        def inner(tensor):
            tensor.seen.append(op)
            return tensor.inner

        return op(*tree_map_only(cls, inner, args), **(kwargs or {}))


@pytest.mark.parametrize("least", [0, M + 1], ids=["sparse", "dense"])
@torch.no_grad()
def test_an_op_made_of_others_passes_its_dispatcher(monkeypatch, least):
    layer = Operands()
    through, reached = ops.linears._op.through, []
    monkeypatch.setattr(ops.linears._op, "through", lambda *a, **k: (reached.append(1), through(*a, **k))[1])
    lists = (
        [layer.bias],
        [layer.bias],
        [layer.up],
        [0, 0, RANK, 1],
        ["silu"],
        [layer.gate],
        [layer.residual],
        [],
        [],
    )

    def call(x=layer.x):
        return ops.linears("identity", [x], [layer.weight], least, *lists, layer.down)

    found = call()
    assert not reached
    assert (type(found), [tuple(y.shape) for y in found]) == (list, [(M, N)])
    assert torch.equal(found[0], through("identity", [layer.x], [layer.weight], least, *lists, layer.down)[0])
    with Seeing() as mode:
        call()
    assert ops.linears in mode.seen
    with torch.profiler.profile() as profile:
        call()
    assert "rt_lynx::linears" in {event.name for event in profile.events()}
    seen = []
    call(Wrapped(layer.x, seen))
    assert seen == [ops.linears]
    with torch.enable_grad():
        call()
    assert len(reached) == 4
    call()
    assert len(reached) == 4
    assert {ops.linears: 1}[torch.ops.rt_lynx.linears.default] == 1
