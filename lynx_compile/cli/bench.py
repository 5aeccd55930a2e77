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

Commit = Annotated[str | None, typer.Option(envvar="LYNX_COMMIT", help="What to record as the commit.")]


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
    commit: Commit = None,
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


@app.command()
def step(
    model: Annotated[
        list[str] | None, typer.Option(help="flux, qwen-image, z-image or any other known model; repeatable.")
    ] = None,
    resolution: Annotated[list[int] | None, typer.Option(help="Side in pixels; repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Samples in one step; repeatable.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="What to compare; repeatable. --backend list shows the names.")
    ] = None,
    rank: Annotated[int, typer.Option(min=16, max=256, help="Rank of the LoRA branch.")] = 64,
    seconds: Annotated[float, typer.Option(help="Least time of one measurement.")] = 1.0,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write stacked bars here.")] = None,
    commit: Commit = None,
) -> None:
    """One denoising step at production geometry (random weights): eager, Inductor, fp8, rt_lynx."""
    import logging

    import torch
    from rich.console import Console

    from ..bench import step as measurements
    from ..bench import step_report
    from ..results import device_name, write_results

    console = Console()
    if backend == ["list"]:
        console.print("\n".join(measurements.BACKENDS))
        return
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        console.print("[red]nothing to measure here: torch sees no CUDA device[/red]")
        raise typer.Exit(1)
    rows: list[dict[str, object]] = []

    def keep(measured: list[dict[str, object]]) -> None:
        """After each model, so that an interrupted run leaves what it has."""
        rows[:] = measured
        if json is not None:
            write_results(json, rows, **({"commit": commit} if commit else {}))

    try:
        measurements.run(
            tuple(model or measurements.MODELS),
            resolutions=tuple(resolution or (1024,)),
            batches=tuple(batch or (1,)),
            backends=tuple(backend or measurements.BACKENDS),
            rank=rank,
            seconds=seconds,
            progress=console.print,
            keep=keep,
        )
    except (ValueError, RuntimeError) as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(1) from error
    finally:
        if rows:
            step_report.show(rows, console)
    if plot is not None:
        step_report.plot(rows, plot, device_name())
