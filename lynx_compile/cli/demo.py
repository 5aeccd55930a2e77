"""`rt-lynx demo`: pictures of a real trained transformer, dense beside sparse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from ..demo import Demo

app = typer.Typer()

PROMPTS = (
    "a red fox, noto",
    "pizza, twemoji",
    "rocket, fluent 3d",
    "an octopus, twemoji",
    "sunflower, fluent 3d",
    "robot, noto",
)


@app.command("demo")
def demo(
    prompt: Annotated[
        list[str] | None,
        typer.Option(help='Own words, with a style: "a red fox, noto" (or twemoji, fluent 3d); repeatable.'),
    ] = None,
    seed: Annotated[int, typer.Option(help="Picture i starts from the noise of seed + i.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(min=1.0, help="Scale of classifier-free guidance.")] = 3.5,
    out: Annotated[Path, typer.Option(help="Folder for grid.png and report.html.")] = Path("demo_out"),
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="The folder examples/emoji_flux of a checkout, or a model folder in its layout."),
    ] = None,
) -> None:
    """Generate pictures dense and sparse with the shipped emoji model and compare them."""
    from rich.console import Console

    console = Console()
    try:
        with console.status("loading the model"):
            pipe = _load(model, device)
        out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made ends it before the work
        result = _run(console, pipe, list(prompt or PROMPTS), seed, steps, guidance)
    except (OSError, ImportError, RuntimeError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(1) from error
    from ..demo import picture_grid, render

    picture_grid(result).save(out / "grid.png", optimize=True)
    (out / "report.html").write_text(render(result), encoding="utf-8")
    console.print(summary(result))
    if result.emulated:
        console.print(
            "No kernels for this device: the sparse variants were emulated, so their seconds say nothing.",
            style="dim",
        )
    console.print(f"{out / 'grid.png'}\n{out / 'report.html'}", highlight=False)


def _load(model: Path | None, device: str | None) -> Any:
    import diffusers
    import torch
    import transformers

    from ..evaluation.emoji import load_emoji_pipeline

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"--device {device}: torch {torch.__version__} sees no NVIDIA GPU; use --device cpu"
        )
    dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    return load_emoji_pipeline(model, dtype=dtype).to(chosen)


def _run(console: Any, pipe: Any, prompts: list[str], seed: int, steps: int, guidance: float) -> Demo:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..demo import VARIANTS, run

    columns = TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bars = {
            variant.title: progress.add_task(variant.title, total=steps + 1, start=False)
            for variant in VARIANTS
        }

        def begin(title: str) -> None:
            progress.start_task(bars[title])

        def advance(title: str) -> None:
            progress.advance(bars[title])

        return run(pipe, prompts, seed=seed, steps=steps, guidance=guidance, begin=begin, advance=advance)


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
        cells += [f"{outcome.sparse_share:.1%}", f"{outcome.seconds:.1f}"]
        table.add_row(outcome.variant.title, *cells, *([f"{outcome.step_ms:.2f}"] if on_gpu else []))
    return table
