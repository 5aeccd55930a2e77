import pytest
import torch
from torch import nn

import lynx_compile
from lynx_compile import attach, passes
from lynx_compile.passes.site import META
from lynx_compile.runtime import ops

from .graphs import function, ops_of, traced

G = torch.Generator().manual_seed(0)
X = torch.randn(2, 5, 64, dtype=torch.float64, generator=G)


def layer(n=64, k=64, bias=True):
    return nn.Linear(k, n, bias=bias, dtype=torch.float64).requires_grad_(False)


def chosen_at_run_time(module, min_tokens, *names):
    """(graph with the choice, the same without it)."""
    graphs = []
    for least in (min_tokens, 0):
        gm = traced(module, X)
        passes.normalize(gm.graph)
        linears = [linear for linear in passes.find_linears(gm.graph) if linear.name in names]
        for linear in linears:
            linear.min_tokens = least
        passes.sparsify_linears(gm.graph, linears)
        for fuse in passes.FUSIONS:
            fuse(gm.graph)
        passes.lower_markers(gm.graph)
        gm.graph.lint()
        gm.recompile()
        graphs.append(gm)
    return graphs


def attention(m, x):
    h = m.norm(x)
    return m.q(h), m.k(h) + m.up(m.down(h)) * 0.5, torch.relu(m.v(h))


@pytest.fixture
def qkv():
    k = attach(
        layer(128, bias=False),
        down=torch.randn(16, 64, generator=G),
        up=torch.randn(128, 16, generator=G),
        shift=torch.randn(64, generator=G),
        decision="sparse",
    )
    q = attach(
        layer(), down=torch.randn(32, 64, generator=G), up=torch.randn(64, 32, generator=G), decision="sparse"
    )
    norm = nn.LayerNorm(64, dtype=torch.float64).requires_grad_(False)
    return function(
        attention, norm=norm, q=q, k=k, v=layer(), down=layer(5, bias=False), up=layer(128, 5, bias=False)
    )


def test_sparse_from_the_least_number_of_tokens_on(qkv):
    choice, sparse = chosen_at_run_time(qkv, 10, "q", "k", "v")
    assert (ops_of(choice)["linears"], ops_of(choice)["sparsify:layer_norm"]) == (2, 0)
    for got, want in zip(choice(X), sparse(X), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_dense_below_it_with_the_adapter_and_without_the_compensation(qkv):
    choice, _ = chosen_at_run_time(qkv, 11, "q", "k", "v")
    for got, want in zip(choice(X), qkv(X), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_columns_of_t_follow_the_order_of_stacking():
    """Two layers whose order among the readers of one `sparsify` changes when one takes in a relu."""
    down = torch.randn(16, 64, generator=G)
    other = torch.randn(16, 64, generator=G)
    a = attach(layer(), down=down, up=torch.randn(64, 16, generator=G), decision="sparse")
    b = attach(layer(), down=other, up=torch.randn(64, 16, generator=G), decision="sparse")
    module = function(lambda m, x: (torch.relu(m.a(x)), m.b(x)), a=a, b=b)
    choice, sparse = chosen_at_run_time(module, 5, "a", "b")
    for got, want in zip(choice(X), sparse(X), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tokens", [5, 100])
def test_what_stands_beside_a_layer_that_is_always_sparse(tokens):
    """Its neighbour chooses for both; what stands beside keeps its place on either way."""

    def forward(m, x):
        return torch.cat([x, m.a(x)], -1), m.b(x)

    gm = traced(function(forward, a=layer(), b=layer()), X)
    passes.normalize(gm.graph)
    linears = passes.find_linears(gm.graph)
    linears[1].min_tokens = tokens
    passes.sparsify_linears(gm.graph, linears)
    for fuse in passes.FUSIONS:
        fuse(gm.graph)
    gm.recompile()
    assert ops_of(gm)["linears"] == 1
    assert [tuple(y.shape) for y in gm(X)] == [(2, 5, 128), (2, 5, 64)]


def beside_of_a_view(m, x):
    return torch.cat([x[:, :3], m.a(x)], 1), m.b(x)


def beside_of_an_unknown_op(m, x):
    a, b = m.a(x), m.b(x)
    return torch.cat([torch.sin(x), a], -1), b


def beside_of_a_sibling(m, x):
    a = m.a(x)
    return torch.cat([a, m.b(x)], 1), x


def beside_that_is_written_to(m, x):
    c = x * 2
    a, b = m.a(x), m.b(x)
    c.add_(1)
    return torch.cat([c, a], 1), b


def x_that_is_written_to(m, x):
    y = x * 2
    a = m.a(y)
    y.add_(1)
    return torch.cat([x, a], 1), m.b(y)


def residual_behind_a_write_to_x(m, x):
    y = x * 2
    a = m.a(y)
    y.add_(1)
    return x + a, m.b(x)


def bias_of_an_unknown_op(m, x):
    a = m.a(x)
    return a, torch.nn.functional.linear(x, m.b.weight, torch.sin(m.b.bias))


@pytest.mark.parametrize(
    "forward",
    [
        *(beside_of_a_view, beside_of_an_unknown_op, beside_of_a_sibling, beside_that_is_written_to),
        *(x_that_is_written_to, residual_behind_a_write_to_x, bias_of_an_unknown_op),
    ],
)
def test_no_layer_loses_its_choice(forward):
    for least in (11, 10):
        gm = traced(module := function(forward, a=layer(), b=layer()), X)
        passes.normalize(gm.graph)
        linears = passes.find_linears(gm.graph)
        for linear in linears:
            linear.min_tokens = least
        passes.sparsify_linears(gm.graph, linears)
        for fuse in passes.FUSIONS:
            fuse(gm.graph)
        gm.graph.lint()
        gm.recompile()
        assert not [node for node in gm.graph.nodes if node.target in (ops.sparse_linear, ops.sparse_linears)]
        assert {
            note.name for node in gm.graph.nodes if node.target is ops.linears for note in node.meta[META]
        }
        same = [torch.allclose(*pair, atol=1e-10) for pair in zip(gm(X), module(X), strict=True)]
        assert all(same) == (least == 11)


def test_one_graph_serves_every_number_of_tokens():
    torch._dynamo.reset()
    lynx_compile.clear_report()
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).requires_grad_(
        False
    )
    options = {"rest": "eager", "emulate": True, "strict": True, "min_tokens": 30}
    compiled = torch.compile(model, backend="rt_lynx", dynamic=True, fullgraph=True, options=options)
    torch._dynamo.mark_dynamic(x := torch.randn(2, 8, 64), 1)
    compiled(x)
    for tokens in (3, 14, 15, 40):
        x = torch.randn(2, tokens, 64)
        same = torch.allclose(compiled(x), model(x), atol=1e-5)
        assert same == (2 * tokens < 30)
    report = lynx_compile.report()
    assert len(report.graphs) == 1
    assert all(row.symbol and "dense at run time below 30 tokens" in row.reason for row in report.rows)
