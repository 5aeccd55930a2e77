import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lynx_compile.passes.epilogue import fold_epilogues

from .graphs import check_fusion, function, sparsified

G = torch.Generator().manual_seed(0)
X, GATE = torch.randn(2, 5, 64, generator=G), torch.randn(2, 64, generator=G)
FORMS = {
    "activation": (lambda m, x, gate: F.gelu(m.a(x)), {"activation"}, 1),
    "residual": (lambda m, x, gate: x + m.a(x), {"residual"}, 1),
    "gate and residual": (lambda m, x, gate: x + gate[:, None] * m.a(x), {"gate", "residual"}, 2),
    "addcmul": (lambda m, x, gate: torch.addcmul(x, m.a(x), gate.unsqueeze(1)), {"gate", "residual"}, 1),
    "two rows a sample are flattened": (
        lambda m, x, gate: x.flatten(0, 1) + m.a(x.flatten(0, 1)) * gate[0],
        {"gate", "residual"},
        2,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_form(form):
    forward, arguments, count = FORMS[form]
    module = function(forward, a=nn.Linear(64, 64))
    after = {"sparse_linear": 1, "add": 0, "mul": 0, "gelu": 0, "addcmul": 0}
    gm = check_fusion(module, [X, GATE], fold_epilogues, {"sparse_linear": 1}, after, count)
    node = next(node for node in gm.graph.nodes if getattr(node.target, "_opname", "") == "sparse_linear")
    assert arguments <= set(node.kwargs)


def test_bias_added_behind_a_product():
    def forward(m, x, bias):
        return torch.matmul(x, m.a.weight.t()) + bias[0]

    module = function(forward, a=nn.Linear(64, 64))
    gm = check_fusion(module, [X, GATE], fold_epilogues, {"add": 1}, {"add": 0, "sparse_linear": 1})
    node = next(node for node in gm.graph.nodes if getattr(node.target, "_opname", "") == "sparse_linear")
    assert "bias" in node.kwargs


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x, gate: (lambda y: (y, y + x))(m.a(x)),  # the output is read elsewhere too
        lambda m, x, gate: m.a(x[:1]) + x,  # broadcasts
        lambda m, x, gate: x.float() * 2 + m.a(x).float(),  # narrower than the layer
        lambda m, x, gate: (lambda y: y + y)(m.a(x)),
        lambda m, x, gate: torch.add(x, m.a(x), alpha=2),
    ],
)
def test_left_alone(forward):
    unchanged = {"sparse_linear": 1, "add": 1}
    check_fusion(
        function(forward, a=nn.Linear(64, 64)), [X, GATE], fold_epilogues, unchanged, unchanged, count=0
    )


@pytest.mark.parametrize(
    ("write", "width"),
    [
        (lambda x, y, out: torch.add(x, y, out=out), 64),
        (lambda x, y, out: torch.cat([x, y], -1, out=out), 128),
    ],
)
def test_what_is_written_to_an_out_is_left_alone(write, width):
    def forward(m, x, gate):
        out = x.new_zeros(2, 5, width)
        write(x, m.a(x), out)
        return out

    unchanged = {"sparse_linear": 1}
    check_fusion(
        function(forward, a=nn.Linear(64, 64)), [X, GATE], fold_epilogues, unchanged, unchanged, count=0
    )


def test_a_reshape_of_the_model_is_not_taken_for_ours():
    """The output is two-dimensional, so nothing stands between it and the model's own reshape."""
    module = function(lambda m, x, gate: m.a(x[0]).reshape(5, 64) + x[0], a=nn.Linear(64, 64))
    unchanged = {"sparse_linear": 1, "add": 1, "reshape": 1}
    check_fusion(module, [X, GATE], fold_epilogues, unchanged, unchanged, count=0)


def test_not_moved_over_a_write_to_the_weight():
    def forward(m, x, gate):
        y = m.a(x)
        m.a.weight.mul_(0.5)
        return x + y

    module = function(forward, a=nn.Linear(64, 64))
    gm_inputs = [X, GATE]
    unchanged = {"add": 1}
    from .graphs import ops_of, sparsified

    gm = sparsified(module.double().requires_grad_(False), *[x.double() for x in gm_inputs])
    assert fold_epilogues(gm.graph) == 0
    assert {op: ops_of(gm)[op] for op in unchanged} == unchanged


LEFT = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(3))
TOP = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    ("forward", "other"),
    [
        (lambda m, x, o: torch.cat([o, m.a(x)], -1), LEFT),
        (lambda m, x, o: torch.cat([o.flatten(0, 1), m.a(x.flatten(0, 1))], 1), LEFT),
        (lambda m, x, o: torch.cat([o, m.a(x)], 1), TOP),
        (lambda m, x, o: torch.cat([o, m.a(x)], dim=-2) * 2, TOP),
    ],
)
def test_concatenation(forward, other):
    check_fusion(
        function(forward, a=nn.Linear(64, 64)),
        [torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)), other],
        fold_epilogues,
        {"sparse_linear": 1, "cat": 1},
        {"sparse_linear": 1, "cat": 0},
    )


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x, o: F.gelu(torch.cat([o, m.a(x)], 1)),
        lambda m, x, o: torch.cat([o, o], -1) + torch.cat([o, m.a(x[:, :3])], -1),
        lambda m, x, o: torch.cat([o, torch.cat([o, m.a(x)], 1)], 1),
    ],
)
def test_nothing_more_is_folded_into_what_holds_a_part_that_is_not_the_layers(forward):
    """`check_fusion` runs the pass twice."""
    check_fusion(
        function(forward, a=nn.Linear(64, 64)),
        [torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)), TOP],
        fold_epilogues,
        {"sparse_linear": 1},
        {"sparse_linear": 1},
    )


@pytest.mark.parametrize(
    ("forward", "other"),
    [
        (lambda m, x, o: torch.cat([m.a(x), o], -1), LEFT),  # the layer's part comes first
        (lambda m, x, o: torch.cat([o[..., :20], m.a(x)], -1), LEFT),  # no whole number of stores
        (lambda m, x, o: torch.cat([o, m.a(x), o], 1), TOP),
        (lambda m, x, o: (lambda y: torch.cat([o, y], 1).sum() + y)(m.a(x)), TOP),  # read elsewhere too
        (lambda m, x, o: torch.cat([o[:, None], m.a(x)[:, None]], 2), TOP),
    ],
)
def test_concatenations_left_alone(forward, other):
    check_fusion(
        function(forward, a=nn.Linear(64, 64)),
        [torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)), other],
        fold_epilogues,
        {"sparse_linear": 1},
        {"sparse_linear": 1, "cat": 1},
        0,
    )


@pytest.mark.parametrize("first", [True, False])
def test_nothing_more_folds_into_a_layer_with_rows_around_it(first):
    """A second pass over the graph: the activation is one of all rows, not of the layer's."""

    def forward(m, x, y):
        parts = [m.q(x), y] if first else [y, m.q(x)]
        return torch.relu(torch.cat(parts, 1))

    x, y = (torch.randn(2, n, 64, dtype=torch.float64) for n in (5, 3))
    gm = sparsified(function(forward, q=nn.Linear(64, 64)).double().requires_grad_(False), x, y)
    want = gm(x, y)
    assert (fold_epilogues(gm.graph), fold_epilogues(gm.graph)) == (1, 0)
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(x, y), want)
