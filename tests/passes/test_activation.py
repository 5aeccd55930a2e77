import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lynx_compile.passes.activation import fold_activations

from .graphs import check_fusion, deflating, function

X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
SPELLINGS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": torch.relu,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_chain(name):
    mlp = function(lambda m, x: m.b(SPELLINGS[name](m.a(x))), a=nn.Linear(64, 128), b=nn.Linear(128, 64))
    before = {"sparsify:identity": 2, "sparse_linear": 2}
    after = {"sparsify:identity": 1, f"sparsify:{name}": 1, "sparse_linear": 2, name.removesuffix("_tanh"): 0}
    check_fusion(mlp, [X], fold_activations, before, after)


def test_silu_spelled_out_and_behind_a_reshape():
    layer = nn.Linear(64, 64)
    module = function(lambda m, x: m.a((x * torch.sigmoid(x)).reshape(-1, 64)), a=layer)
    check_fusion(module, [X], fold_activations, {"mul": 1, "sigmoid": 1}, {"mul": 0, "sparsify:silu": 1})


def test_kept_when_something_else_reads_it():
    def forward(m, x):
        h = F.gelu(x)
        return m.a(h) + h

    after = {"gelu": 1, "sparsify:identity": 1}
    check_fusion(function(forward, a=nn.Linear(64, 64)), [X], fold_activations, after, after, count=0)


def test_not_moved_over_a_write_to_its_input():
    def forward(m, x):
        h = F.gelu(x)
        x.add_(1)
        return m.a(h)

    unchanged = {"gelu": 1, "sparsify:identity": 1}
    module = function(forward, a=nn.Linear(64, 64))
    check_fusion(module, [X], fold_activations, unchanged, unchanged, count=0)


def test_a_stretch_in_a_narrower_dtype_keeps_its_rounding():
    def forward(m, x):
        return m.a(F.gelu(x.float()).double())

    unchanged = {"gelu": 1, "sparsify:identity": 1}
    module = function(forward, a=nn.Linear(64, 64))
    check_fusion(module, [X], fold_activations, unchanged, unchanged, count=0)


def test_not_folded_when_what_it_yields_is_written_to():
    """The write is on the cast between the activation and the layer."""

    def forward(m, x):
        h = F.silu(x.float()).double()
        h.mul_(2)
        return m.a(h.float().double())

    unchanged = {"silu": 1, "sparsify:identity": 1}
    module = function(forward, a=nn.Linear(64, 64))
    check_fusion(module, [X], fold_activations, unchanged, unchanged, count=0)


def test_a_rounding_between_two_casts_is_kept():
    unchanged = {"silu": 1, "sparsify:identity": 1}
    module = function(lambda m, x: m.a(F.silu(x).float().double()), a=nn.Linear(64, 64))
    check_fusion(module, [X], fold_activations, unchanged, unchanged, count=0)


def test_in_front_of_a_layer_that_deflates():
    before, after = {"sparsify:identity": 1, "gelu": 1}, {"sparsify:gelu": 1, "gelu": 0}
    check_fusion(function(lambda m, x: m.a(F.gelu(x)), a=deflating()), [X], fold_activations, before, after)
