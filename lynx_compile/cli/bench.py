"""`rt-lynx bench`: kernels and denoising steps, measured here."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

TABLE_WIDTH = 140  # columns; narrower terminals and pipes would cut the figures

app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    help="Measure GEMMs and denoising steps against what else can be switched on.",
)


class Shapes(str, Enum):
    """Which M, N, K."""

    all = "all"
    paper = "paper"
    dit = "dit"


@app.callback()
def _bench() -> None:
    pass


@app.command()
def gemm(
    shapes: Annotated[
        Shapes, typer.Option(help="The paper's squares, a DiT's layers, or both.")
    ] = Shapes.all,
    rank: Annotated[int, typer.Option(min=16, max=256, help="Rank of the LoRA branch.")] = 64,
    seconds: Annotated[float, typer.Option(help="Least time of one measurement.")] = 0.3,
    chains: Annotated[bool, typer.Option(help="Also producers fused into the layer.")] = True,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart here.")] = None,
    commit: Annotated[str | None, typer.Option(help="What to record as the commit.")] = None,
) -> None:
    """Linear layers: sparsify + norm + LoRA + sparse GEMM against cuBLAS, PyTorch, cuSPARSELt and fp8."""
    from rich.console import Console

    from ..bench import gemm as measurements
    from ..bench import report
    from ..results import device_name, write_results

    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    chosen = {
        Shapes.all: measurements.PAPER_SHAPES + measurements.DIT_SHAPES,
        Shapes.paper: measurements.PAPER_SHAPES,
        Shapes.dit: measurements.DIT_SHAPES,
    }[shapes]
    try:
        with console.status("compiling kernels") as status:
            result = measurements.run(
                chosen,
                rank=rank,
                seconds=seconds,
                chains=measurements.CHAINS if chains else (),
                progress=status.update,
            )
    except RuntimeError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(1) from error
    report.show(result, console)
    if json is not None:
        details = {key: value for key, value in result.items() if key != "rows"}
        write_results(json, result["rows"], **details, **({"commit": commit} if commit else {}))
    if plot is not None:
        report.plot({**result, "device": device_name()}, plot)
