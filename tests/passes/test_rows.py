from fnmatch import fnmatchcase
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lynx_compile import attach, compile_blocks, passes
from lynx_compile.calibration import emulate
from lynx_compile.calibration.text_rows import text_rows_of
from lynx_compile.profile import Branch
from lynx_compile.runtime import ops, semantics
from tests import zoo

from .graphs import function, ops_of, traced

X = torch.randn(2, 7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tokens", [1, 3, -1, -3])
def test_tokens_of_one_end_are_dense_and_the_rest_shares_a_sparsify(tokens):
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
    end, others = (slice(0, tokens), slice(tokens, 7)) if tokens > 0 else (slice(tokens, 7), slice(0, tokens))
    s = semantics.sparsify(X[:, others].reshape(-1, 64))
    for layer, y in zip((q, k), gm(X), strict=True):
        rest = semantics.sparse_linear(s.pruned, s.scale, s.t, layer.weight, bias=layer.bias)
        torch.testing.assert_close(y[:, end], layer(X)[:, end])
        torch.testing.assert_close(y[:, others].reshape(rest.shape), rest)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(-9, 9).filter(bool),
    st.integers(1, 3),
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from((0, 4, 99)),
)
def test_any_number_of_tokens_at_either_end(tokens, samples, length, produced, least):
    """Also more than a sample has, which leaves nothing to be sparse; also where the run time chooses."""
    layer = attach(nn.Linear(64, 32).double().requires_grad_(False), decision="sparse", dense_tokens=tokens)
    x = torch.randn(samples, length, 64, dtype=torch.float64)
    gm = traced(function(lambda m, x: m.q(F.gelu(x) if produced else x), q=layer), x)
    (linear,) = passes.find_linears(gm.graph)
    linear.min_tokens = least
    passes.sparsify_linears(gm.graph, passes.split_rows(gm.graph, [linear]))
    for fuse in passes.FUSIONS:
        fuse(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert (ops_of(gm)["linears"], ops_of(gm)["cat"]) == (least > 1, 0)
    made = F.gelu(x) if produced else x
    text, others = semantics.split_tokens(made, tokens)
    s = semantics.sparsify(others.reshape(-1, 64))
    rest = semantics.sparse_linear(s.pruned, s.scale, s.t, layer.weight, bias=layer.bias)
    if others.shape[0] * others.shape[1] < least:
        rest = F.linear(others, layer.weight, layer.bias)
    want = semantics.join_tokens(
        F.linear(text, layer.weight, layer.bias), rest.reshape(samples, others.shape[1], 32), tokens
    )
    torch.testing.assert_close(gm(x), want)


def test_the_last_tokens_of_a_model_stay_dense():
    model, inputs = zoo.build("ZImageTransformer2DModel")
    glob, tokens = text_rows_of(model, (), inputs)
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    names = [name for name in linears if fnmatchcase(name, glob) and "adaLN" not in name]
    branches = {name: Branch(dense_tokens=tokens) for name in names}
    with torch.no_grad():
        dense = model(**inputs)[0][0]
        with emulate(model, {name: Branch() for name in names}):
            everything = model(**inputs)[0][0]
        with emulate(model, branches):
            want = model(**inputs)[0][0]
        for name, linear in linears.items():
            chosen = (
                {"decision": "sparse", "dense_tokens": tokens} if name in names else {"decision": "dense"}
            )
            attach(linear, **chosen)
        compile_blocks(model, emulate=True, rest="eager", min_tokens=0)
        got = model(**inputs)[0][0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    assert len({round((y - dense).norm().item(), 4) for y in (got, everything, dense)}) == 3


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


@pytest.mark.parametrize(
    ("producer", "name"),
    [
        (lambda m, x, c: F.gelu(x), "gelu"),
        (lambda m, x, c: F.layer_norm(x, (64,)) * (1 + c[:, None]) + c[:, None] * 2, "layer_norm"),
        (lambda m, x, c: F.silu(x) * (x + 1), "silu_mul"),
        (lambda m, x, c: torch.cat([x, F.gelu(x * 2)], 2), "cat_gelu"),
    ],
)
@pytest.mark.parametrize("tokens", [3, -3])
def test_what_makes_the_input_folds_all_the_same(producer, name, tokens):
    width = 128 if name.startswith("cat") else 64
    q, k = (
        attach(nn.Linear(width, n).double().requires_grad_(False), decision="sparse", dense_tokens=tokens)
        for n in (64, 128)
    )

    def forward(m, x, c):
        h = producer(m, x, c)
        return torch.cat([m.q(h), m.k(h)], 2)

    c = torch.randn(2, 64, dtype=torch.float64)
    gm = traced(function(forward, q=q, k=k), X, c)
    end, others = (slice(0, 3), slice(3, 7)) if tokens > 0 else (slice(4, 7), slice(0, 4))
    want = gm(X, c)[:, end]
    linears = passes.split_rows(gm.graph, passes.find_linears(gm.graph))
    passes.sparsify_linears(gm.graph, linears)
    gm.graph.lint()
    gm.recompile()
    before = gm(X, c)
    for fuse in passes.FUSIONS:
        fuse(gm.graph)
    gm.graph.lint()
    gm.recompile()
    counts = ops_of(gm)
    assert (counts[f"sparsify:{name}"], counts["linear"], counts["cat"]) == (1, 2, 1 + name.startswith("cat"))
    (together,) = [node for node in gm.graph.nodes if node.target is ops.sparse_linears]
    assert together.args[-1] == ["top" if tokens > 0 else "bottom"] * 2
    torch.testing.assert_close(gm(X, c), before)
    torch.testing.assert_close(before[:, end], want)
    dense = torch.cat([layer(producer(None, X, c)) for layer in (q, k)], 2)
    assert 0.01 < (before - dense)[:, others].norm() / dense[:, others].norm() < 0.5


def test_an_input_that_is_read_elsewhere_too_is_made_once():
    q = attach(nn.Linear(64, 64).double().requires_grad_(False), decision="sparse", dense_tokens=3)
    gm = traced(function(lambda m, x: (lambda h: m.q(h) + h)(F.gelu(x)), q=q), X)
    passes.sparsify_linears(gm.graph, passes.split_rows(gm.graph, passes.find_linears(gm.graph)))
    assert ops_of(gm)["gelu"] == 1


def test_a_modulation_without_samples_is_not_cut():
    q = attach(nn.Linear(64, 64).double().requires_grad_(False), decision="sparse", dense_tokens=3)
    x, by_token = X[:1], X[1]
    forward = lambda m, x, c: m.q(F.layer_norm(x, (64,)) * (1 + c) + c)  # noqa: E731
    gm = traced(function(forward, q=q), x, by_token)
    linears = passes.split_rows(gm.graph, passes.find_linears(gm.graph))
    passes.sparsify_linears(gm.graph, linears)
    gm.graph.lint()
    gm.recompile()
    made = F.layer_norm(x, (64,)) * (1 + by_token) + by_token
    torch.testing.assert_close(gm(x, by_token)[:, :3], q(made)[:, :3])


def written_in_front(m, x):
    h = x * 2
    g = F.gelu(h)
    h.mul_(2)
    return m.q(g) + h


def written_behind(m, x):
    g = F.gelu(x * 2)
    g.add_(1)
    return m.q(g)


@pytest.mark.parametrize("forward", [written_in_front, written_behind])
def test_an_input_is_not_made_again_over_a_write(forward):
    q = attach(nn.Linear(64, 64).double().requires_grad_(False), decision="sparse", dense_tokens=3)
    want = forward(SimpleNamespace(q=q), X)
    gm = traced(function(forward, q=q), X)
    passes.normalize(gm.graph)
    linears = passes.split_rows(gm.graph, passes.find_linears(gm.graph))
    passes.sparsify_linears(gm.graph, linears)
    for fuse in passes.FUSIONS:
        fuse(gm.graph)
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(X)[:, :3], want[:, :3])
    assert ops_of(gm)["gelu"] == 1


def test_what_is_joined_may_be_written_to_between_layers_that_read_it():
    q = attach(nn.Linear(64, 64).double().requires_grad_(False), decision="sparse", dense_tokens=3)
    k, v = (nn.Linear(64, 64).double().requires_grad_(False) for _ in range(2))

    def forward(m, x):
        y = m.q(x)
        a = m.k(y)
        y.add_(a)
        return a, m.v(y)

    gm = traced(function(forward, q=q, k=k, v=v), X)
    passes.normalize(gm.graph)
    passes.sparsify_linears(gm.graph, passes.split_rows(gm.graph, passes.find_linears(gm.graph)))
    gm.graph.lint()
    gm.recompile()

    def sparse(layer, x):
        s = semantics.sparsify(x.reshape(-1, 64))
        return semantics.sparse_linear(s.pruned, s.scale, s.t, layer.weight, bias=layer.bias).view(x.shape)

    y = semantics.with_dense_tokens(sparse(q, X), X, q.weight, q.bias, 3)
    a = sparse(k, y)
    for got, want in zip(gm(X), (a, sparse(v, y + a)), strict=True):
        torch.testing.assert_close(got, want)
    assert ops_of(gm)["sparsify:identity"] == 3
