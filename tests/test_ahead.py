"""What a graph will launch is what is compiled ahead."""

import operator

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from lynx_compile.runtime import ahead, build, gemm_mma, gemm_sm90, kernels, ops, rotary

from .stand_in import RANK, K, M, N


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


def test_a_norm_whose_eps_is_a_symbol(graph, monkeypatch):
    """What is known of it is nothing, and all else is compiled."""
    monkeypatch.setattr(kernels, "unavailable_reason", lambda device, dtype: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(build, "prebuild", list)
    x, table, eps = graph.known("x", 2, 8, 4, 64), graph.known("c", 1, 8, 32, 1), graph.placeholder("eps")
    graph.call_function(rotary.rotary, ([x], [None], [eps], [table], [table]))
    (unit,) = ahead.prepare(graph, graph.tensor_of)
    assert ("NORM", 1) in unit.defines


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
                "besides": [],
                "sides": [],
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
        kernels,
        "_gemms",
        lambda device, dtype: gemm_mma.prepare_all if portable else gemm_sm90.prepare_all,
    )
    made = kernels._sparsify("gelu", [launched(x)], launched(down))
    for weight, (activation, *rest) in zip(weights, layers, strict=True):
        bias, gate, residual = map(launched, rest)
        options = {"bias": bias, "activation": activation, "gate": gate, "residual": residual}
        kernels._sparse_linear(*made, launched(weight), **options)
    assert set(asked) == {kernel.unit("sm_90a") for kernel, _, _ in driver.launches}
    assert len(set(asked)) == (3 if portable else 4)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("side", ["top", "left"])
def test_layers_with_rows_around_them_launch_once_a_sample(driver, graph, monkeypatch, side, samples):
    """With columns beside it, all samples of a layer are one launch."""
    monkeypatch.setattr(kernels, "unavailable_reason", lambda device, dtype: None)
    monkeypatch.setattr(kernels, "is_hopper", lambda device: True)
    monkeypatch.setattr(kernels, "_gemms", lambda device, dtype: gemm_sm90.prepare_all)
    asked = []
    monkeypatch.setattr(build, "prebuild", lambda units: asked.extend(units) or [])
    rows, widths = 2048, (48 * N, 48 * N)
    x = graph.known("x", samples, rows, K)
    weights = [graph.known(f"w{i}", n, K) for i, n in enumerate(widths)]
    beside = graph.known("b", *((samples, 5, widths[0]) if side == "top" else (samples, rows, 64)))
    compressed = graph.call_function(ops.sparsify, ("identity", [x]))
    *parts, t = [graph.call_function(operator.getitem, (compressed, i)) for i in range(4)]
    every = (
        [t, t],
        weights,
        *[[None, None]] * 2,
        ["none"] * 2,
        *[[None, None]] * 2,
        [beside, None],
        [side, ""],
    )
    arguments = every if side == "top" else [one[:1] for one in every]
    graph.call_function(ops.sparse_linears, (*parts, *arguments))
    ahead.prepare(graph, graph.tensor_of)

    def launched(node):
        return None if node is None else torch.zeros(*graph.tensor_of(node).shape, dtype=torch.bfloat16)

    *made, t = kernels._sparsify("identity", [launched(x)])
    given = [t] * len(arguments[0]), *[list(map(launched, arguments[i])) for i in (1, 7)]
    kernels._sparse_linears(*made, *given[:2], *arguments[2:7], given[2], arguments[8])
    assert set(asked) == {kernel.unit("sm_90a") for kernel, _, _ in driver.launches}
    assert len(driver.launches) == 1 + (samples if side == "top" else 1)
