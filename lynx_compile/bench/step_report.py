"""The table and the plot of `rt-lynx bench step`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# key in a row → heading and colour of its bar, bottom first
PARTS = {
    "gemm_ms": ("GEMM", "#4c72b0"),
    "sparsify_ms": ("sparsify", "#c44e52"),
    "attention_ms": ("attention", "#8172b3"),
    "elementwise_ms": ("elementwise", "#ccb974"),
}


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """One row a measurement; times in ms."""
    table = Table(title="One denoising step, ms on the GPU")
    headings = ("model", "pixels", "batch", "backend", "step", *(heading for heading, _ in PARTS.values()))
    for heading in (*headings, "host", "compile s", "peak GiB", "W", "sparse FLOPs", "vs Inductor"):
        table.add_column(heading, justify="left" if heading in ("model", "backend") else "right")
    for row in rows:
        speedup = row["speedup_vs_inductor"]
        table.add_row(
            row["model"],
            str(row["resolution"]),
            str(row["batch"]),
            row["backend"],
            f"{row['step_ms']:.1f}",
            *(f"{row[key]:.1f}" for key in PARTS),
            f"{row['host_ms']:.1f}",
            "–" if row["compile_s"] is None else f"{row['compile_s']:.1f}",
            f"{row['peak_gib']:.2f}",
            f"{row['power_w']:.0f}",
            f"{row['sparse_flops_share']:.1%}",
            "–" if speedup is None else f"{speedup:.3f}×",
        )
    console.print(table)


def plot(rows: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """Stacked bars of the parts of a step: one bar a backend, one panel a model, resolution and batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["model"], row["resolution"], row["batch"]) for row in rows))
    figure, grid = plt.subplots(
        1, len(panels), figsize=(1.5 + 4.0 * len(panels), 5.2), squeeze=False, layout="constrained"
    )
    for axes, panel in zip(grid[0], panels, strict=True):
        shown = [row for row in rows if (row["model"], row["resolution"], row["batch"]) == panel]
        bottoms = [0.0] * len(shown)
        positions = range(len(shown))
        for key, (label, colour) in PARTS.items():
            heights = [row[key] for row in shown]
            axes.bar(positions, heights, 0.7, bottom=bottoms, label=label, color=colour)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        for position, row, top in zip(positions, shown, bottoms, strict=True):
            axes.text(position, top, f"{row['step_ms']:.1f}", ha="center", va="bottom", fontsize=8)
        axes.set_xticks(positions, [row["backend"] for row in shown], rotation=30, ha="right", fontsize=8)
        axes.set_title("{} {} px, batch {}".format(*panel), fontsize=9)
        axes.set_ylabel("ms")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
