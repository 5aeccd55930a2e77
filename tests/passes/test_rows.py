import pytest
import torch
from torch import nn

from lynx_compile import attach, passes
from lynx_compile.runtime import semantics

from .graphs import function, ops_of, traced

X = torch.randn(2, 7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tokens", [1, 3])
def test_leading_tokens_are_dense_and_the_rest_shares_a_sparsify(tokens):
    q, k = (
        attach(nn.Linear(64, n).double().requires_grad_(False), decision="sparse", dense_tokens=tokens)
        for n in (64, 128)
    )
    gm = traced(function(lambda m, x: (m.q(x), m.k(x)), q=q, k=k), X)
    linears = passes.split_rows(gm.graph, passes.find_linears(gm.graph))
    passes.sparsify_linears(gm.graph, linears)
    gm.graph.lint()
    gm.recompile()
    counts = ops_of(gm)
    assert (counts["linear"], counts["sparsify:identity"], counts["sparse_linear"], counts["cat"]) == (
        2,
        1,
        2,
        2,
    )
    s = semantics.sparsify(X[:, tokens:].reshape(-1, 64))
    for layer, y in zip((q, k), gm(X), strict=True):
        rest = semantics.sparse_linear(s.pruned, s.scale, s.t, layer.weight, bias=layer.bias)
        torch.testing.assert_close(y[:, :tokens], layer(X)[:, :tokens])
        torch.testing.assert_close(y[:, tokens:].reshape(rest.shape), rest)


def test_an_input_without_a_token_dimension_is_left_whole():
    q = attach(nn.Linear(64, 64).double().requires_grad_(False), decision="sparse", dense_tokens=2)
    gm = traced(function(lambda m, x: m.q(x[0]), q=q), X)
    (linear,) = passes.find_linears(gm.graph)
    assert passes.split_rows(gm.graph, [linear]) == [linear]


def test_the_sparse_rows_keep_their_data():
    q = attach(
        nn.Linear(64, 64).double().requires_grad_(False), down=torch.randn(16, 64), up=torch.randn(64, 16),
        shift=torch.randn(64), dense_tokens=2, deflated=16,
    )  # fmt: skip
    gm = traced(function(lambda m, x: m.q(x), q=q), X)
    (found,) = passes.split_rows(gm.graph, passes.find_linears(gm.graph))
    assert (found.deflated, found.dense_tokens) == (16, 0)
    assert None not in (found.down, found.up, found.shift)
