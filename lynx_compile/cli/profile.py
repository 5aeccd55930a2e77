"""`rt-lynx profile`: show, compare, merge, seal, push and pull profile folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .explain import table_console

if TYPE_CHECKING:
    from ..profile import Profile

app = typer.Typer(name="profile", no_args_is_help=True, help="Show, compare and merge profiles.")
Folder = Annotated[Path, typer.Argument(help="Folder that holds lynx.json.")]


@contextmanager
def _refusals() -> Iterator[None]:
    """What is refused ends the command with the reason instead of a traceback."""
    from ..profile import ProfileError

    try:
        yield
    except (ProfileError, OSError) as error:
        raise typer.BadParameter(str(error)) from error


def _load(folder: Path) -> Profile:
    from ..profile import load_profile

    with _refusals():
        return load_profile(folder)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


@app.command()
def show(folder: Folder) -> None:
    """One row a layer: decision, rank, errors, sensitivity."""
    profile = _load(folder)
    sparse = profile.sparse_layers()
    table = Table(title=f"{profile.model.model} · {len(sparse)} of {len(profile.layers)} layers sparse")
    for column in ("layer", "N", "K", "decision", "rank", "error before", "after", "sample", "reason"):
        words = column in ("layer", "decision", "reason")
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    for name, layer in profile.layers.items():
        table.add_row(
            name,
            str(layer.shape[0]),
            str(layer.shape[1]),
            layer.decision or "default",
            f"{layer.branch.rank} ({layer.branch.rank / layer.shape[1]:.1%} of K)"
            if layer.branch.rank
            else "0",
            _number(layer.error_before),
            _number(layer.error_after),
            _number(layer.sensitivity.get("sample")),
            layer.reason,
        )
    console = table_console()
    console.print(table)
    console.print(
        f"compensation {profile.compensation}; first {profile.dense_steps} and last "
        f"{profile.dense_last_steps} of {profile.steps} steps dense"
    )
    for key, value in profile.provenance.items():
        console.print(f"{key}: {value}", markup=False)


@app.command("diff")
def diff_(first: Folder, second: Folder) -> None:
    """Layers on which two profiles of one model differ."""
    from ..profile import diff

    with _refusals():
        rows = diff(_load(first), _load(second))
    table = Table(title=f"{sum(row.changed for row in rows)} of {len(rows)} layers differ")
    for column in ("layer", "decision", "rank", "error after", "branch distance"):
        table.add_column(column, overflow="fold")
    for row in rows:
        if row.changed:
            table.add_row(
                row.name,
                " → ".join(row.decisions),
                f"{row.ranks[0]} → {row.ranks[1]}",
                f"{_number(row.errors[0])} → {_number(row.errors[1])}",
                _number(row.branch),
            )
    table_console().print(table)


@app.command("merge")
def merge_(
    first: Folder, second: Folder, out: Annotated[Path, typer.Option(help="Folder to write.")]
) -> None:
    """Join two calibrations of one model, each weighted by the tokens it saw."""
    from ..inputs import make_folder
    from ..profile import merge, save_profile

    with _refusals():
        if out.resolve() in (first.resolve(), second.resolve()):
            raise OSError(f"--out {out}: is one of the two that are joined; give another folder")
        make_folder(out)
        save_profile(merge(_load(first), _load(second)), out)
    typer.echo(f"wrote {out}")


@app.command()
def seal(folder: Folder) -> None:
    """Accept an adapter that was trained further: check its tensors and hash them anew."""
    from ..profile import seal as seal_folder

    with _refusals():
        seal_folder(folder)
    typer.echo(f"sealed {folder}")


@app.command()
def push(folder: Folder, repo_id: str, private: bool = False) -> None:
    """Check a profile and upload it to the Hugging Face hub."""
    from ..profile.hub import push as push_folder

    with _refusals():
        typer.echo(push_folder(folder, repo_id, private=private))


@app.command()
def pull(repo_id: str, revision: str | None = None) -> None:
    """Download a profile from the Hugging Face hub, check it, and print its folder."""
    from ..profile.hub import pull as pull_folder

    with _refusals():
        typer.echo(str(pull_folder(repo_id, revision=revision)))
