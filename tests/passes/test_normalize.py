import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lynx_compile import passes

from .graphs import function, ops_of, traced

X = torch.randn(2, 5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
W = nn.Parameter(torch.randn(32, 64, dtype=torch.float64), requires_grad=False)
B = nn.Parameter(torch.randn(32, dtype=torch.float64), requires_grad=False)


def normalized(module, *inputs, count):
    gm = traced(module, *inputs)
    want = gm(*[x.clone() for x in inputs])
    assert passes.normalize(gm.graph) == count
    assert passes.normalize(gm.graph) == 0
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(*[x.clone() for x in inputs]), want)
    return ops_of(gm)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: x @ m.w.t(),
        lambda m, x: torch.matmul(x, m.w.T),
        lambda m, x: operator.matmul(x, m.w.mT),
        lambda m, x: x.matmul(m.w.transpose(0, 1)),
        lambda m, x: x.matmul(m.w.transpose(-1, -2)),
        lambda m, x: x @ m.w.permute(1, 0),
        lambda m, x: torch.addmm(m.b, x.view(-1, 64), m.w.t()),
        lambda m, x: torch.mm(x.view(-1, 64), m.w.t()),
    ],
)
def test_products_with_a_transposed_weight(call):
    counts = normalized(function(call, w=W, b=B), X, count=1)
    assert (counts["linear"], counts["matmul"], counts["addmm"]) == (1, 0, 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: x @ x.transpose(1, 2),  # attention scores
        lambda m, x: torch.addmm(m.b, x.view(-1, 64), m.w.t(), beta=2),
        lambda m, x: x @ m.w.transpose(0, 0)[:, :].T.contiguous(),
    ],
)
def test_other_products_are_left(call):
    assert normalized(function(call, w=W, b=B), X, count=0)["linear"] == 0


def test_dropout_goes_in_eval_mode_only():
    kept = function(lambda m, x: F.dropout(x, 0.5, True), w=W)
    gm = traced(kept, X)
    assert passes.normalize(gm.graph) == 0
    dropped = function(lambda m, x: torch.dropout(F.dropout(x, 0.5, False), 0.5, False), w=W)
    assert normalized(dropped, X, count=2)["dropout"] == 0


def test_casts_that_change_nothing_go():
    counts = normalized(function(lambda m, x: x.to(torch.float64).double().float(), w=W), X, count=2)
    assert (counts["to"], counts["double"], counts["float"]) == (0, 0, 1)


def test_in_place_sum_on_a_fresh_tensor():
    def fresh(m, x):
        y = F.linear(x, m.w)
        y = y.add_(1)
        y = y.mul_(2)
        return y

    counts = normalized(function(fresh, w=W), X, count=2)
    assert (counts["iadd"], counts["imul"], counts["add"], counts["mul"]) == (0, 0, 1, 1)


def test_in_place_sum_on_memory_that_others_see():
    def seen(m, x):
        y = F.linear(x, m.w)
        z = y[:, :1]
        y.add_(1)
        x.add_(1)
        return z, y

    assert normalized(function(seen, w=W), X, count=0)["iadd"] == 2


def test_leaf_modules_of_a_traced_graph_are_inlined():
    model = nn.Sequential(
        nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU("tanh"), nn.Dropout(), nn.SiLU(), nn.RMSNorm(64)
    )
    model = model.double().eval().requires_grad_(False)
    gm = torch.fx.symbolic_trace(model)
    for node in gm.graph.nodes:
        node.meta["example_value"] = X
    assert passes.normalize(gm.graph) == 6
    gm.recompile()
    assert all(node.op != "call_module" for node in gm.graph.nodes)
    torch.testing.assert_close(gm(X), model(X))
