"""The table and the plot of `rt-lynx bench layers`, and the table of `rt-lynx bench start`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def label(row: Mapping[str, Any]) -> str:
    """ "attn.to_q, to_k, to_v": the names of a kind, what they have in common said once."""
    first, *others = row["layers"]
    folder = first.rpartition(".")[0] + "."
    return ", ".join([first, *(name.removeprefix(folder) for name in others)])


def show(result: Mapping[str, Any], console: Console) -> None:
    """One row a kind of layer; times in ms."""
    table = Table(title="Linear layers that read one X, ms (sparsify, LoRA and GEMMs as one sequence)")
    headings = ("model", "block", "layers", "blocks", "M", "N", "K", "dense", "sparse", "no LoRA", "speed-up")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i > 2 else "left")
    for row in result["rows"]:
        table.add_row(
            *(row["model"], row["block"], label(row)),
            *(str(row[key]) for key in ("count", "m", "n", "k")),
            *(f"{row[key]:.4f}" for key in ("dense_ms", "total_ms", "total_no_lora_ms")),
            f"{row['speedup']:.2f}×" if row["decision"] == "sparse" else "dense",
        )
    console.print(table)
    for model, speedup in result["averages"].items():
        console.print(f"{model}: its sparse layers are {speedup:.3f}× faster, LoRA included")


def plot(result: Mapping[str, Any], path: str | Path, title: str = "") -> None:
    """Speed-up over the dense layers, one bar a kind that runs sparse, one panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(result["averages"])
    figure, grid = plt.subplots(
        1, len(models), figsize=(1.5 + 4 * len(models), 6), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, model in zip(grid[0], models, strict=True):
        rows = [row for row in result["rows"] if row["model"] == model and row["decision"] == "sparse"]
        for offset, key, name in ((-0.2, "total_ms", "with LoRA"), (0.2, "total_no_lora_ms", "without")):
            heights = [row["dense_ms"] / row[key] for row in rows]
            axes.bar([x + offset for x in range(len(rows))], heights, 0.4, label=name)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.axhline(result["averages"][model], color="tab:blue", linewidth=0.8, linestyle="--")
        names = [f"{label(row)}\n{row['m']}·{row['n']}·{row['k']}" for row in rows]
        axes.set_xticks(range(len(rows)), names, rotation=60, ha="right", fontsize=7)
        axes.set_title(f"{model}: {result['averages'][model]:.2f}×", fontsize=9)
    grid[0][0].set_ylabel("speed-up over dense")
    grid[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def show_start(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One row a backend: seconds before the first step, without and with caches."""
    table = Table(title="Compiling before the first step of a process")
    timed = "first process, s", "second process, s", "of it tracing, s", "faster", "step, ms"
    for heading in ("model", "backend", *timed):
        table.add_column(heading, justify="left" if heading in ("model", "backend") else "right")
    for row in rows:
        table.add_row(
            row["model"],
            row["backend"],
            f"{row['cold_s']:.2f}",
            f"{row['warm_s']:.2f}",
            f"{row['tracing_s']:.2f}",
            f"{row['faster']:.1f}×",
            f"{row['step_ms']:.1f}",
        )
    console.print(table)
