import pytest
import torch
from torch import nn

from lynx_compile import passes
from lynx_compile.passes.residual import fold_residual_norms

from .graphs import function, ops_of

G = torch.Generator().manual_seed(0)
B, T, C = 2, 6, 64


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=G)


X, Y, GATE = normal(B, T, C), normal(B, T, C), normal(B, C)


def norm(weighted=True):
    module = nn.RMSNorm(C, eps=1e-5, elementwise_affine=weighted, dtype=torch.float64)
    if weighted:
        module.weight.data = normal(C)
    return module


def spelled_out(norm, y):
    """As diffusers' RMSNorm."""
    variance = y.to(torch.float64).pow(2).mean(-1, keepdim=True)
    return (y * torch.rsqrt(variance + norm.eps)) * norm.weight


def folded(call, inputs, count=1, dynamic=None, **layers):
    """Dynamo's graph, rewritten, gives what the module gives; returns its op counts."""
    module = function(call, **layers).eval().requires_grad_(False)
    want = module(*[x.clone() for x in inputs])
    graphs = []

    def backend(gm, example_inputs):
        passes.normalize(gm.graph)
        assert fold_residual_norms(gm.graph) == count
        assert fold_residual_norms(gm.graph) == 0
        gm.graph.lint()
        gm.recompile()
        graphs.append(ops_of(gm))
        return gm.forward

    torch._dynamo.reset()
    got = torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)(
        *[x.clone() for x in inputs]
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert graphs[0]["residual_norm"] == count
    return graphs[0]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("residual_first", [True, False])
def test_gate(weighted, residual_first):
    def forward(m, x, y, gate):
        gated = gate.tanh()[:, None] * m.norm(y)
        return x + gated if residual_first else gated + x

    left = folded(forward, (X, Y, GATE), norm=norm(weighted))
    assert left["rms_norm"] == left["mul"] == left["add"] == 0
    assert left["tanh"] == 1, "of one row a sample, and so not of each token"


def test_spelled_out_without_a_gate():
    left = folded(lambda m, x, y: x + spelled_out(m.norm, y), (X, Y), norm=norm())
    assert left["rsqrt"] == left["mul"] == 0


def test_gate_with_an_offset():
    folded(lambda m, x, y, gate: x + m.norm(y) * (1 + gate[:, None]), (X, Y, GATE), norm=norm())


def test_a_gate_for_each_token():
    folded(lambda m, x, y: x + y * m.norm(y), (X, Y), norm=norm())


def test_an_eps_that_is_a_symbol():
    """dynamic=True makes one of every number that is a module's attribute."""
    folded(lambda m, x, y: x + m.norm(y), (X, Y), dynamic=True, norm=norm())


def test_a_residual_that_is_normalised():
    folded(lambda m, x: x + m.norm(x), (X,), norm=norm())


def test_two_in_a_row():
    def forward(m, x, y, gate):
        x = x + gate[:, None] * m.norm(y)
        return x + gate[:, None] * m.norm(x * 2)

    folded(forward, (X, Y, GATE), 2, norm=norm())


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x, y, gate: x + gate[:, None] * nn.functional.layer_norm(y, (C,)),
        lambda m, x, y, gate: (n := m.norm(y)) * 2 + (x + gate[:, None] * n),  # n is read twice
        lambda m, x, y, gate: torch.add(x, m.norm(y), alpha=2),
        lambda m, x, y, gate: x[:, :1] + m.norm(y),  # a residual that is broadcast
        lambda m, x, y, gate: x + (m.norm(y) + m.norm.weight),
    ],
)
def test_left_alone(call):
    folded(call, (X, Y, GATE), 0, norm=norm())


def test_a_width_the_kernel_has_not():
    module = nn.RMSNorm(6, dtype=torch.float64)
    folded(lambda m, x, y: x + m.norm(y), (normal(2, 3, 6), normal(2, 3, 6)), 0, norm=module)


def test_a_write_in_between():
    def forward(m, x, y, gate):
        gated = gate[:, None] * m.norm(y)
        y.mul_(2)
        return x + gated + y

    folded(forward, (X, Y, GATE), 0, norm=norm())
