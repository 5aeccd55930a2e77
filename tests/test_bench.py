"""The bench's table, plot and documentation blocks from a result, and what it says without a GPU."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from lynx_compile.bench import gemm, host, report, timing
from lynx_compile.cli import app

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def result():
    row = {
        "m": 4096, "n": 3072, "k": 12288, "dtype": "bfloat16", "lora_rank": 64,
        "cublas_ms": 0.45, "pytorch_spmm_ms": 0.5, "cusparselt_ms": None, "fp8_rowwise_ms": 0.27,
        "sparsify_ms": 0.05, "sparsify_no_lora_ms": 0.04, "gemm_ms": 0.26, "gemm_no_lora_ms": 0.25,
        "total_ms": 0.3, "total_no_lora_ms": 0.29, "speedup": 1.5,
    }  # fmt: skip
    chain = {"chain": "gelu → down", "m": 4096, "n": 3072, "k": 12288, "lora_rank": 64}
    return {
        "device": "Some GPU",
        "command": "rt-lynx bench gemm",
        "commit": "abc",
        "power_w": 699.5,
        "clock_mhz": 1500.0,
        "rows": [row],
        "chains": [
            chain
            | {"inductor_ms": 0.48, "sparsify_ms": 0.06, "gemm_ms": 0.28}
            | {"total_ms": 0.3, "total_no_lora_ms": 0.25, "speedup": 1.6}
        ],
        "geomean_speedup": 1.5,
        "geomean_chain_speedup": 1.6,
    }


def test_table_shows_every_figure(result):
    console = Console(record=True, width=160)
    report.show(result, console)
    text = console.export_text()
    for figure in (
        "0.4500",
        "0.5000",
        "–",
        "0.2700",
        "0.2600",
        "0.3000",
        "1.50×",
        "1.60×",
        "700 W",
        "1500 MHz",
    ):
        assert figure in text


def test_plot_is_a_picture(result, tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def tables(tmp_path, monkeypatch, result):
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "gemm_h200.json").write_text(json.dumps(result))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "docs" / "results")
    return module


def test_documentation_blocks_hold_the_figures(tables, tmp_path):
    page = tmp_path / "docs" / "page.md"
    page.write_text("before\n<!-- table: gemm-rates -->\nold\n<!-- end -->\nafter\n")
    assert tables.main(["--check"]) == 1
    assert "old" in page.read_text()
    assert tables.main([]) == 0
    text = page.read_text()
    flops = 2 * 4096 * 3072 * 12288
    assert text.startswith("before\n<!-- table: gemm-rates -->\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    assert f"| {flops / 0.45e-3 / 1e12:.0f} | {flops / 0.25e-3 / 1e12:.0f} |" in text
    assert tables.main(["--check"]) == 0


def test_committed_documentation_shows_committed_results():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--check"]) == 0


def test_geometric_mean():
    assert gemm.geomean([1.0, 4.0]) == 2.0
    assert gemm.geomean([]) is None
    assert math.isclose(gemm.geomean([1.5]), 1.5)


def test_load_leaves_out_the_idle_chip():
    meter = timing.PowerMeter()
    meter._samples = [(80.0, 1980.0), (690.0, 1500.0), (700.0, 1510.0), (695.0, 1505.0), (75.0, 345.0)]
    assert meter.load() == (695.0, 1505.0)
    assert timing.PowerMeter().load() == (0.0, 0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so where there is nothing to measure")
def test_without_a_gpu_it_says_why():
    outcome = CliRunner().invoke(app, ["bench", "gemm"])
    assert outcome.exit_code == 1
    assert "no kernels" in outcome.output


def test_rivals_take_turns_and_each_gets_its_time(monkeypatch):
    order, clock, spent = [], {"fast": 2.0, "slow": 30.0}, {"fast": 0.0, "slow": 0.0}

    def elapsed(run):
        order.append(run)
        spent[run] += clock[run] * (3 if len(order) < 5 else 1)  # the chip warms up
        return clock[run] * (3 if len(order) < 5 else 1)

    monkeypatch.setattr(timing, "_captured", lambda calls: (calls[0], 10))
    monkeypatch.setattr(timing, "_elapsed_ms", elapsed)
    medians = timing.medians_ms({name: [name] for name in clock}, seconds=0.3)
    assert medians == {"fast": 0.2, "slow": 3.0}
    blocks = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert blocks == ["fast", "slow", "fast", "slow", "fast"]  # the order turns round, so neighbours meet
    assert all(time >= 300 * (1 + timing.WARM_SHARE) for time in spent.values())


@pytest.mark.parametrize("chain", gemm.CHAINS, ids=lambda chain: chain.name)
def test_chains_compute_the_same_as_their_dense_rivals(chain, monkeypatch):
    """On the CPU, with the definition: what pruning changes is far less than what a wrong input would."""
    small = chain._replace(shape=(64, 64, 64 * len(chain.inputs)), inputs=tuple(64 for _ in chain.inputs))
    monkeypatch.setattr(gemm, "_normal", lambda *shape, dtype: torch.randn(*shape).to(dtype))
    monkeypatch.setattr(gemm, "sets_needed", lambda size: 1)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    found = {}

    def medians(rivals, seconds):
        found.update({name: calls[0]() for name, calls in rivals.items()})
        return dict.fromkeys(rivals, 1.0)

    monkeypatch.setattr(gemm, "medians_ms", medians)
    row = gemm.measure_chain(small, 16, torch.bfloat16, 0.1)
    assert row["speedup"] == 1.0
    assert set(report.CHAIN_TIMES) <= set(row)
    dense, ours = found["inductor_ms"].flatten().double(), found["total_no_lora_ms"].flatten().double()
    assert torch.corrcoef(torch.stack([dense, ours]))[0, 1] > 0.8
    assert found["total_ms"].shape == found["gemm_ms"].shape == (64, 64)
    assert torch.equal(found["total_ms"], found["gemm_ms"])


def test_a_row_has_every_method(monkeypatch):
    monkeypatch.setattr(gemm, "_normal", lambda *shape, dtype: torch.randn(*shape).to(dtype))
    monkeypatch.setattr(gemm, "sets_needed", lambda size: 2)
    monkeypatch.setattr(gemm, "medians_ms", lambda rivals, seconds: dict.fromkeys(rivals, 2.0))
    row = gemm.measure_shape(64, 64, 64, 16, torch.bfloat16, 0.1)
    assert set(report.TIMES) <= set(row)
    assert row["cusparselt_ms"] is None  # there is none on a CPU
    assert row["total_ms"] == 2.0
    assert not set(gemm.PEERS) & set(gemm.measure_shape(64, 64, 64, 16, torch.bfloat16, 0.1, peers=False))


def test_host_times_every_call(monkeypatch):
    """Of seven calls that take 1 to 7 s the median is 4 s, whatever the op."""
    once = [t for i in range(7) for t in (100 * i, 100 * i + 1 + i)]
    clock = iter(6 * once)
    monkeypatch.setattr(host.time, "perf_counter", lambda: next(clock))
    rows = host.run("cpu", calls=7)
    assert [row["host_us"] for row in rows] == [4e6] * 6
    assert len({row["call"] for row in rows}) == 6
