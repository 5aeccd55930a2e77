import pytest
import torch
from torch import nn

from lynx_compile import attach, passes
from lynx_compile.passes.lora import join_lora
from lynx_compile.passes.site import META

from .graphs import function, ops_of, traced

G = torch.Generator().manual_seed(0)
X = torch.randn(2, 5, 64, generator=G)
SCALE = torch.tensor(0.75)


def low_rank(rank, n=64):
    down, up = nn.Linear(64, rank, bias=False), nn.Linear(rank, n, bias=False)
    return nn.ModuleDict({"a": down, "b": up})


def adapter(m, x, name="lora"):
    branch = getattr(m, name)
    return branch["b"](branch["a"](x))


FORMS = {
    "scaled": (lambda m, x, s: m.base(x) + adapter(m, x) * 0.5, 4, 1),
    "unscaled, swapped": (lambda m, x, s: adapter(m, x) + m.base(x), 16, 1),
    "tensor scale": (lambda m, x, s: m.base(x) + s * adapter(m, x), 4, 1),
    "two": (lambda m, x, s: m.base(x) + adapter(m, x) * 2 + adapter(m, x, "other") * s, 8, 2),
    "cast there and back": (
        lambda m, x, s: (m.base(x) + adapter(m, x.double()).double() * 0.5).double(),
        16,
        1,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_form(form):
    forward, rank, count = FORMS[form]
    module = function(forward, base=nn.Linear(64, 64), lora=low_rank(rank), other=low_rank(rank))
    module = module.double().eval().requires_grad_(False)
    gm = _only_base_sparse(module, X, SCALE)
    want = gm(X.double(), SCALE.double())
    assert join_lora(gm.graph) == count
    assert join_lora(gm.graph) == 0
    gm.graph.lint()
    gm.recompile()
    assert ops_of(gm)["linear"] == 0
    torch.testing.assert_close(gm(X.double(), SCALE.double()), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("deflated", [0, 16])
@pytest.mark.parametrize("shifted", [False, True])
def test_beside_a_compensating_branch(shifted, deflated):
    base = attach(
        nn.Linear(64, 64).double().requires_grad_(False),
        down=torch.randn(16, 64, generator=G),
        up=torch.randn(64, 16, generator=G),
        shift=torch.randn(64, generator=G) if shifted else None,
        decision="sparse",
        deflated=deflated,
    )
    module = function(lambda m, x, s: m.base(x) + adapter(m, x) * s, base=base, lora=low_rank(5))
    module = module.double().eval().requires_grad_(False)
    gm = _only_base_sparse(module, X, SCALE)
    want = gm(X.double(), SCALE.double())
    assert join_lora(gm.graph) == 1
    gm.recompile()
    node = next(node for node in gm.graph.nodes if META in node.meta and hasattr(node.meta[META], "branches"))
    assert [branch.own for branch in node.meta[META].branches] == [True, False]
    torch.testing.assert_close(gm(X.double(), SCALE.double()), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [16, 5])
def test_adapters_with_one_down_projection_share_its_columns(rank):
    """In PEFT's spelling of it: two layers of one x, two up-projections behind one tensor A."""
    first, second = low_rank(rank), low_rank(rank, 32)
    second["a"].weight = first["a"].weight
    module = function(
        lambda m, x, s: torch.cat([m.base(x) + adapter(m, x), m.beside(x) + adapter(m, x, "other") * 2], -1),
        base=nn.Linear(64, 64), beside=nn.Linear(64, 32), lora=first, other=second,
    )  # fmt: skip
    module = module.double().eval().requires_grad_(False)
    gm = _sparse(module, {"base", "beside"}, X, SCALE)
    want = gm(X.double(), SCALE.double())
    assert join_lora(gm.graph) == 2
    gm.recompile()
    (sparsify,) = [node for node in gm.graph.nodes if "sparsify" in str(node.target)]
    assert list(sparsify.meta[META].values()) == [(0, 16)]
    torch.testing.assert_close(gm(X.double(), SCALE.double()), want, rtol=1e-10, atol=1e-10)


def test_an_adapter_that_is_written_to_is_left():
    def forward(m, x, s):
        y, branch = m.base(x), adapter(m, x)
        branch.mul_(2)
        return y + branch

    module = function(forward, base=nn.Linear(64, 64), lora=low_rank(4)).double().eval().requires_grad_(False)
    gm = _only_base_sparse(module, X, SCALE)
    assert join_lora(gm.graph) == 0


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x, s: m.base(x) + adapter(m, x * 2),  # reads another tensor
        lambda m, x, s: m.base(x) + adapter(m, x) * x,  # scaled per element
        lambda m, x, s: m.base(x) - adapter(m, x),
    ],
)
def test_left_alone(forward):
    module = function(forward, base=nn.Linear(64, 64), lora=low_rank(4)).double().eval().requires_grad_(False)
    gm = _only_base_sparse(module, X, SCALE)
    assert join_lora(gm.graph) == 0
    assert ops_of(gm)["linear"] == 2


def _only_base_sparse(module, *inputs):
    return _sparse(module, {"base"}, *inputs)


def _sparse(module, names, *inputs):
    gm = traced(module, *[x.double() for x in inputs])
    passes.normalize(gm.graph)
    chosen = [linear for linear in passes.find_linears(gm.graph) if linear.name in names]
    passes.sparsify_linears(gm.graph, chosen)
    gm.recompile()
    return gm
