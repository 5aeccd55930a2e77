"""The table and the plot of `rt-lynx bench gemm`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# key in a row → heading, in the order of the table
TIMES = {
    "cublas_ms": "cuBLAS bf16",
    "pytorch_spmm_ms": "PyTorch SpMM",
    "cusparselt_ms": "cuSPARSELt GEMM",
    "fp8_rowwise_ms": "fp8 rowwise GEMM",
    "sparsify_ms": "sparsify",
    "gemm_ms": "sparse GEMM",
    "total_ms": "total",
    "total_no_lora_ms": "total, no LoRA",
}
CHAIN_TIMES = {
    "inductor_ms": "Inductor",
    "sparsify_ms": "sparsify",
    "gemm_ms": "sparse GEMM",
    "total_ms": "total",
    "total_no_lora_ms": "total, no LoRA",
}
PLOTTED = {
    "pytorch_spmm_ms": "PyTorch SpMM (sparsify + GEMM)",
    "cusparselt_ms": "cuSPARSELt (GEMM alone)",
    "total_ms": "lynx-compile, everything, LoRA",
    "total_no_lora_ms": "lynx-compile, everything, no LoRA",
}


def show(result: dict[str, Any], console: Console) -> None:
    """Print the shapes, the chains and their geometric means."""
    table = Table(title="One linear layer, ms (sparsify + GEMM measured as one sequence: total)")
    for heading in ("M", "N", "K", *TIMES.values(), "speed-up"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        times = ["–" if row[key] is None else f"{row[key]:.4f}" for key in TIMES]
        table.add_row(*(str(row[key]) for key in "mnk"), *times, f"{row['speedup']:.2f}×")
    console.print(table)
    chains = Table(title="Producer and linear layer, ms (with the producer in sparsify)")
    for heading in ("chain", "M", "N", "K", *CHAIN_TIMES.values(), "speed-up"):
        chains.add_column(heading, justify="left" if heading == "chain" else "right")
    for row in result["chains"]:
        times = [f"{row[key]:.4f}" for key in CHAIN_TIMES]
        chains.add_row(row["chain"], *(str(row[key]) for key in "mnk"), *times, f"{row['speedup']:.2f}×")
    console.print(chains)
    console.print(
        f"geometric mean: {_times(result['geomean_speedup'])} over the shapes, "
        f"{_times(result['geomean_chain_speedup'])} over the chains; "
        f"{result['power_w']:.0f} W, {result['clock_mhz']:.0f} MHz under load"
    )


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}×"


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Speed-up over cuBLAS for each shape and method, as a bar chart."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    figure, axes = plt.subplots(figsize=(12, 4.5), layout="constrained")
    width = 0.8 / len(PLOTTED)
    for i, (key, label) in enumerate(PLOTTED.items()):
        heights = [row["cublas_ms"] / row[key] if row[key] else 0 for row in rows]
        axes.bar(
            [x + (i - (len(PLOTTED) - 1) / 2) * width for x in range(len(rows))], heights, width, label=label
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), ["{m}×{n}\n×{k}".format(**row) for row in rows])
    axes.set_ylabel("speed-up over cuBLAS")
    axes.set_title(f"{result.get('device', '')}: linear layers (M×N×K), {result['power_w']:.0f} W")
    axes.legend(ncols=2, loc="upper left")
    axes.margins(y=0.25)  # room for the legend
    figure.savefig(path, dpi=150)
    plt.close(figure)
