"""FLUX.1-dev with the rt_lynx backend.

python examples/flux.py --prompt "a red fox in the snow"
python examples/flux.py --random-weights    # no download: the exact geometry, real times
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import nn

import lynx_compile

MODEL = "black-forest-labs/FLUX.1-dev"
console = Console()


def main(
    prompt: Annotated[str, typer.Option(help="What to paint.")] = "a red fox in the snow, golden hour",
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("flux.png"),
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 28,
    size: Annotated[int, typer.Option(help="Side of the picture in pixels.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    profile: Annotated[str | None, typer.Option(help="Profile folder or hub id (rt-lynx calibrate).")] = None,
    whole: Annotated[bool, typer.Option(help="Compile the transformer as one graph, not by blocks.")] = False,
    random_weights: Annotated[bool, typer.Option(help="Measure with random weights; no picture.")] = False,
    blocks: Annotated[
        int | None, typer.Option(help="With random weights: fewer blocks of each kind.")
    ] = None,
) -> None:
    """Generate a picture with sparse activations and say what ran sparse."""

    def switch_on(transformer: nn.Module) -> None:
        if whole:
            transformer.compile(backend="rt_lynx")
        else:
            lynx_compile.compile_blocks(transformer)

    if random_weights:
        from random_weights import denoise

        denoise("flux", switch_on, size=size, steps=steps, blocks=blocks)
    else:
        from diffusers import FluxPipeline

        try:
            pipe = FluxPipeline.from_pretrained(MODEL, torch_dtype=torch.bfloat16)
        except OSError as error:
            console.print(f"[red]{MODEL} could not be fetched ({type(error).__name__}).[/red]")
            console.print("Log in with `hf auth login`, or see real times without it: --random-weights")
            raise typer.Exit(1) from error
        pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        if profile is not None:
            lynx_compile.apply_profile(pipe, profile)
        switch_on(pipe.transformer)
        image = pipe(
            prompt,
            num_inference_steps=steps,
            guidance_scale=3.5,
            height=size,
            width=size,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        image.save(out)
        console.print(f"saved {out}")
    report = lynx_compile.report()
    console.print(f"{report.sparse_share:.1%} of the linear FLOPs of the compiled graphs ran sparse")


if __name__ == "__main__":
    typer.run(main)
