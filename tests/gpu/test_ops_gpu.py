"""The ops on a GPU: dispatch, streams, graphs, threads, devices, errors, and what a call costs the host."""

import concurrent.futures
import operator

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from lynx_compile.runtime import ahead, build, gemm_mma, kernels, layout, ops, semantics

from .conftest import Operands, assert_rounded

pytestmark = pytest.mark.gpu


def normal(*shape, dtype=torch.bfloat16, seed=0, device="cuda"):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


class Layer:
    """A producer, a LoRA branch and a linear layer with everything behind it."""

    def __init__(self, m=200, n=208, k=256, rank=16, producer="gelu_tanh", activation="none", device="cuda"):
        self.producer, self.activation, self.device = producer, activation, device
        self.x = normal(m, k, device=device)
        self.weight = normal(n, k, seed=1, device=device) / k**0.5
        self.down, self.up = (normal(*s, seed=2, device=device) / 8 for s in ((rank, k), (n, rank)))
        self.bias, self.gate = normal(n, seed=3, device=device), normal(1, n, seed=4, device=device)
        self.residual = normal(m, n, seed=5, device=device)

    def __call__(self, x=None, residual=None):
        compressed = ops.sparsify(self.producer, [self.x if x is None else x], lora_down=self.down)
        options = self.options() | ({} if residual is None else {"residual": residual})
        return ops.sparse_linear(*compressed, self.weight, **options)

    def options(self):
        return {
            "lora_up": self.up,
            "bias": self.bias,
            "activation": self.activation,
            "gate": self.gate,
            "residual": self.residual,
        }

    def reference(self):
        """The definition in fp64, from the producer's rounded result on."""
        z = semantics.produce(self.producer, [self.x])
        pruned, _, scale, t = semantics.sparsify(z, lora_down=self.down)
        options = {k: v if isinstance(v, str) else v.double() for k, v in self.options().items()}
        return semantics.sparse_linear(
            pruned.double(), scale.double(), t.double(), self.weight.double(), **options
        )


@pytest.fixture(params=[True, False], ids=["poisoned", "known"])
def way(request):
    """Both ways of a call: into poisoned outputs, and the short one without gradients that operands know."""
    torch.use_deterministic_algorithms(request.param, warn_only=True)
    with torch.inference_mode(not request.param):
        yield


def close(y, expected):
    return ((y.double() - expected.double()).norm() / expected.double().norm()).item() < 4e-3


def test_kernels_exist_here():
    for dtype in kernels.DTYPES:
        assert kernels.unavailable_reason(torch.device("cuda"), dtype) is None
        assert kernels._gemms(0, dtype) is not None
    assert "torch.float32" in kernels.unavailable_reason(torch.device("cuda"), torch.float32)


@pytest.mark.parametrize("rank", [0, 4, 16, 72, 320])
@pytest.mark.parametrize("m", [1, 130])
def test_ops_against_the_definition(m, rank):
    layer = Layer(m=m, rank=rank)
    assert close(layer(), layer.reference())
    t = ops.sparsify("identity", [layer.x], lora_down=layer.down)[3]
    assert t.shape == (m, rank)
    assert t.is_contiguous()


def test_gemm_op_within_rounding():
    operands = Operands(700, 1040, 1024, rank=64, bias=True, activation="silu", samples=2, residual=True)
    assert_rounded(ops.sparse_linear(*operands.inputs(), **operands.options()), operands)


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("m", [1, 200])
def test_t_may_be_columns_of_a_wider_one(m, portable, monkeypatch):
    if portable:
        monkeypatch.setattr(kernels, "_gemms", lambda device, dtype: gemm_mma.prepare_all)
    layer = Layer(m=m, rank=32)
    *compressed, t = ops.sparsify("identity", [layer.x], lora_down=layer.down.repeat(3, 1))
    expected = ops.sparse_linear(*compressed, t[:, 32:64].contiguous(), layer.weight, lora_up=layer.up)
    assert torch.equal(ops.sparse_linear(*compressed, t[:, 32:64], layer.weight, lora_up=layer.up), expected)
    assert not torch.equal(ops.sparse_linear(*compressed, t[:, :0], layer.weight), expected)


def test_empty_batch():
    compressed = ops.sparsify("identity", [normal(0, 128)])
    assert ops.sparse_linear(*compressed, normal(32, 128)).shape == (0, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_run_the_definition(dtype):
    x, weight = normal(70, 128, dtype=dtype), normal(40, 128, dtype=dtype)
    compressed = ops.sparsify("silu", [x])
    expected = semantics.sparsify(semantics.produce("silu", [x]))
    assert torch.equal(layout.unpack(compressed[0], compressed[1]), expected.pruned)
    y = ops.sparse_linear(*compressed, weight)
    torch.testing.assert_close(
        y, semantics.sparse_linear(expected.pruned, expected.scale, expected.t, weight)
    )


def test_opcheck():
    layer = Layer(m=70, n=48, k=128)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        ops.sparsify, ("gelu_tanh", [layer.x]), {"lora_down": layer.down}, test_utils=checks
    )
    compressed = ops.sparsify("gelu_tanh", [layer.x], lora_down=layer.down)
    torch.library.opcheck(ops.sparse_linear, (*compressed, layer.weight), layer.options(), test_utils=checks)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_dynamic_tokens(backend):
    layer = Layer()
    compiled = torch.compile(lambda x, r: layer(x, r) * 2, fullgraph=True, dynamic=True, backend=backend)
    for m in (200, 130, 3):
        x, residual = layer.x[:m], layer.residual[:m]
        assert torch.equal(compiled(x, residual), layer(x, residual) * 2)


def test_graph_replays_on_new_data(way):
    layer = Layer()
    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer()
    for seed in (7, 8):
        layer.x.copy_(normal(*layer.x.shape, seed=seed))
        graph.replay()
        assert torch.equal(y, layer())


def test_first_use_may_be_inside_a_capture(way):
    layer = Layer(rank=48, producer="silu", activation="relu")  # variants nothing else here uses
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer()
    graph.replay()
    assert torch.equal(y, layer())


def test_prepare_compiles_what_a_graph_launches(tmp_path, monkeypatch):
    monkeypatch.setenv("LYNX_CACHE_DIR", str(tmp_path))
    layer = Layer(rank=80, activation="silu")
    graph = torch.fx.Graph()

    def known(name, tensor):
        node = graph.placeholder(name)
        node.meta["example_value"] = tensor
        return node

    x, down = known("x", layer.x), known("a", layer.down)
    weight, up = known("w", layer.weight), known("b", layer.up)
    compressed = graph.call_function(ops.sparsify, ("gelu_tanh", [x]), {"lora_down": down})
    parts = [graph.call_function(operator.getitem, (compressed, i)) for i in range(4)]
    options = {"lora_up": up, "activation": "silu"}
    graph.output(graph.call_function(ops.sparse_linear, (*parts, weight), options))
    started = ahead.prepare(graph, lambda node: node.meta.get("example_value"))
    assert len(started) == 2
    assert all(future.result()[:4] == b"\x7fELF" for future in started)
    compiled = []
    original = build.compile_unit
    monkeypatch.setattr(build, "compile_unit", lambda what: (compiled.append(what), original(what))[1])
    torch.fx.GraphModule({}, graph)(layer.x, layer.down, layer.weight, layer.up)
    assert compiled == []


def test_current_stream_is_used(way):
    layer = Layer(m=2000)
    expected = layer()
    x, waiting = layer.x.clone(), torch.empty_like(layer.x)
    waiting.fill_(float("nan"))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a launch on another stream would read NaN
        waiting.copy_(x)
        y = layer(waiting)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_dependent_launches_do_not_race(way):
    layer = Layer(m=4096, n=1024, k=1024)
    layer.residual = None

    def chain():
        x = layer.x
        for _ in range(6):
            x = layer(x)
        return x

    first = chain()
    assert first.isfinite().all()
    for _ in range(30):
        assert torch.equal(chain(), first)


def test_inference_mode_and_no_grad():
    layer = Layer()
    expected = layer()
    with torch.inference_mode():
        assert torch.equal(layer(), expected)
    with torch.no_grad():
        assert torch.equal(layer(), expected)


def test_threads_with_their_own_streams(way):
    layer = Layer()
    expected = layer()

    def work(_):
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            results = [layer() for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(y, expected) for y in results)

    torch.cuda.synchronize()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_every_device(way):
    expected = Layer()().cpu()
    for index in range(torch.cuda.device_count()):
        layer = Layer(device=f"cuda:{index}")
        for _ in range(3):
            assert torch.equal(layer().cpu(), expected)  # the current device stays cuda:0


def test_known_operands_give_the_same_in_new_memory():
    torch.use_deterministic_algorithms(False)
    layer = Layer()
    with torch.no_grad():
        first = layer()
        kept = [layer() for _ in range(5)]  # other addresses of y each time, and of what is between
        assert all(torch.equal(y, first) for y in kept)
        assert len({y.data_ptr() for y in kept}) == 5
        layer.x.copy_(normal(*layer.x.shape, seed=9))
        changed = layer()
        assert close(changed, layer.reference())
        assert not torch.equal(changed, first)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: {"weight": a["weight"].float()}, TypeError, "weight is torch.float32, expected torch.bf"),
        (lambda a: {"weight": a["weight"].cpu()}, ValueError, "weight is on cpu, expected cuda:0"),
        (lambda a: {"weight": a["weight"][:40]}, ValueError, r"\(40, 256\).*N % 16"),
        (lambda a: {"weight": a["weight"][:, :128]}, ValueError, r"\(208, 128\)"),
        (lambda a: {"scale": a["scale"][1:]}, ValueError, "scale has shape .199,., .*expected 200"),
        (lambda a: {"metadata": a["metadata"].long()}, TypeError, "metadata is torch.int64"),
        (lambda a: {"bias": shifted(a["bias"])}, ValueError, r"bias starts at 0x.*16 bytes.*bias.clone\(\)"),
        (lambda a: {"values": shifted(a["values"])}, ValueError, r"values starts at 0x"),
        (lambda a: {"gate": a["gate"].new_zeros(3, 208)}, ValueError, r"gate has shape \(3, 208\).*M = 200"),
        (lambda a: {"residual": a["residual"][:10]}, ValueError, "residual has shape"),
        (lambda a: {"activation": "tanh"}, ValueError, "unknown activation 'tanh'.*gelu"),
        (lambda a: {"version": 0}, ValueError, "version 0"),
    ],
)  # fmt: skip
def test_errors_of_the_gemm(change, error, message):
    layer = Layer()
    names = ("values", "metadata", "scale", "t")
    arguments = dict(zip(names, ops.sparsify("identity", [layer.x], lora_down=layer.down), strict=True))
    arguments |= {"weight": layer.weight, **layer.options()}
    arguments |= change(arguments)
    with pytest.raises(error, match=message):
        ops.sparse_linear(**arguments)


@pytest.mark.parametrize(
    ("inputs", "options", "error"),
    [
        (lambda: [shifted(normal(64, 128))], {}, ValueError),
        (lambda: [normal(64, 100)], {}, ValueError),
        (lambda: [normal(64, 128)], {"lora_down": torch.zeros(16, 128)}, (TypeError, ValueError)),
        (lambda: [normal(64, 128)], {"compensation": "other"}, ValueError),
    ],
)
def test_errors_of_sparsify(inputs, options, error):
    with pytest.raises(error):
        ops.sparsify("identity", inputs(), **options)


def shifted(tensor):
    """The same values two bytes further on."""
    memory = tensor.new_empty(tensor.numel() + 1)
    memory[1:] = tensor.flatten()
    return memory[1:].view(tensor.shape)
