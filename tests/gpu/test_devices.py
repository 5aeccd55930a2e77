"""Several GPUs: each has its own copy of a kernel, its own streams and graphs, and the current one stays."""

import concurrent.futures
import threading

import pytest
import torch
from torch import nn

if torch.cuda.device_count() < 2:
    pytest.skip("needs two NVIDIA GPUs", allow_module_level=True)

import lynx_compile  # noqa: F401 (registers the backend)
from lynx_compile.runtime import gemm_mma, kernels, ops
from lynx_compile.runtime.residual_norm import residual_norm
from lynx_compile.runtime.rotary import rotary

from .test_ops_gpu import Layer, normal

pytestmark = pytest.mark.gpu
LAST = torch.cuda.device_count() - 1
OPTIONS = {"only": ["*"], "min_tokens": 0, "strict": True, "rest": "eager"}


@pytest.fixture(autouse=True)
def current_device_stays():
    assert torch.cuda.current_device() == 0
    yield
    assert torch.cuda.current_device() == 0


@pytest.fixture(scope="module")
def expected():
    return Layer()().cpu()


@pytest.mark.parametrize("first", [0, LAST])
def test_first_use_on_either(first):
    layers = [Layer(rank=32, producer="relu", activation=("silu", "relu")[first > 0], device=f"cuda:{i}")
              for i in (first, LAST - first)]  # fmt: skip
    results = [layer() for layer in layers]
    assert [y.device.index for y in results] == [first, LAST - first]
    assert torch.equal(results[0].cpu(), results[1].cpu())


def test_within_a_device_and_from_another(expected):
    layers = [Layer(device=f"cuda:{i}") for i in range(LAST + 1)]
    for current in range(LAST + 1):
        with torch.cuda.device(current):
            for layer in layers:
                assert torch.equal(layer().cpu(), expected)
                assert torch.cuda.current_device() == current


def test_the_stream_of_its_own_device(expected):
    """What runs behind a wait on the last device's stream would read NaN if it were launched elsewhere."""
    layer = Layer(device=f"cuda:{LAST}")
    layer()
    waiting = torch.full_like(layer.x, float("nan"))
    streams = [torch.cuda.Stream(i) for i in range(LAST + 1)]
    torch.cuda.synchronize(LAST)
    with torch.cuda.stream(streams[0]), torch.cuda.stream(streams[LAST]):
        torch.cuda._sleep(200_000_000)
        waiting.copy_(layer.x)
        with torch.cuda.device(0):  # the last device keeps its current stream
            y = layer(waiting)
    streams[LAST].synchronize()
    assert torch.equal(y.cpu(), expected)


def test_graph_of_the_last_device(expected):
    layer = Layer(device=f"cuda:{LAST}")
    with torch.cuda.device(LAST):
        layer()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer()
    y.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize(LAST)
    assert torch.equal(y.cpu(), expected)


def test_two_at_once_from_threads(expected):
    start = threading.Barrier(LAST + 1)

    def work(index):
        layer = Layer(rank=16, device=f"cuda:{index}")
        start.wait()
        with torch.inference_mode():
            results = [layer() for _ in range(50)]
        torch.cuda.synchronize(index)
        return all(torch.equal(y.cpu(), expected) for y in results)

    with concurrent.futures.ThreadPoolExecutor(LAST + 1) as pool:
        assert all(pool.map(work, range(LAST + 1)))


def test_all_kernels_on_the_last_device(monkeypatch):
    def run(device):
        x = normal(2, 70, 5, 64, device=device)
        angles = [normal(1, 70, 32, 1, dtype=torch.float32, seed=s, device=device) for s in (1, 2)]
        yield rotary([x], [None], [1e-6], *([a] for a in angles))
        rows = normal(66, 320, seed=3, device=device)
        yield residual_norm(rows, None, None, rows, 1e-6)
        layer = Layer(device=device, rank=64)
        yield from ops.sparsify("layer_norm", [layer.x, None, None, None, None], layer.down, 1e-6)
        yield from ops.sparsify("identity", [layer.x], layer.down, deflated=64)
        monkeypatch.setattr(kernels, "_gemms", lambda device, dtype: gemm_mma.prepare_all)
        yield layer()
        monkeypatch.undo()

    for here, there in zip(run("cuda:0"), run(f"cuda:{LAST}"), strict=True):
        assert there.device.index == LAST
        assert torch.equal(here.cpu(), there.cpu())


def test_operands_of_two_devices_are_named():
    layer = Layer()
    compressed = ops.sparsify("identity", [layer.x])
    with pytest.raises(ValueError, match=f"weight is on cuda:{LAST}, expected cuda:0"):
        ops.sparse_linear(*compressed, layer.weight.to(f"cuda:{LAST}"))


def test_compiled_model_on_the_last_device():
    """Compiled while another device is current; the replica runs beside it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.GELU(approximate="tanh"), nn.Linear(512, 1024)).bfloat16().requires_grad_(False)
    x, results = normal(4096, 512), []
    for index in (LAST, 0):
        torch.compiler.reset()
        replica = model.to(f"cuda:{index}")
        compiled = torch.compile(replica, backend="rt_lynx", options=OPTIONS)
        results.append(compiled(x.to(f"cuda:{index}")).cpu())
        dense = replica(x.to(f"cuda:{index}")).cpu()
        error = ((results[-1] - dense).float().norm() / dense.float().norm()).item()
        assert 0.05 < error < 0.5  # sparse, and near the dense result
    assert torch.equal(*results)
