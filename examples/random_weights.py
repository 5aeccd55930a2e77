"""Denoising at production geometry without a download: random weights, noise for a picture, real times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from rich.console import Console
from torch import nn

from lynx_compile.models import resolve

console = Console()


def denoise(
    name: str, switch_on: Callable[[nn.Module], None], *, size: int, steps: int, blocks: int | None = None
) -> float:
    """Euler steps of a known model with random weights; returns the milliseconds of one.

    switch_on: what compiles the transformer. blocks: of each kind, for a quick look; None for all.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = resolve(name)
    if blocks is not None:
        known = replace(known, config={**known.config, **known.block_counts(blocks)})
    with console.status("creating random weights"):
        transformer = known.build(device)
    switch_on(transformer)
    inputs = known.inputs(replace(known.step, width=size, height=size), device)
    first = next(iter(inputs))
    with torch.no_grad(), console.status("compiling"):
        velocity = transformer(**inputs, return_dict=False)[0]
    start = time.perf_counter()
    with torch.no_grad():
        for _ in range(steps):
            velocity = transformer(**inputs, return_dict=False)[0]
            if isinstance(velocity, list):
                inputs[first] = [
                    x - v.to(x.dtype) / steps for x, v in zip(inputs[first], velocity, strict=True)
                ]
            else:
                inputs[first] = inputs[first] - velocity.to(inputs[first].dtype) / steps
    if device == "cuda":
        torch.cuda.synchronize()
    ms = (time.perf_counter() - start) * 1e3 / steps
    console.print(f"{known.title}, random weights, {size}×{size}: {ms:.1f} ms a step")
    return ms
