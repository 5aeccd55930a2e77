import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lynx_compile import attach, passes
from lynx_compile.passes.epilogue import fold_epilogues
from lynx_compile.passes.together import run_together

from .graphs import check_fusion, function, names_of, sparsified, traced

X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
G = torch.Generator().manual_seed(1)


def layer(n=64, rank=0, down=None):
    module = nn.Linear(64, n, dtype=torch.float64).requires_grad_(False)
    if rank:
        down = torch.randn(rank, 64, generator=G) if down is None else down
        attach(module, down=down, up=torch.randn(n, rank, generator=G), decision="sparse")
    return module


def test_layers_of_one_input():
    gm = check_fusion(
        function(lambda m, x: (m.q(x), m.k(x), F.gelu(m.v(x))), q=layer(), k=layer(32), v=layer(128)),
        [X],
        run_together,
        {"sparsify:identity": 1, "sparse_linear": 3},
        {"sparsify:identity": 1, "sparse_linear": 0, "sparse_linears": 1},
        3,
    )
    assert names_of(gm) == ["q k v"]


def test_no_more_at_once_than_a_launch_takes():
    names = "abcdef"
    gm = check_fusion(
        function(
            lambda m, x: tuple(getattr(m, name)(x) for name in names), **{name: layer() for name in names}
        ),
        [X],
        run_together,
        {"sparsify:identity": 1, "sparse_linear": 6},
        {"sparsify:identity": 1, "sparse_linear": 0, "sparse_linears": 2},
        6,
    )
    assert names_of(gm) == ["a b c d", "e f"]


@pytest.mark.parametrize("shared", [True, False])
def test_branches(shared):
    down = torch.randn(16, 64, generator=G)
    q, k = layer(32, 16, down), layer(64, 16 if shared else 5, down if shared else None)
    check_fusion(
        function(lambda m, x: (m.q(x), m.k(x), m.v(x)), q=q, k=k, v=layer()),
        [X],
        run_together,
        {"sparse_linear": 3},
        {"sparse_linear": 0, "sparse_linears": 1},
        3,
    )


def test_a_layer_that_waits_for_another_runs_where_it_did():
    def forward(m, x):
        return x + m.down(torch.tanh(m.q(x))) + m.k(x) * m.v(x)

    layers = {name: layer() for name in ("q", "k", "v", "down")}
    gm = sparsified(function(forward, **layers).double(), X.double())
    want = gm(X.double())
    fold_epilogues(gm.graph)
    run_together(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert names_of(gm) == ["q k v", "down"]
    torch.testing.assert_close(gm(X.double()), want)


def test_what_an_operand_is_made_of_may_be_written_to_in_between():
    def forward(m, x):
        fresh = m.k.bias * 2  # an input of the graph might be a view of a weight
        q = m.q(x)
        fresh.add_(1)
        return q, F.linear(x, m.k.weight, fresh * 3)

    gm = sparsified(function(forward, q=layer(), k=layer(32)).double(), X.double())
    want = gm(X.double())
    run_together(gm.graph)
    gm.graph.lint()
    gm.recompile()
    for got, expected in zip(gm(X.double()), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_columns_of_t_stay_where_layers_that_run_together_read_them():
    """An adapter is joined after them, in an order of passes that is not ours."""

    def forward(m, x):
        q, k = m.q(x), m.k(x)
        return q, k, F.linear(x, m.v.weight, q.sum((0, 1))) + m.up(m.down(x))

    layers = {"q": layer(64, 16), "k": layer(32, 16), "v": layer()}
    layers |= {"down": nn.Linear(64, 16, bias=False), "up": nn.Linear(16, 64, bias=False)}
    gm = traced(function(forward, **layers).double(), X.double())
    passes.normalize(gm.graph)
    linears = [linear for linear in passes.find_linears(gm.graph) if linear.name in ("q", "k", "v")]
    passes.sparsify_linears(gm.graph, linears)
    gm.recompile()
    want = gm(X.double())
    for fuse in (run_together, passes.FUSIONS[0]):
        fuse(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert names_of(gm) == ["q k", "v"]
    for got, expected in zip(gm(X.double()), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_layers_on_both_sides_of_a_write_are_left():
    def forward(m, x):
        q = m.q(x)
        m.k.weight.add_(1)
        return q, m.k(x)

    module = function(forward, q=layer(), k=layer()).double().eval().requires_grad_(False)
    assert run_together(sparsified(module, X.double()).graph) == 0


def test_a_weight_that_is_written_to_between_layers_of_one_input():
    def forward(m, x):
        x = x * 2  # fresh: writing to a weight leaves it as it is
        q = m.q(x)
        m.k.weight.add_(1)
        return q, m.k(x)

    module = function(forward, q=layer(), k=layer()).double().eval().requires_grad_(False)
    gm = sparsified(module, X.double())
    assert sum("sparsify" in str(node.target) for node in gm.graph.nodes) == 1
    assert run_together(gm.graph) == 0
