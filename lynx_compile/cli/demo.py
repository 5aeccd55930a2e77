"""`rt-lynx demo`: pictures of a real trained transformer, dense beside sparse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from ..demo import Demo
    from ..profile import Profile

app = typer.Typer()

PROMPTS = (
    "a red fox, noto",
    "pizza, twemoji",
    "rocket, fluent 3d",
    "an octopus, twemoji",
    "sunflower, fluent 3d",
    "a house with a garden, noto",
)


@app.command("demo")
def demo(
    prompt: Annotated[
        list[str] | None,
        typer.Option(help='Own words, with a style: "a red fox, noto" (or twemoji, fluent 3d); repeatable.'),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32, help="Picture i starts from the noise of seed + i.")
    ] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    guidance: Annotated[
        float, typer.Option(min=1.0, max=100.0, help="Scale of classifier-free guidance.")
    ] = 3.5,
    out: Annotated[Path, typer.Option(help="Folder for grid.png and report.html.")] = Path("demo_out"),
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="The folder examples/emoji_flux of a checkout, or a model folder in its layout."),
    ] = None,
) -> None:
    """Generate pictures dense and sparse with the shipped emoji model and compare them."""
    from rich.console import Console
    from rich.text import Text

    from ..inputs import make_folder

    console = Console()
    prompts = list(PROMPTS) if not prompt else [" ".join(words.split()) for words in prompt]
    try:
        _check_words(prompts)
        with console.status("loading the model"):
            pipe = _load(model, device)
        _check_lengths(pipe, prompts)
        make_folder(out)
        result = _run(console, pipe, _profile(model), prompts, seed, steps, guidance)
        _write(result, out)
    except (OSError, RuntimeError, ValueError) as error:
        # as text: brackets in a prompt or a path are no markup
        console.print(Text.assemble(("error: ", "red"), str(error)), soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(summary(result))
    if result.emulated:
        console.print(
            "No kernels for this device: the sparse variants were emulated, so their seconds say nothing.",
            style="dim",
        )
    console.print(Text(f"{out / 'grid.png'}\n{out / 'report.html'}"), soft_wrap=True)


def _check_words(prompts: list[str]) -> None:
    if not all(prompts):
        raise ValueError('--prompt is empty; say what to draw and a style, e.g. --prompt "a red fox, noto"')
    for prompt in prompts:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # what Python makes of undecodable bytes
            raise ValueError(f"--prompt {prompt!a} is no text in the terminal's encoding")


def _check_lengths(pipe: Any, prompts: list[str]) -> None:
    for prompt in prompts:
        tokens = pipe.count_tokens(prompt)
        if tokens > pipe.max_text_tokens:
            shown = prompt if len(prompt) <= 60 else prompt[:60] + "…"
            raise ValueError(
                f'--prompt "{shown}" has {tokens} tokens and the text encoder reads {pipe.max_text_tokens} '
                "(about 25 words); shorten it"
            )


def _write(result: Demo, out: Path) -> None:
    import io

    from ..demo import picture_grid, render
    from ..files import write_whole

    grid = io.BytesIO()
    picture_grid(result).save(grid, "png", optimize=True)
    try:
        write_whole(out / "grid.png", grid.getvalue())
        write_whole(out / "report.html", render(result).encode())
    except OSError as error:
        name = error.filename2 or error.filename or out
        raise OSError(f"{name}: {error.strerror or error}; give another --out") from error


def _load(model: Path | None, device: str | None) -> Any:
    from ..inputs import device_of

    chosen = device_of(device)
    import diffusers
    import torch
    import transformers

    from ..evaluation.emoji import load_emoji_pipeline

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    return load_emoji_pipeline(model, dtype=dtype).to(chosen)


def _profile(model: Path | None) -> Profile | None:
    """The profile shipped beside the model; None when another model folder has none."""
    from ..evaluation.emoji import EXAMPLE
    from ..profile import load_profile

    folder = (EXAMPLE if model is None else model if (model / "model").is_dir() else model.parent) / "profile"
    return load_profile(folder) if folder.is_dir() else None


def _run(
    console: Any,
    pipe: Any,
    profile: Profile | None,
    prompts: list[str],
    seed: int,
    steps: int,
    guidance: float,
) -> Demo:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..demo import ERROR_TITLE, error_steps, run, variants_with, warm_up_steps

    columns = TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        totals = {
            variant.title: warm_up_steps(variant, profile, steps) + steps
            for variant in variants_with(profile)
        }
        totals[ERROR_TITLE] = error_steps(steps)
        bars = {title: progress.add_task(title, total=total, start=False) for title, total in totals.items()}

        def begin(title: str) -> None:
            progress.start_task(bars[title])

        def advance(title: str) -> None:
            progress.advance(bars[title])

        settings: dict[str, Any] = {"seed": seed, "steps": steps, "guidance": guidance}
        return run(pipe, prompts, profile=profile, begin=begin, advance=advance, **settings)


def summary(result: Demo) -> Table:
    """The table on the terminal: one row a variant."""
    from rich.table import Table

    on_gpu = result.device.startswith("cuda")
    table = Table(
        title=f"{len(result.prompts)} pictures, {result.steps} steps, to the dense ones of the same seeds"
    )
    table.add_column("variant")
    for column in ("PSNR, dB", "SSIM", "linear FLOPs sparse", "seconds", *(["ms a step"] if on_gpu else [])):
        table.add_column(column, justify="right")
    for outcome in result.outcomes:
        moved = outcome.distance
        cells = ["–", "–"] if moved is None else [f"{moved.psnr.value:.2f}", f"{moved.ssim.value:.3f}"]
        cells += [f"{outcome.sparse_share:.1%}", f"{outcome.seconds:.2f}"]
        table.add_row(outcome.variant.title, *cells, *([f"{outcome.step_ms:.2f}"] if on_gpu else []))
    return table
