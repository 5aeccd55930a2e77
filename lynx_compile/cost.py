"""What a linear layer costs, dense and sparse: sympy expressions fitted to measured tables.

With M tokens, N output channels, K input channels and a LoRA branch of rank R (times in milliseconds):

    t_dense(M, N, K)     = Max(c0 + c1·waves·K + c2·M·N·K + c3·bytes,          bytes / copy)
    t_gemm(M, N, K, R)   = the same with K + 2·R for K: a dense wgmma step costs two sparse ones
    t_sparsify(M, K, R)  = Max(c0 + c1·bytes + c2·M·K·R + c3·K·R,              bytes / copy)

`waves` is the number of rounds in which the chip works off the 128 × 256 output tiles (latency: an idle
multiprocessor still waits), M·N·K the energy that a power-bound chip pays, K·R what a block spends on the
branch's whole weight however few its rows are, `bytes` what moves to and from memory, `copy` the measured
copy bandwidth. The coefficients are non-negative and minimise the relative error over the rows measured on
the device; the rows are data (`lynx_compile/data/<device>.json`, written from `rt-lynx bench gemm --json`),
nothing is fitted by hand. A device without sparsify rows gets the floor: its bytes at copy bandwidth.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import sympy

from .files import write_whole

SCHEMA = 1
TILE_M, TILE_N = 128, 256
ELEMENT = 2  # bytes of bf16 and fp16
MAX_TOKENS = 1 << 16  # beyond this, no layer of a diffusion transformer has a break-even left to find
TOKEN_STEP = 64

_GIVEN = ("multiprocessors", "copy_tb_s")  # what a table says of its device besides the measured rows
_MEASURED = ("dense", "sparsify", "gemm")

M, N, K, R = sympy.symbols("M N K R", integer=True, positive=True)


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one linear layer: dense; and sparse, as sparsify (its share) plus GEMM."""

    dense_ms: float
    sparsify_ms: float
    gemm_ms: float

    @property
    def sparse_ms(self) -> float:
        return self.sparsify_ms + self.gemm_ms

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.sparse_ms


@dataclass(frozen=True, eq=False)
class CostModel:
    """The three expressions of one device, in milliseconds, and how far they are from the measured rows.

    dense: in M, N, K.  gemm: in M, N, K, R.  sparsify: in M, K, R.  errors: mean relative error by name.
    """

    device: str
    dense: sympy.Expr
    sparsify: sympy.Expr
    gemm: sympy.Expr
    errors: dict[str, float]

    def evaluate(self, m: Any, n: int, k: int, rank: int) -> tuple[Any, Any, Any]:
        """(dense, sparsify, gemm) in ms; m may be an array."""
        dense, sparsify, gemm = _functions(self)
        return dense(m, n, k), sparsify(m, k, rank), gemm(m, n, k, rank)


def devices() -> list[str]:
    """The devices a table was measured on, by the name `predict` takes."""
    folder = resources.files("lynx_compile").joinpath("data")
    return sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json"))


def device_key(name: str) -> str | None:
    """The table for a device as CUDA names it ("NVIDIA H200" → "h200"); None if it was never measured."""
    for key in devices():
        if key == name.lower() or any(part.lower() in name.lower() for part in _table(key)["names"]):
            return key
    return None


def predict(
    device: str, m: int, n: int, k: int, rank: int = 0, shared: int = 1, deflated: bool = False
) -> Prediction:
    """Time of an (M, N, K) linear layer on a device of `devices()`.

    rank: of the LoRA branch. shared: how many layers read the same X and so share one sparsify. deflated: the
    branch leaves X before it is pruned, which reads X once more and takes the time of two such passes.
    Raises ValueError for an unknown device.
    """
    dense, sparsify, gemm = model(device).evaluate(m, n, k, rank)
    if deflated:
        sparsify = sparsify + 2 * ELEMENT * m * k / (_table(device)["copy_tb_s"] * 1e9)
    return Prediction(float(dense), float(sparsify) / shared, float(gemm))


@cache
def break_even_tokens(device: str, n: int, k: int, rank: int = 0, shared: int = 1) -> int | None:
    """The least M, a multiple of 64, from which on sparse stays faster than dense; None if it never is."""
    tokens = np.arange(TOKEN_STEP, MAX_TOKENS + 1, TOKEN_STEP)
    dense, sparsify, gemm = model(device).evaluate(tokens, n, k, rank)
    loses = np.flatnonzero(sparsify / shared + gemm >= dense)
    if loses.size == 0:
        return TOKEN_STEP
    return None if loses[-1] + 1 == tokens.size else int(tokens[loses[-1] + 1])


@cache
def model(device: str) -> CostModel:
    """The fitted expressions of a device. Raises ValueError for an unknown one."""
    if device not in devices():
        raise ValueError(
            f"no cost table for device {device!r}; measured are: {', '.join(devices())}. "
            "Measure yours with `rt-lynx bench gemm --json rows.json`, then `rt-lynx explain --fit rows.json`"
        )
    return fit(device, _table(device))


def fit(device: str, table: dict[str, Any]) -> CostModel:
    """Non-negative least squares of the expressions above over the rows of one table, in relative error."""
    copy = table["copy_tb_s"] * 1e9  # bytes per millisecond
    waves = sympy.ceiling(sympy.ceiling(M / TILE_M) * sympy.ceiling(N / TILE_N) / table["multiprocessors"])
    steps = K + 2 * R
    dense_bytes = ELEMENT * (M * K + N * K + M * N)
    gemm_bytes = ELEMENT * (M * K * sympy.Rational(9, 16) + N * K + M * N + R * (M + N))
    sparsify_bytes = ELEMENT * (M * K * sympy.Rational(25, 16) + R * (M + K)) + 4 * M
    one = sympy.Integer(1)
    dense, dense_error = _fit(
        table["dense"], (M, N, K), [one, waves * K, M * N * K, dense_bytes], dense_bytes / copy
    )
    gemm, gemm_error = _fit(
        table["gemm"], (M, N, K, R), [one, waves * steps, M * N * steps, gemm_bytes], gemm_bytes / copy
    )
    sparsify, sparsify_error = _fit(
        table["sparsify"], (M, K, R), [one, sparsify_bytes, M * K * R, K * R], sparsify_bytes / copy
    )
    return CostModel(
        device, dense, sparsify, gemm, {"dense": dense_error, "sparsify": sparsify_error, "gemm": gemm_error}
    )


def table_from_bench(bench: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """`table` with the rows of a `rt-lynx bench gemm --json` result in place of what was measured before.

    Each row counts twice: with its LoRA branch and without. Raises ValueError when the result holds no
    complete bf16 row.
    """
    keys = ("cublas_ms", "sparsify_ms", "gemm_ms")
    measured = [*bench["rows"], *bench.get("few_tokens", ())]
    rows = [row for row in measured if row["dtype"] in ("bf16", "bfloat16")]
    rows = [row for row in rows if all(row.get(key) for key in keys)]
    if not rows:
        raise ValueError(
            "no bf16 row with cublas_ms, sparsify_ms and gemm_ms in the bench result; run it on a GPU"
        )
    source = f"{bench.get('command', 'rt-lynx bench gemm')} at {bench.get('commit', 'an unknown commit')}"
    ranks = [(row, row["lora_rank"], "") for row in rows]
    ranks += [(row, 0, "_no_lora") for row in rows if row.get("gemm_no_lora_ms")]
    return table | {
        "source": dict.fromkeys(_MEASURED, source),
        "dense": _unique([row["m"], row["n"], row["k"], row["cublas_ms"]] for row in rows),
        "sparsify": _unique([row["m"], row["k"], r, row[f"sparsify{suffix}_ms"]] for row, r, suffix in ranks),
        "gemm": _unique(
            [row["m"], row["n"], row["k"], r, row[f"gemm{suffix}_ms"]] for row, r, suffix in ranks
        ),
    }


def refit(bench: dict[str, Any]) -> tuple[Path, CostModel]:
    """Write the rows of a `rt-lynx bench gemm --json` result as its device's cost table; (file, fit).

    A device without a table needs `multiprocessors` and `copy_tb_s` in the result. Raises ValueError.
    """
    name = bench.get("device", "")
    key = device_key(name)
    if key is None:
        missing = [field for field in ("device", *_GIVEN) if not bench.get(field)]
        if missing:
            raise ValueError(
                f"no cost table for device {name!r} yet, and the bench result lacks {', '.join(missing)}; "
                "run `rt-lynx bench gemm --json` on it again"
            )
        key = "".join(c for c in name.lower().removeprefix("nvidia ") if c.isalnum())
        table = {"schema": SCHEMA, "device": name, "names": [name], **{f: bench[f] for f in _GIVEN}}
    else:
        table = _table(key)
    table = table_from_bench(bench, table)
    costs = fit(key, table)
    path = Path(str(resources.files("lynx_compile").joinpath("data"))) / f"{key}.json"
    write_whole(path, _dump(table).encode())
    for cached in (_table, model, break_even_tokens):
        cached.cache_clear()
    return path, costs


def _dump(table: dict[str, Any]) -> str:
    """JSON with one measured row a line."""
    head = {name: value for name, value in table.items() if name not in _MEASURED}
    rows = {name: ",\n  ".join(json.dumps(row) for row in table[name]) for name in _MEASURED}
    tail = ",\n".join(
        f' "{name}": [\n  {lines}\n ]' if lines else f' "{name}": []' for name, lines in rows.items()
    )
    return json.dumps(head, indent=1).removesuffix("\n}") + ",\n" + tail + "\n}\n"


def load_table(path: str | Path) -> dict[str, Any]:
    """A cost table from a file. Raises ValueError that names the file when it has another schema."""
    table = json.loads(Path(path).read_text())
    if table.get("schema") != SCHEMA:
        raise ValueError(f"{path}: cost table schema {table.get('schema')!r}, this version reads {SCHEMA}")
    return table


@cache
def _table(key: str) -> dict[str, Any]:
    with resources.as_file(resources.files("lynx_compile").joinpath(f"data/{key}.json")) as path:
        return load_table(path)


@cache
def _functions(costs: CostModel) -> tuple[Any, Any, Any]:
    return (
        _numeric((M, N, K), costs.dense),
        _numeric((M, K, R), costs.sparsify),
        _numeric((M, N, K, R), costs.gemm),
    )


def _numeric(symbols: tuple[sympy.Symbol, ...], expression: sympy.Expr) -> Any:
    return sympy.lambdify(symbols, expression, [{"Max": np.maximum, "ceiling": np.ceil}, "numpy"])


def _fit(
    rows: Sequence[Sequence[float]],
    symbols: tuple[sympy.Symbol, ...],
    terms: list[sympy.Expr],
    floor: sympy.Expr,
) -> tuple[sympy.Expr, float]:
    """(Max(Σ c·term, floor), mean relative error) over rows of symbol values and a time."""
    if not rows:
        return floor, 0.0
    values, times = np.array(rows, dtype=float)[:, :-1], np.array(rows, dtype=float)[:, -1]
    columns = [np.broadcast_to(_numeric(symbols, term)(*values.T), times.shape) for term in terms]
    coefficients = _non_negative_least_squares(np.stack(columns, 1) / times[:, None], np.ones_like(times))
    total = sympy.Add(*(sympy.Float(c, 6) * term for c, term in zip(coefficients, terms, strict=True) if c))
    expression = sympy.Max(total, floor)
    predicted = _numeric(symbols, expression)(*values.T)
    return expression, float(np.mean(np.abs(predicted / times - 1)))


def _non_negative_least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """argmin ‖a·c − b‖ with c ≥ 0, by trying every support: there are at most four columns."""
    best, best_error = np.zeros(a.shape[1]), float(np.sum(b * b))
    scale = np.abs(a).max(axis=0)
    scale[scale == 0] = 1.0
    for size in range(1, a.shape[1] + 1):
        for support in map(list, itertools.combinations(range(a.shape[1]), size)):
            solution = np.linalg.lstsq(a[:, support] / scale[support], b, rcond=None)[0] / scale[support]
            error = float(np.sum((a[:, support] @ solution - b) ** 2))
            if (solution >= 0).all() and error < best_error * (1 - 1e-9):
                best, best_error = np.zeros(a.shape[1]), error
                best[support] = solution
    return best


def _unique(rows: Any) -> list[list[float]]:
    """Rows without repeated keys (all but the last column), the least time of each kept."""
    least: dict[tuple[float, ...], float] = {}
    for *key, value in rows:
        least[tuple(key)] = min(value, least.get(tuple(key), value))
    return [[*key, value] for key, value in sorted(least.items())]
