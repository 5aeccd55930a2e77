"""`rt-lynx bench`: kernels, layers, denoising steps and starts, measured here."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

TABLE_WIDTH = 140  # columns; narrower terminals and pipes would cut the figures

app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    help="Measure GEMMs, layers, denoising steps and starts against what else can be switched on.",
)

Model = Annotated[
    list[str] | None, typer.Option(help="flux, qwen-image, z-image or any other known model; repeatable.")
]
Rank = Annotated[int, typer.Option(min=16, max=256, help="Rank of the LoRA branch.")]
Blocks = Annotated[int | None, typer.Option(min=1, help="Fewer blocks of each kind than the model has.")]
Json = Annotated[Path | None, typer.Option(help="Write the figures here.")]
Plot = Annotated[Path | None, typer.Option(help="Write a bar chart here.")]
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
    rank: Rank = 64,
    seconds: Annotated[float, typer.Option(min=0.001, help="Least time of one measurement.")] = 0.3,
    chains: Annotated[bool, typer.Option(help="Also producers fused into the layer.")] = True,
    json: Json = None,
    plot: Plot = None,
    commit: Commit = None,
) -> None:
    """Linear layers: sparsify + norm + LoRA + sparse GEMM against cuBLAS, PyTorch, cuSPARSELt and fp8."""
    from ..bench import gemm as measurements
    from ..bench import report
    from ..results import device_name, write_results

    console = _console()
    _check_files(console, json, plot)
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
        raise _failure(console, error) from error
    report.show(result, console)
    if json is not None:
        details = {key: value for key, value in result.items() if key != "rows"}
        write_results(json, result["rows"], **details, **_recorded(commit))
    if plot is not None:
        report.plot({**result, "device": device_name()}, plot)


@app.command()
def layers(
    model: Model = None,
    resolution: Annotated[int, typer.Option(help="Side in pixels.")] = 1024,
    rank: Rank = 64,
    seconds: Annotated[float, typer.Option(min=0.001, help="Least time of one measurement.")] = 0.3,
    json: Json = None,
    plot: Plot = None,
    commit: Commit = None,
) -> None:
    """Every kind of linear layer of production models, alone: dense and through the backend."""
    from ..bench import layers as measurements
    from ..bench import layers_report
    from ..bench.step import MODELS
    from ..results import device_name, write_results

    console = _console()
    _check_files(console, json, plot)
    try:
        with console.status("tracing") as status:
            result = measurements.run(
                tuple(model or MODELS),
                resolution=resolution,
                rank=rank,
                seconds=seconds,
                progress=status.update,
            )
    except (ValueError, RuntimeError) as error:
        raise _failure(console, error) from error
    layers_report.show(result, console)
    if json is not None:
        details = {key: value for key, value in result.items() if key != "rows"}
        write_results(json, result["rows"], **details, **_recorded(commit))
    if plot is not None:
        layers_report.plot(result, plot, device_name())


@app.command()
def step(
    model: Model = None,
    resolution: Annotated[list[int] | None, typer.Option(help="Side in pixels; repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Samples in one step; repeatable.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="What to compare; repeatable. --backend list shows the names.")
    ] = None,
    rank: Rank = 64,
    seconds: Annotated[float, typer.Option(min=0.001, help="Least time of one measurement.")] = 1.0,
    blocks: Blocks = None,
    warm: Annotated[
        list[str] | None,
        typer.Option(help="A backend that may use the caches on disk (no compile time then); repeatable."),
    ] = None,
    json: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Write stacked bars here.")] = None,
    commit: Commit = None,
) -> None:
    """One denoising step at production geometry (random weights): eager, Inductor, fp8, rt_lynx.

    With several resolutions or batches each backend compiles once, for dynamic shapes.
    """
    import logging

    from ..bench import step as measurements
    from ..bench import step_report
    from ..results import device_name, write_results

    console = _console()
    _check_files(console, json, plot)
    if backend == ["list"]:
        console.print("\n".join(measurements.BACKENDS))
        return
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    _need_gpu(console)
    rows: list[dict[str, object]] = []

    def keep(measured: list[dict[str, object]]) -> None:
        """After each backend and round, so that an interrupted run leaves what it has."""
        rows[:] = measured
        if json is not None:
            write_results(json, rows, **_recorded(commit))

    try:
        measurements.run(
            tuple(model or measurements.MODELS),
            resolutions=tuple(resolution or (1024,)),
            batches=tuple(batch or (1,)),
            backends=tuple(backend or measurements.BACKENDS),
            rank=rank,
            seconds=seconds,
            blocks=blocks,
            warm=tuple(warm or ()),
            progress=console.print,
            keep=keep,
        )
    except (ValueError, RuntimeError) as error:
        raise _failure(console, error) from error
    finally:
        if rows:
            step_report.show(rows, console)
    if plot is not None:
        step_report.plot(rows, plot, device_name())


@app.command()
def start(
    model: Annotated[str, typer.Option(help="flux, qwen-image, z-image or any other known model.")] = "flux",
    backend: Annotated[
        list[str] | None,
        typer.Option(help="What to compare: as in bench step, and rt_lynx-precompiled; repeatable."),
    ] = None,
    rank: Rank = 64,
    blocks: Blocks = None,
    json: Json = None,
    commit: Commit = None,
) -> None:
    """How long compiling keeps a process from its first step: with nothing cached, then a second time."""
    from ..bench import layers_report
    from ..bench import start as measurements
    from ..results import write_results

    console = _console()
    _check_files(console, json)
    _need_gpu(console)
    chosen = backend or ["inductor", "rt_lynx"]
    unknown = [name for name in chosen if name not in measurements.STARTS]
    if unknown:
        raise _failure(console, f"unknown backend {unknown[0]!r}; one of {', '.join(measurements.STARTS)}")
    try:
        rows = measurements.run(model, chosen, rank=rank, blocks=blocks, progress=console.print)
    except (ValueError, RuntimeError) as error:
        raise _failure(console, error) from error
    layers_report.show_start(rows, console)
    if json is not None:
        write_results(json, rows, **_recorded(commit))


@app.command()
def host(
    calls: Annotated[int, typer.Option(min=1, help="Calls of each op; the median counts.")] = 3000,
    json: Json = None,
    commit: Commit = None,
) -> None:
    """What a call of `sparsify` and of `sparse_linear` costs the host, beside torch's linear layer."""
    from rich.table import Table

    from ..bench import host as measurements
    from ..results import write_results

    console = _console()
    _check_files(console, json)
    _need_gpu(console)
    rows = measurements.run(calls=calls)
    table = Table("call", "host, µs", title="An idle GPU, inference mode")
    for row in rows:
        table.add_row(row["call"], f"{row['host_us']:.1f}")
    console.print(table)
    if json is not None:
        write_results(json, rows, **_recorded(commit))


def _console() -> Any:
    from rich.console import Console

    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    return console


def _check_files(console: Any, json: Path | None, plot: Path | None = None) -> None:
    """Before the work: a file that cannot be written would lose it."""
    from ..inputs import check_file

    try:
        check_file(json, "--json")
        check_file(plot, "--plot", (".png", ".svg", ".pdf"))
    except OSError as error:
        raise _failure(console, error) from error


def _need_gpu(console: Any) -> None:
    import torch

    if not torch.cuda.is_available():
        raise _failure(console, "nothing to measure here: torch sees no CUDA device")


def _failure(console: Any, error: object) -> typer.Exit:
    from rich.text import Text

    console.print(Text(str(error), "red"))  # as text: brackets in an error are no markup
    return typer.Exit(1)


def _recorded(commit: str | None) -> dict[str, str]:
    return {"commit": commit} if commit else {}
