"""`runtime.semantics` against brute force: the definition itself is checked by independent, scalar code."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lynx_compile.runtime import semantics


def brute_force_keep(q: list[float]) -> list[bool]:
    keep = []
    for start in range(0, len(q), 4):
        group = [math.inf if math.isnan(v) else v for v in q[start : start + 4]]
        best = sorted(range(4), key=lambda i: (-group[i], i))[:2]
        keep += [i in best for i in range(4)]
    return keep


finite = st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 1e-40, 3e38])
special = st.sampled_from([math.nan, math.inf, -math.inf])


@given(st.lists(finite | special | st.floats(-4, 4, width=16), min_size=8, max_size=8))
def test_keep_mask_is_top_two_with_ties_to_the_lower_index(row):
    q = torch.tensor(row, dtype=torch.float64).abs()
    assert semantics.keep_mask(q).tolist() == brute_force_keep(q.tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("compensation", semantics.COMPENSATIONS)
def test_sparse_linear_matches_scalar_arithmetic(dtype, compensation):
    m, k, n, r = 3, 8, 5, 2
    x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    a, b, bias = torch.randn(r, k).to(dtype), torch.randn(n, r).to(dtype), torch.randn(n).to(dtype)
    shift, score = torch.randn(k), torch.rand(k) + 0.5
    got = semantics.sparsify(x, shift=shift, score=score, lora_down=a, compensation=compensation)
    y = semantics.sparse_linear(got.pruned, got.scale, got.t, w, lora_up=b, bias=bias)
    for i in range(m):
        z = (x[i].double() - shift.double()).to(dtype).double()
        q = [abs(z[j].item()) * score[j].item() for j in range(k)]
        keep = torch.tensor(brute_force_keep(q))
        assert torch.equal(got.keep[i], keep)
        pruned = torch.where(keep, z, 0)
        scale = 1.0
        if compensation == "norm":
            scale = math.sqrt(z.square().sum().item() / (pruned.square().sum().item() + 1e-8))
        t = (a.double() @ z).to(dtype).double()
        expected = scale * (w.double() @ pruned) + b.double() @ t + bias.double()
        tolerance = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(y[i].double(), expected, rtol=tolerance, atol=tolerance * 8)


def test_norm_compensation_restores_each_rows_norm():
    x = torch.randn(16, 64, dtype=torch.float64)
    got = semantics.sparsify(x)
    torch.testing.assert_close(
        (got.scale[:, None] * got.pruned).norm(dim=1), x.norm(dim=1), rtol=1e-6, atol=0
    )


def test_an_all_zero_row_gives_exactly_lora_plus_bias():
    x = torch.zeros(2, 64)
    x[1] = torch.randn(64)
    a, b, bias, w = torch.randn(16, 64), torch.randn(8, 16), torch.randn(8), torch.randn(8, 64)
    got = semantics.sparsify(x, lora_down=a)
    y = semantics.sparse_linear(got.pruned, got.scale, got.t, w, lora_up=b, bias=bias)
    assert torch.equal(y[0], bias)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("compensation", semantics.COMPENSATIONS)
def test_a_non_finite_row_poisons_itself_and_no_other(bad, compensation):
    x, w = torch.randn(4, 64), torch.randn(8, 64)
    clean = semantics.sparsify(x, compensation=compensation)
    x_bad = x.clone()
    x_bad[2, 5] = bad
    got = semantics.sparsify(x_bad, compensation=compensation)
    y = semantics.sparse_linear(got.pruned, got.scale, got.t, w)
    reference = semantics.sparse_linear(clean.pruned, clean.scale, clean.t, w)
    others = [0, 1, 3]
    assert torch.equal(y[others], reference[others])
    assert not y[2].isfinite().all()


@pytest.mark.parametrize("activation", list(semantics.ACTIVATIONS))
def test_epilogue_is_residual_plus_gate_times_activation(activation):
    m, n = 6, 8
    pruned, w = torch.randn(m, 64, dtype=torch.float64), torch.randn(n, 64, dtype=torch.float64)
    gate, residual = torch.randn(2, 1, n, dtype=torch.float64), torch.randn(2, 3, n, dtype=torch.float64)
    ones, none = torch.ones(m, dtype=torch.float64), torch.empty(m, 0)
    y = semantics.sparse_linear(
        pruned, ones, none, w, activation=activation, gate=gate, residual=residual
    ).reshape(2, 3, n)
    expected = residual + gate * semantics.ACTIVATIONS[activation]((pruned @ w.T).reshape(2, 3, n))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("samples", [1, 2, 6])
def test_shift_and_bias_hold_one_row_a_sample(samples):
    """Each sample alone with its own row gives the same as all together, whatever shape the rows come in."""
    m, k, n = 6, 64, 16
    x, w, down, up, shift, bias = (
        torch.randn(size, dtype=torch.float64)
        for size in ((m, k), (n, k), (16, k), (n, 16), (samples, 1, k), (samples, n))
    )

    def layer(rows, mu, b):
        got = semantics.sparsify(rows, shift=mu, lora_down=down)
        return semantics.sparse_linear(got.pruned, got.scale, got.t, w, lora_up=up, bias=b)

    parts = [layer(rows, shift[i, 0], bias[i]) for i, rows in enumerate(x.chunk(samples))]
    torch.testing.assert_close(layer(x, shift, bias), torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_deflation_takes_the_leading_directions_out_and_the_branch_carries_them(dtype):
    """X within the span of A₁ crosses the layer exactly, however its channels would have been pruned."""
    m, k, n, rank, deflated = 5, 64, 16, 6, 4
    basis = torch.linalg.qr(torch.randn(k, deflated, dtype=torch.float64))[0].T
    down = torch.cat([basis, torch.randn(rank - deflated, k, dtype=torch.float64)]).to(dtype)
    w, shift = torch.randn(n, k, dtype=torch.float64).to(dtype), torch.randn(k, dtype=torch.float64).to(dtype)
    x0 = torch.randn(m, deflated, dtype=torch.float64) @ basis
    got = semantics.sparsify((x0 + shift).to(dtype), shift=shift, lora_down=down, deflated=deflated)
    t = ((x0 + shift).to(dtype).double() - shift.double()).to(dtype).double() @ down.double().T
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.t.double(), t, rtol=tolerance, atol=tolerance)
    assert got.pruned.double().abs().max() < 4 * tolerance
    up = torch.cat([(w.double() @ basis.T), torch.zeros(n, rank - deflated)], 1).to(dtype)
    bias = w.double() @ shift.double()
    y = semantics.sparse_linear(got.pruned, got.scale, got.t, w, lora_up=up, bias=bias)
    reference = (x0 + shift.double()) @ w.double().T
    torch.testing.assert_close(y.double(), reference, rtol=10 * tolerance, atol=40 * tolerance)


def test_deflation_prunes_what_is_left_and_scales_by_its_norm():
    x, down = torch.randn(3, 64, dtype=torch.float64), torch.randn(2, 64, dtype=torch.float64)
    got = semantics.sparsify(x, lora_down=down, deflated=1)
    z = x - (x @ down[0])[:, None] * down[0]
    plain = semantics.sparsify(z)
    torch.testing.assert_close(got.pruned, plain.pruned)
    torch.testing.assert_close(got.scale, plain.scale)
    torch.testing.assert_close(got.t, x @ down.T)
    with pytest.raises(ValueError, match="deflated=3"):
        semantics.sparsify(x, lora_down=down, deflated=3)


def test_samples_that_do_not_share_the_rows_are_refused():
    with pytest.raises(ValueError, match=r"4 samples cannot share M = 6 rows"):
        semantics.sparsify(torch.randn(6, 64), shift=torch.randn(4, 64))


def modules_for(producer, k):
    """The producer spelled with torch's own modules, on fp64 inputs of shape (2, 3, ·)."""
    x, y = (torch.randn(2, 3, k, dtype=torch.float64) for _ in range(2))
    weight, bias = torch.randn(k, dtype=torch.float64), torch.randn(k, dtype=torch.float64)
    mult, add = torch.randn(2, k, dtype=torch.float64), torch.randn(2, 1, k, dtype=torch.float64)
    act = semantics.ACTIVATIONS.get(producer.removesuffix("_mul").removeprefix("cat_"), lambda v: v)
    if producer in ("layer_norm", "rms_norm"):
        norm = torch.nn.functional.layer_norm if producer == "layer_norm" else torch.nn.functional.rms_norm
        expected = (norm(x, (k,), weight, eps=1e-6) + bias) * (1 + mult[:, None]) + add
        return [x, weight, bias, mult, add], expected
    if producer.startswith("cat"):
        return [x, y], torch.cat([x, act(y)], -1)
    if producer.endswith("_mul"):
        return [x, y], act(x) * y
    return [x], act(x)


@pytest.mark.parametrize("producer", list(semantics.PRODUCERS))
def test_producers_equal_torchs_own_spelling(producer):
    inputs, expected = modules_for(producer, 32)
    got = semantics.produce(producer, inputs, eps=1e-6, mult_offset=1.0)
    torch.testing.assert_close(got, expected.flatten(0, -2))


def test_bad_arguments_name_the_value():
    with pytest.raises(ValueError, match="K = 6"):
        semantics.sparsify(torch.randn(2, 6))
    with pytest.raises(ValueError, match="'nrom'"):
        semantics.sparsify(torch.randn(2, 8), compensation="nrom")
    with pytest.raises(ValueError, match="'gellu'"):
        semantics.produce("gellu", [torch.randn(2, 8)])
