import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lynx_compile.passes.concat import fold_concatenations

from .graphs import check_fusion, function

G = torch.Generator().manual_seed(0)
A, B, ODD = (torch.randn(2, 5, width, generator=G) for width in (64, 128, 32))


@pytest.mark.parametrize(
    ("act", "name"), [(lambda x: F.gelu(x, approximate="tanh"), "cat_gelu_tanh"), (lambda x: x, "cat")]
)
def test_flux_single_block(act, name):
    module = function(lambda m, a, b: m.out(torch.cat([a, act(b)], dim=2)), out=nn.Linear(192, 64))
    after = {f"sparsify:{name}": 1, "cat": 0, "gelu": 0}
    check_fusion(module, [A, B], fold_concatenations, {"cat": 1, "sparsify:identity": 1}, after)


@pytest.mark.parametrize(
    ("forward", "inputs"),
    [
        (lambda m, a, b: m.out(torch.cat([a, b, b], -1)[..., :192]), [A, B]),
        (lambda m, a, b: m.out(torch.cat([a, b, a, b], -1)[..., :192]), [ODD, B]),
        (lambda m, a, b: m.out(torch.cat([a, b], 1)), [torch.randn(2, 3, 192), torch.randn(2, 4, 192)]),
        (lambda m, a, b: m.out(torch.cat([a, b], -1)), [torch.randn(2, 5, 0), torch.randn(2, 5, 192)]),
        (lambda m, a, b: m.out(torch.cat([a, b], -1)), [torch.randn(2, 5, 192), torch.randn(2, 5, 0)]),
    ],
    ids=["three parts", "narrow first part", "along tokens", "nothing in front", "nothing behind"],
)
def test_left_alone(forward, inputs):
    unchanged = {"cat": 1, "sparsify:identity": 1}
    module = function(forward, out=nn.Linear(192, 64))
    check_fusion(module, inputs, fold_concatenations, unchanged, unchanged, count=0)


def test_an_input_written_after_its_activation_was_taken():
    """gelu(b) is both halves: folding the second would read b after the write (found by fuzzing)."""

    def forward(m, a, b):
        inner = b * 2
        act = F.gelu(inner)
        inner.neg_()
        return m.out(torch.cat([act, act], -1)), inner

    unchanged = {"cat": 1, "sparsify:identity": 1}
    module = function(forward, out=nn.Linear(256, 64))
    check_fusion(module, [A, B], fold_concatenations, unchanged, unchanged, count=0)
