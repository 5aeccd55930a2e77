import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lynx_compile.passes.gated import fold_gated

from .graphs import check_fusion, function

X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))


def geglu(m, x):
    up, gate = m.a(x).chunk(2, dim=-1)
    return m.b(up * F.gelu(gate))


def swiglu(m, x):
    return m.b(F.silu(m.a(x)) * m.c(x))


@pytest.mark.parametrize(
    ("forward", "name", "width"),
    [(geglu, "gelu_mul", 256), (swiglu, "silu_mul", 128)],
    ids=["geglu", "swiglu"],
)
def test_gate(forward, name, width):
    layers = {"a": nn.Linear(64, width), "b": nn.Linear(128, 64), "c": nn.Linear(64, 128)}
    before = {"sparsify:identity": 2, "mul": 1}
    after = {"sparsify:identity": 1, f"sparsify:{name}": 1, "mul": 0, "gelu": 0, "silu": 0}
    check_fusion(function(forward, **layers), [X], fold_gated, before, after)


def test_a_gate_that_broadcasts_is_left():
    module = function(lambda m, x: m.b(F.silu(x[:, :1]) * x), b=nn.Linear(64, 64))
    unchanged = {"mul": 1, "silu": 1, "sparsify:identity": 1}
    check_fusion(module, [X], fold_gated, unchanged, unchanged, count=0)
