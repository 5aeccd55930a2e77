"""The cost model: fitted expressions against measured rows, break-even, refitting."""

import json

import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from lynx_compile import cost

SHAPES = st.sampled_from(
    [(3072, 3072), (9216, 3072), (12288, 3072), (3072, 12288), (3072, 15360), (3840, 3840)]
)


@pytest.mark.parametrize("device", cost.devices())
def test_every_table_fits_its_rows(device):
    costs = cost.model(device)
    assert max(costs.errors.values()) < 0.10, costs.errors
    for m, n, k, ms in cost._table(device)["dense"]:
        assert cost.predict(device, m, n, k).dense_ms == pytest.approx(ms, rel=0.25)


def test_expressions_are_in_the_symbolic_token_count():
    costs = cost.model("h200")
    assert costs.dense.free_symbols == {cost.M, cost.N, cost.K}
    assert costs.sparsify.free_symbols == {cost.M, cost.K, cost.R}
    at = costs.gemm.subs({cost.N: 3072, cost.K: 3072, cost.R: 64})
    assert at.free_symbols == {cost.M}
    predicted = cost.predict("h200", 4096, 3072, 3072, 64).gemm_ms
    assert float(at.subs(cost.M, 4096)) == pytest.approx(predicted, rel=1e-5)


@given(SHAPES, st.integers(1, 20000), st.sampled_from([0, 16, 64, 256]))
def test_times_grow_with_work(shape, m, rank):
    n, k = shape
    here, more = cost.predict("h200", m, n, k, rank), cost.predict("h200", 2 * m, n, k, rank)
    assert 0 < here.dense_ms <= more.dense_ms
    assert 0 < here.sparsify_ms <= more.sparsify_ms
    assert 0 < here.gemm_ms <= more.gemm_ms
    assert cost.predict("h200", m, n, k, rank + 64).sparse_ms >= here.sparse_ms
    assert here.speedup == pytest.approx(here.dense_ms / (here.sparsify_ms + here.gemm_ms))


@given(SHAPES, st.sampled_from([0, 64]), st.sampled_from([1, 3]))
def test_break_even_is_where_sparse_starts_to_win_for_good(shape, rank, shared):
    n, k = shape
    tokens = cost.break_even_tokens("h200", n, k, rank, shared)
    assert tokens is not None
    assert tokens % cost.TOKEN_STEP == 0
    dense, sparsify, gemm = cost.model("h200").evaluate(
        np.arange(tokens, cost.MAX_TOKENS + 1, cost.TOKEN_STEP), n, k, rank
    )
    assert (sparsify / shared + gemm < dense).all()
    if tokens > cost.TOKEN_STEP:
        just_below = cost.predict("h200", tokens - cost.TOKEN_STEP, n, k, rank, shared)
        assert just_below.sparse_ms >= just_below.dense_ms


def test_sharing_a_sparsify_lowers_the_break_even():
    assert cost.break_even_tokens("h200", 3072, 3072, 64, 3) <= cost.break_even_tokens(
        "h200", 3072, 3072, 64, 1
    )


def test_fit_recovers_known_coefficients():
    m, n, k = sympy.symbols("m n k")
    rows = [
        (a, b, c, 0.002 + 3e-12 * a * b * c) for a in (512, 4096) for b in (512, 3072) for c in (512, 8192)
    ]
    expression, error = cost._fit(rows, (m, n, k), [sympy.Integer(1), m * n * k, m * k], sympy.Integer(0))
    assert error < 1e-4
    assert float(expression.subs({m: 1024, n: 1024, k: 1024})) == pytest.approx(
        0.002 + 3e-12 * 2**30, rel=1e-3
    )


def test_fit_never_uses_a_negative_coefficient():
    rows = [(1.0, 2.0), (2.0, 1.0)]  # falls with x: the best non-negative line is a constant
    x = sympy.Symbol("x")
    expression, _ = cost._fit(rows, (x,), [sympy.Integer(1), x], sympy.Integer(0))
    assert not expression.free_symbols


def test_a_bench_result_replaces_the_rows(tmp_path):
    def row(m, n, k, rank, dtype="bf16"):
        return {"m": m, "n": n, "k": k, "dtype": dtype, "lora_rank": rank, "cublas_ms": 3e-12 * m * n * k,
                "sparsify_ms": 1e-9 * m * k, "gemm_ms": 1.5e-12 * m * n * (k + 2 * rank)}  # fmt: skip

    rows = [row(m, n, k, 64) for m in (512, 4096) for n, k in [(3072, 3072), (12288, 3072), (3072, 12288)]]
    bench = {"command": "rt-lynx bench gemm", "commit": "abc", "rows": [*rows, row(64, 64, 64, 0, "fp16")]}
    table = cost.table_from_bench(bench, cost._table("h200"))
    assert len(table["dense"]) == len(table["gemm"]) == 6
    assert len(table["sparsify"]) == 4  # (4096, 3072) and (512, 3072) once each
    assert "abc" in table["source"]["gemm"]
    refitted = cost.fit("h200", table)
    assert max(refitted.errors.values()) < 0.05
    path = tmp_path / "h200.json"
    path.write_text(json.dumps(table))
    assert cost.load_table(path) == table


def test_bad_input_names_the_value_and_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"'h300'.*measured are: .*h200.*bench gemm"):
        cost.predict("h300", 4096, 3072, 3072)
    with pytest.raises(ValueError, match="no bf16 row"):
        cost.table_from_bench({"rows": []}, cost._table("h200"))
    path = tmp_path / "table.json"
    path.write_text('{"schema": 99}')
    with pytest.raises(ValueError, match=r"table\.json: cost table schema 99, this version reads 1"):
        cost.load_table(path)


@pytest.mark.parametrize(
    ("name", "key"), [("NVIDIA H200", "h200"), ("h200", "h200"), ("NVIDIA H20", None), ("", None)]
)
def test_device_key(name, key):
    assert cost.device_key(name) == key


def test_deflation_costs_two_passes_over_x():
    plain, deflated = (cost.predict("h200", 4096, 12288, 3072, 64, deflated=d) for d in (False, True))
    bytes_moved = 2 * 2 * 4096 * 3072
    extra = deflated.sparse_ms - plain.sparse_ms
    assert extra == pytest.approx(bytes_moved / (cost._table("h200")["copy_tb_s"] * 1e9))
    assert plain.dense_ms == deflated.dense_ms
