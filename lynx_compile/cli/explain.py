"""`rt-lynx explain`: what would be rewritten in a model, without running it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ..models import Step

app = typer.Typer()

PIPE_WIDTH = 160  # columns of a table that no terminal limits


@app.command("explain")
def explain(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Known names, folders, config.json files or hub ids of diffusion transformers."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable, one row a linear layer.")] = False,
    short: Annotated[
        bool, typer.Option("--short", help="One row for layers that differ only in their block.")
    ] = False,
    device: Annotated[
        str, typer.Option(help='Cost table for predicted times; "none" for no times.')
    ] = "h200",
    rank: Annotated[int, typer.Option(min=0, help="Rank of the LoRA branch in the predicted times.")] = 64,
    resolution: Annotated[
        str | None, typer.Option(help="Pixels, as 1024 or 1360x768; default: the model's own.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples in one step.")] = 1,
    skip: Annotated[
        list[str] | None, typer.Option(help="Glob of layers that stay dense; repeatable.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Glob of the only layers to make sparse; repeatable.")
    ] = None,
    coverage: Annotated[
        Path | None, typer.Option(help="Also write the totals of all models to this JSON file.")
    ] = None,
    fit: Annotated[
        Path | None, typer.Option(help="Take the device's cost table from a `rt-lynx bench gemm` result.")
    ] = None,
) -> None:
    """Show what would be rewritten in a model, layer by layer, without a GPU and without its weights."""
    import logging

    logging.getLogger("diffusers").setLevel(
        logging.ERROR
    )  # advice about attention and dtypes on real devices
    try:
        if fit is not None:
            _fit(fit)
        elif not models:
            _list_models()
        else:
            options = {"skip": skip or [], "only": only or []}
            table = None if device == "none" else device
            _explain(models, json, short, table, rank, resolution, batch, options, coverage)
    except (ValueError, TypeError, OSError) as error:
        raise typer.BadParameter(str(error)) from error


def _explain(
    models: list[str],
    as_json: bool,
    short: bool,
    device: str | None,
    rank: int,
    resolution: str | None,
    batch: int,
    options: dict[str, Any],
    coverage: Path | None,
) -> None:
    from rich.console import Console

    from ..explanation import explain as explain_model
    from ..inputs import check_file
    from ..models import resolve

    check_file(coverage, "--coverage")
    console = table_console()
    done = []
    for name in models:
        step = at_resolution(resolve(name).step, resolution, batch)
        with Console(stderr=True).status(f"tracing {name}"):
            explanation = explain_model(name, options=options, step=step, device=device, rank=rank)
        done.append(explanation)
        if as_json:
            typer.echo(explanation.to_json())
        else:
            console.print(explanation.table(short))
    if coverage is not None:
        from ..results import write_results

        failed = [e for e in done if e.notes]
        if failed:
            raise ValueError(f"{failed[0].title}: {failed[0].notes[0]}")
        keys = ("linear_flops", "matched_share", "sparse_share", "linears", "matched")
        rows = [{"model": e.title} | {key: e.totals()[key] for key in keys} for e in done]
        write_results(coverage, rows)


def at_resolution(step: Step, resolution: str | None, batch: int) -> Step:
    """A model's native step at another resolution ("1024" or "1360x768": width × height) and batch."""
    import re
    from dataclasses import replace

    if resolution is None:
        return replace(step, batch=batch)
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", resolution)
    if sides is None:
        raise ValueError(f"resolution {resolution!r} is neither a side (1024) nor width x height (1360x768)")
    width, height = int(sides[1]), int(sides[2] or sides[1])
    if width % 16 or height % 16 or not width or not height:
        raise ValueError(f"resolution {resolution}: both sides must be multiples of 16")
    return replace(step, width=width, height=height, batch=batch)


def table_console() -> Console:
    """A console whose tables no pipe cuts to 80 columns."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def _list_models() -> None:
    from rich.table import Table

    from ..models import KNOWN

    table = Table(title="known models")
    for column in ("name", "hub id", "class", "billion parameters"):
        table.add_column(column)
    for name, known in KNOWN.items():
        table.add_row(name, known.repository, known.transformer, f"{known.parameters_b:.1f}")
    console = table_console()
    console.print(table)
    console.print("rt-lynx explain NAME; a folder, a config.json or any hub id works too")


def _fit(bench: Path) -> None:
    from .. import cost
    from ..models import read_object

    path, costs = cost.refit(read_object(bench))
    errors = ", ".join(f"{name} {error:.1%}" for name, error in costs.errors.items())
    typer.echo(f"{path}: mean relative error of the fit: {errors}")
