"""The bench's table, plot and documentation blocks from a result, and what it says without a GPU."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from lynx_compile.bench import gemm, report, timing
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
        "chains": [chain | {"inductor_ms": 0.48, "total_ms": 0.3, "speedup": 1.6}],
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
