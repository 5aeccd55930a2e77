"""The host path of the ops with a driver that only writes down what it is told: no GPU needed.

Addresses, types and sizes decide whether a checked call may be used again; a kernel that read a tensor of
another shape through an old call would read wrong memory, so each way to change one is tried.
"""

import ctypes
import operator
import threading
import types

import pytest
import torch
from torch._C._dynamo import guards
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lynx_compile.runtime import (
    ahead,
    build,
    calls,
    gemm_mma,
    gemm_sm90,
    kernels,
    launch,
    operands,
    ops,
    sparsify_kernel,
)

M, N, K, RANK = 96, 32, 128, 16


class Driver:
    """Records the parameter buffer of each launch, by kernel and grid."""

    def __init__(self):
        self.launches, self.threads = [], set()

    def __call__(self):
        return self

    def cuLaunchKernelEx(self, config, handle, pointers, extra):
        grid = config._obj.grid_x, config._obj.grid_y, config._obj.grid_z
        kernel, size = handle
        self.launches.append((kernel, grid, ctypes.string_at(pointers[0], size)))
        self.threads.add(threading.get_ident())
        return 0

    def __getattr__(self, name):
        return lambda *arguments: 0


@pytest.fixture(params=[gemm_sm90, gemm_mma], ids=["sm90", "mma"])
def driver(request, monkeypatch):
    """The ops' CUDA implementations on CPU tensors: device -1 instead of 0."""
    driver = Driver()
    properties = types.SimpleNamespace(
        shared_memory_per_multiprocessor=233472, major=9, multi_processor_count=132
    )
    monkeypatch.setattr(launch, "_driver", driver)
    monkeypatch.setattr(launch.Kernel, "_load", lambda self, device: (self, self._layout.size))
    monkeypatch.setattr(launch, "_make_context_current", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(calls, "_empty_strided", guards._empty_strided_cpu)
    monkeypatch.setattr(calls, "empty", guards._empty_strided_cpu)
    monkeypatch.setattr(sparsify_kernel, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(kernels, "_gemm", lambda device, dtype: request.param.prepare)
    monkeypatch.setattr(kernels, "_sparsify_calls", calls.Known())
    monkeypatch.setattr(kernels, "_linear_calls", calls.Known())
    monkeypatch.setattr(kernels, "_together_calls", calls.Known())
    for cached in (sparsify_kernel.plan, sparsify_kernel._kernel, gemm_sm90.kernel, gemm_mma.kernel,
                   gemm_mma._overlaps, launch.multiprocessors, launch.tensor_map):  # fmt: skip
        cached.cache_clear()
    yield driver
    for cached in (sparsify_kernel.plan, sparsify_kernel._kernel, gemm_sm90.kernel, gemm_mma.kernel,
                   gemm_mma._overlaps, launch.multiprocessors, launch.tensor_map):  # fmt: skip
        cached.cache_clear()


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape).to(dtype)


class Operands:
    """Of one layer with everything in it."""

    def __init__(self, m=M, rank=RANK, samples=1, dtype=torch.bfloat16):
        self.x, self.weight = normal(m, K, dtype=dtype), normal(N, K, dtype=dtype)
        self.down, self.up = normal(rank, K, dtype=dtype), normal(N, rank, dtype=dtype)
        self.bias, self.gate = normal(samples, N, dtype=dtype), normal(samples, N, dtype=dtype)
        self.residual = normal(m, N, dtype=dtype)

    def sparsify(self, **options):
        return kernels._sparsify("identity", [self.x], self.down, **options)

    def linear(self, compressed, **changes):
        names = "values", "metadata", "scale", "t"
        arguments = dict(zip(names, compressed, strict=True))
        arguments |= {"weight": self.weight, "lora_up": self.up, "bias": self.bias, "activation": "silu"}
        arguments |= {"gate": self.gate, "residual": self.residual}
        return kernels._sparse_linear(**(arguments | changes))


def parameters(launched):
    kernel, _, packed = launched
    return kernel._layout.unpack(packed[: kernel._layout.size])


def pointers(*tensors):
    return [tensor.data_ptr() for tensor in tensors]


@pytest.fixture
def prepared(monkeypatch):
    """Names of the ops whose operands were checked, one for each time."""
    found = []

    def spy(module, name):
        original = module.prepare
        monkeypatch.setattr(
            module, "prepare", lambda *args, **kwargs: (found.append(name), original(*args, **kwargs))[1]
        )

    for module, name in ((sparsify_kernel, "sparsify"), (gemm_sm90, "linear"), (gemm_mma, "linear")):
        spy(module, name)
    return found


def test_each_call_launches_on_its_own_outputs(driver):
    layer = Operands()
    outputs = []
    for _ in range(3):
        compressed = layer.sparsify()
        outputs += [compressed, layer.linear(compressed)]  # kept alive: none may come back
    for launched, output in zip(driver.launches, outputs, strict=True):
        made = [output] if isinstance(output, torch.Tensor) else output
        kernel, found = launched[0], parameters(launched)
        at = kernel.parameters.index("O")
        assert list(found[at : at + len(made)]) == pointers(*made)
    shapes = [(tuple(t.shape), t.dtype, t.is_contiguous()) for t in outputs[2]]
    assert shapes == [
        ((M, K // 2), torch.bfloat16, True),
        ((2, K // 64, 128), torch.int32, True),
        ((M,), torch.float32, True),
        ((M, RANK), torch.bfloat16, True),
    ]
    assert (outputs[3].shape, outputs[3].dtype) == ((M, N), torch.bfloat16)


def test_operands_are_checked_once(driver, prepared):
    layer = Operands()
    compressed = layer.sparsify()
    first = layer.linear(compressed)
    for _ in range(3):
        layer.sparsify()
        layer.linear(compressed)
    assert prepared == ["sparsify", "linear"]
    operands = pointers(*compressed[1:3], layer.bias, layer.gate)
    assert len(driver.launches) == 8
    assert set(operands) <= set(parameters(driver.launches[-1]))
    assert first.data_ptr() not in parameters(driver.launches[-1])


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:64],
        lambda x: x.view(-1, 2 * K),
        lambda x: x.view(-1, 64),
        lambda x: x.view(torch.float16),
        lambda x: x.view(2, -1, K),
        lambda x: x.as_strided((M // 2, K), (2 * K, 1)),
        lambda x: x.as_strided((M, K), (0, 1)),
    ],
    ids=["rows", "wider", "narrower", "dtype", "batch", "every other row", "one row"],
)
def test_another_input_at_the_same_address_is_checked_again(driver, prepared, change):
    layer = Operands()
    kernels._sparsify("identity", [layer.x])
    other = change(layer.x)
    assert other.data_ptr() == layer.x.data_ptr()
    values, *_ = kernels._sparsify("identity", [other])
    assert prepared == ["sparsify"] * 2
    assert values.shape == (other.numel() // other.shape[-1], other.shape[-1] // 2)
    assert values.dtype == other.dtype
    kernels._sparsify("identity", [layer.x])  # the newer one took its place
    assert prepared == ["sparsify"] * 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: {"weight": a.weight.view(-1, 2 * K)}, ValueError, r"weight is \(16, 256\) and values"),
        (lambda a: {"weight": a.weight.view(torch.float16)}, TypeError, "weight is torch.float16"),
        (lambda a: {"weight": a.weight[:20]}, ValueError, r"\(20, 128\).*N % 16"),
        (lambda a: {"bias": a.bias[:, :16]}, ValueError, r"bias has shape \(1, 16\).*N = 32.*M = 96"),
        (lambda a: {"bias": normal(5, N)}, ValueError, r"bias has shape \(5, 32\).*divides M = 96"),
        (lambda a: {"bias": normal(1, N + 8)}, ValueError, "bias has shape"),
        (lambda a: {"gate": normal(0, N)}, ValueError, r"gate has shape \(0, 32\)"),
        (lambda a: {"gate": normal(7, N)}, ValueError, r"gate has shape \(7, 32\).*one row of N = 32"),
        (lambda a: {"residual": a.residual[:95]}, ValueError, "residual has shape .*expected 3072"),
        (lambda a: {"lora_up": a.up.float()}, TypeError, "lora_up is torch.float32"),
        (lambda a: {"bias": normal(N + 1)[1:]}, ValueError, r"bias starts at 0x.*bias.clone\(\)"),
        (lambda a: {"activation": "tanh"}, ValueError, "unknown activation 'tanh'"),
        (lambda a: {"version": 0}, ValueError, "version 0"),
    ],
)
def test_what_a_known_call_would_misread_is_refused(driver, change, error, message):
    layer = Operands()
    compressed = layer.sparsify()
    layer.linear(compressed)
    with pytest.raises(error, match=message):
        layer.linear(compressed, **change(layer))


def test_layers_of_one_input_are_checked_once(driver, monkeypatch):
    layer, weights = Operands(), [normal(n, K) for n in (N, 2 * N, 4 * N)]
    ups = [normal(n, RANK) for n in (N, 2 * N, 4 * N)]
    checked = []
    original = operands.checked
    monkeypatch.setattr(operands, "checked", lambda *args: (checked.append(args), original(*args))[1])
    *compressed, t = layer.sparsify()
    lists = [t] * 3, weights, ups, [layer.bias, None, None], ["none"] * 3, [None] * 3, [None] * 3
    results = [kernels._sparse_linears(*compressed, *lists) for _ in range(3)]
    assert len(checked) == 3
    assert [[y.shape for y in ys] for ys in results] == [[(M, n) for n in (N, 2 * N, 4 * N)]] * 3
    written = {pointer for launched in driver.launches for pointer in parameters(launched)}
    assert {y.data_ptr() for ys in results for y in ys} <= written
    other = normal(M, RANK)
    kernels._sparse_linears(*compressed, [t, t, other], *lists[1:])
    assert len(checked) == 6
    assert other.data_ptr() in {t.data_ptr() for call in checked for t in call if t is not None}


@pytest.mark.parametrize("samples", [1, 3, 96])
def test_bias_and_gate_hold_a_row_a_sample(driver, samples):
    layer = Operands(samples=samples)
    layer.linear(layer.sparsify())
    found = parameters(driver.launches[-1])
    assert found.count(M // samples) >= 2  # for M, too, with one sample
    layer.linear(layer.sparsify(), bias=None, gate=None)
    alone = parameters(driver.launches[-1])
    assert found.count(M // samples) - alone.count(M // samples) == (0 if samples == 1 else 2)


def test_options_and_places_are_told_apart(driver, prepared):
    layer, vector, other = Operands(), normal(K), normal(K)
    for options in (
        {"shift": vector}, {"score": vector}, {"compensation": "native"}, {"shift": vector, "score": other},
    ):  # fmt: skip
        layer.sparsify(**options)
        layer.sparsify(**options)
    assert len(prepared) == 4
    compressed = layer.sparsify()
    for options in ({"gate": None}, {"bias": None}, {"activation": "gelu"}, {"residual": None}):
        layer.linear(compressed, **options)
        layer.linear(compressed, **options)
    assert prepared.count("linear") == 4


def test_a_tensor_may_come_twice(driver, prepared):
    layer, vector = Operands(), normal(2 * K)
    both = vector[:K]
    for _ in range(3):
        layer.sparsify(shift=both, score=both)
    assert len(prepared) == 1
    other = vector.as_strided(
        (K,), (2,)
    )  # the same address, every other element: refused, but not taken for both
    with pytest.raises(ValueError, match="score needs 128 contiguous"):
        layer.sparsify(shift=both, score=other)
    layer.sparsify(shift=both, score=vector[:K])
    assert len(prepared) == 3


def test_a_wide_branch_takes_several_launches(driver):
    layer = Operands(rank=320)
    *first, t = layer.sparsify()
    writes = []
    for launched in driver.launches:
        at = launched[0].parameters.index("O")
        writes.append(list(parameters(launched)[at : at + 4]))
    step = 2 * sparsify_kernel.MAX_RANK
    assert writes[0] == pointers(*first, t)
    assert writes[1:] == [[0, 0, 0, t.data_ptr() + i * step] for i in (1, 2)]


def test_copies_of_operands_are_made_anew(driver, prepared):
    layer = Operands()
    x = normal(K, M).t()  # columns first: no kernel reads that
    for _ in range(2):
        values, metadata, scale, t = kernels._sparsify("identity", [x], layer.down)
    weight = normal(K, N).t()
    for _ in range(2):
        layer.linear((values, metadata, scale, t), weight=weight)
    assert prepared == ["sparsify"] * 2 + ["linear"] * 2
    assert x.data_ptr() not in parameters(driver.launches[0])
    ranked = layer.linear((values, metadata, scale, t[:, :8]), lora_up=layer.up[:, :8])
    assert ranked.shape == (M, N)


def test_t_may_lie_in_a_wider_one(driver, prepared):
    layer = Operands()
    *compressed, t = kernels._sparsify("identity", [layer.x], normal(3 * RANK, K))
    for _ in range(2):
        layer.linear((*compressed, t[:, RANK : 2 * RANK]))
    assert prepared == ["sparsify", "linear"]


def test_no_more_calls_are_kept_than_asked_for(driver, monkeypatch):
    monkeypatch.setattr(calls, "MAX_CALLS", 8)
    layers = [Operands(m=16) for _ in range(20)]
    for layer in layers:
        layer.sparsify()
        assert len(kernels._sparsify_calls._entries) <= 8


def test_empty_batch(driver):
    layer = Operands(m=0)
    compressed = layer.sparsify()
    assert [t.shape[0] for t in compressed] == [0] * 4
    assert layer.linear(compressed).shape == (0, N)
    assert driver.launches == []


def test_threads_do_not_mix_theirparameters_(driver):
    layers = [Operands() for _ in range(4)]
    compressed = [layer.sparsify() for layer in layers]
    driver.launches.clear()
    outputs = [[] for _ in layers]
    ready = threading.Barrier(len(layers))

    def work(i):
        ready.wait()
        outputs[i] += [layers[i].linear(compressed[i]) for _ in range(100)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(driver.threads) == 1 + len(layers)
    scale_of = {layer[2].data_ptr(): i for i, layer in enumerate(compressed)}
    launched = [{y.data_ptr() for y in ys} for ys in outputs]
    assert len(driver.launches) == 400
    for one in driver.launches:
        found = parameters(one)
        (owner,) = {scale_of[p] for p in found if p in scale_of}
        assert found[one[0].parameters.index("O")] in launched[owner]


def test_another_device_and_deterministic_mode_take_the_long_way(driver, monkeypatch):
    layer = Operands()
    expected = [tuple(t.shape) for t in layer.sparsify()]
    made = []
    empty = calls.empty
    monkeypatch.setattr(calls, "empty", lambda *spec: (made.append(spec), empty(*spec))[1])
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 3)
    layer.sparsify()
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1)
    torch.use_deterministic_algorithms(True)
    try:
        layer.sparsify()
    finally:
        torch.use_deterministic_algorithms(False)
    layer.sparsify()
    assert [shape for shape, _, _ in made] == expected * 2
    assert len(driver.launches) == 4


@pytest.mark.parametrize("kind", [calls.Facts, calls._guard_type])
def test_facts_tell_tensors_apart(kind, monkeypatch):
    monkeypatch.setattr(calls, "_guard_type", kind)
    x = normal(4, 64)
    same = calls._guard((x, x.clone()))
    assert same(normal(4, 64), normal(4, 64))
    for other in (x[:2], x.view(2, 128), x.view(torch.float16), x.t().contiguous().t(), x.view(1, 4, 64)):
        assert not same(x, other)
        assert not same(other, x)


def test_a_launch_that_fails_says_which(driver, monkeypatch):
    layer = Operands()
    layer.sparsify()
    monkeypatch.setattr(launch, "_error_text", lambda status: f"error {status}")
    for frame in (
        next(iter(kernels._sparsify_calls._entries.values()))[0].launches[0].kernel._frames.of.values()
    ):
        monkeypatch.setattr(frame, "call", lambda *arguments: 700)
    with pytest.raises(launch.LaunchError, match=r"launching sparsify .*grid \(\d+, 1, 1\).*error 700"):
        layer.sparsify()


@pytest.fixture
def graph():
    """An empty graph that makes placeholders with fake CUDA tensors, some of dynamic size, and tells them."""
    graph, fakes = torch.fx.Graph(), {}
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def known(name, *shape, dynamic=False):
        node, tensor = graph.placeholder(name), torch.empty(*shape, dtype=torch.bfloat16)
        context = StatelessSymbolicContext(
            [DimDynamic.DYNAMIC if dynamic and i == 0 else DimDynamic.STATIC for i in range(len(shape))]
        )
        fake = mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(name))
        with mode:
            fakes[node] = torch.empty(fake.shape, dtype=torch.bfloat16, device="cuda")
        return node

    graph.known = known
    graph.tensor_of = fakes.get
    return graph


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("together", [True, False], ids=["linears", "apart"])
def test_all_kernels_of_a_graph_are_compiled_ahead(driver, graph, monkeypatch, together, portable):
    monkeypatch.setattr(kernels, "unavailable_reason", lambda device, dtype: None)
    monkeypatch.setattr(kernels, "is_hopper", lambda device: not portable)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    asked = []
    monkeypatch.setattr(build, "prebuild", lambda units: asked.extend(units) or [])
    x, down = graph.known("x", 2, M, K, dynamic=True), graph.known("a", 3 * RANK, K)
    weights = [graph.known(f"w{i}", n, K) for i, n in enumerate((N, 9 * N, 9 * N))]
    bias, gate = graph.known("b", 2, N, dynamic=True), graph.known("g", 2, 9 * N, dynamic=True)
    residual = graph.known("r", 2 * M, 9 * N, dynamic=True)
    layers = [("silu", bias, None, None), ("none", None, gate, residual), ("none", None, None, None)]
    if together:
        graph.call_function(
            ops.linears,
            ("gelu", [x], weights, 512),
            {
                "lora_down": down,
                "biases": [layer[1] for layer in layers],
                "dense_biases": [None] * 3,
                "lora_ups": [None] * 3,
                "columns": [],
                "activations": [layer[0] for layer in layers],
                "gates": [layer[2] for layer in layers],
                "residuals": [layer[3] for layer in layers],
            },
        )
    else:
        compressed = graph.call_function(ops.sparsify, ("gelu", [x]), {"lora_down": down})
        parts = [graph.call_function(operator.getitem, (compressed, i)) for i in range(4)]
        names = "activation", "bias", "gate", "residual"
        for weight, layer in zip(weights, layers, strict=True):
            options = {name: value for name, value in zip(names, layer, strict=True) if value is not None}
            graph.call_function(ops.sparse_linear, (*parts, weight), options)
    ahead.prepare(graph, graph.tensor_of)

    def launched(tensor):
        shape = () if tensor is None else map(ahead._hint, graph.tensor_of(tensor).shape)
        return None if tensor is None else torch.zeros(*shape, dtype=torch.bfloat16)

    monkeypatch.setattr(
        kernels, "_gemm", lambda device, dtype: gemm_mma.prepare if portable else gemm_sm90.prepare
    )
    made = kernels._sparsify("gelu", [launched(x)], launched(down))
    for weight, (activation, *rest) in zip(weights, layers, strict=True):
        bias, gate, residual = map(launched, rest)
        options = {"bias": bias, "activation": activation, "gate": gate, "residual": residual}
        kernels._sparse_linear(*made, launched(weight), **options)
    assert set(asked) == {kernel.unit("sm_90a") for kernel, _, _ in driver.launches}
    assert len(set(asked)) == (3 if portable else 4)


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
