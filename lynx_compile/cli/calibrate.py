"""`rt-lynx calibrate`: a pipeline in, a profile out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from ..calibration import Pipeline
    from ..calibration.front import Choice
    from ..profile import Profile

app = typer.Typer()
console = Console()


@app.command("calibrate")
def calibrate_(
    model: Annotated[
        str, typer.Argument(help='A diffusers model id or folder; "emoji" is the shipped model.')
    ],
    out: Annotated[Path, typer.Option(help="Folder of the profile.")],
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts for the statistics.")] = 64,
    held_out: Annotated[int, typer.Option(min=0, help="Prompts for sensitivities, taken after these.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a run.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts in one run.")] = 1,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=100, help="guidance_scale of the pipeline.")
    ] = None,
    rank: Annotated[int, typer.Option(min=0, help="Rank of every branch.")] = 64,
    total_rank: Annotated[int | None, typer.Option(min=0, help="A budget over all layers instead.")] = None,
    no_shift: Annotated[bool, typer.Option("--no-shift", help="Prune around zero, not the mean.")] = False,
    no_deflate: Annotated[
        bool,
        typer.Option("--no-deflate", help="LoRA branches beside what is pruned: faster, further from dense."),
    ] = False,
    memory: Annotated[float, typer.Option(min=0.01, help="GiB of device memory for statistics.")] = 8.0,
    state: Annotated[Path | None, typer.Option(help="Folder from which a killed run goes on.")] = None,
    max_error: Annotated[float | None, typer.Option(min=0, help="Least time within this error.")] = None,
    speed: Annotated[
        float | None, typer.Option(min=1, help="Least error at this speed of the linear layers.")
    ] = None,
    dense_last: Annotated[
        int | None,
        typer.Option(
            min=0, help="Last steps that stay dense, 1 by default: what they do wrong, no later step mends."
        ),
    ] = None,
    costs: Annotated[str, typer.Option(help='Cost table, as "h200", or "flops".')] = "h200",
    text_rows: Annotated[
        list[str] | None,
        typer.Option(help="GLOB=N: these layers' first N rows are text; GLOB=-N: their last N."),
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(help="Which transformer of a pipeline with several, as transformer_2 of Wan 2.2."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; the GPU if there is one.")] = None,
) -> None:
    """Fit branches and shifts; with --max-error or --speed also measure and choose what stays dense."""
    import torch

    from ..calibration import calibrate
    from ..calibration.choose import usual_last_steps
    from ..calibration.costs import FLOPS
    from ..cost import model as cost_model
    from ..inputs import device_of, make_folder
    from ..profile import save_profile
    from ..profile.components import transformer_of

    chooses = max_error is not None or speed is not None
    if max_error is not None and speed is not None:
        raise typer.BadParameter("give --max-error or --speed, not both")
    if chooses and not held_out:
        raise typer.BadParameter(
            "--held-out 0 leaves no prompts to measure what --max-error and --speed ask for; give 1 or more"
        )
    last = usual_last_steps(steps) if dense_last is None else dense_last
    if last >= steps:
        raise typer.BadParameter(f"--dense-last {last} leaves none of --steps {steps} sparse; lower it")
    rows = _text_rows(text_rows)
    if rows and not chooses:
        raise typer.BadParameter("--text-rows is for the choice that --max-error or --speed asks for")
    try:
        if costs != FLOPS:
            cost_model(costs)  # refuses what it has no table of
        texts = _prompts(model, prompts, count + held_out)
        for folder, option in ((out, "--out"), (state, "--state")):
            if folder is not None:
                make_folder(folder, option)
        rank_, world, where = _join_group(str(device_of(device)))
        pipe = _load(model, where)
        transformer_of(pipe, component)  # refuses one that is not there or has to be named
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error
    call: dict[str, Any] = {} if guidance is None else {"guidance_scale": guidance}
    workload = _workload(pipe, texts[:count], steps, batch_size, 0, call, component)
    try:
        profile = calibrate(
            workload,
            rank=rank,
            total_rank=total_rank,
            shift=not no_shift,
            deflate=not no_deflate,
            steps=steps,
            memory=int(memory * 2**30),
            state=state,
            provenance={"model": model, "prompts": count, "rank": rank, "held_out_prompts": held_out},
        )
    except (ValueError, BlockingIOError) as error:
        raise typer.BadParameter(str(error)) from error
    profile.dense_last_steps = last
    points: list[Choice] = []
    if rank_ == 0 and chooses:
        points = _choose(
            profile,
            _workload(pipe, texts[count:], steps, batch_size, count, call, component),
            max_error,
            speed,
            costs,
            rows,
        )
    if rank_ == 0:
        save_profile(profile, out)
        if points:
            from ..calibration.plots import draw

            draw(profile, out / "plots", points)
        if points:
            chosen = f"{len(profile.sparse_layers())} of {len(profile.layers)} layers sparse"
        else:
            chosen = f"{len(profile.layers)} layers; safe defaults decide which of them run sparse"
            chosen += f", the last {last} of {steps} steps dense" if last else ""
        console.print(f"wrote {out}: {chosen}")
    if world > 1:
        torch.distributed.destroy_process_group()


def _load(model: str, device: str) -> Any:
    import torch

    from ..profile.components import models_of

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    if model == "emoji":
        from ..evaluation.emoji import load_emoji_pipeline

        pipe = load_emoji_pipeline(dtype=dtype)
    else:
        from diffusers import DiffusionPipeline

        try:
            pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype)
        except (OSError, ValueError) as error:
            raise OSError(
                f"{model!r} is no folder that save_pretrained wrote and could not be fetched from the hub "
                f"({type(error).__name__}); check the name, the connection and `hf auth login`"
            ) from error
        pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    for transformer in models_of(pipe):
        transformer.eval().requires_grad_(False)
    return pipe


def _prompts(model: str, file: Path | None, wanted: int) -> list[str]:
    from ..inputs import lines_of

    if file is not None:
        texts = lines_of(file, "--prompts")
        if len(texts) < wanted:
            raise typer.BadParameter(
                f"{file} has {len(texts)} prompts, {wanted} are needed; lower --count or add some"
            )
        return texts[:wanted]
    if model != "emoji":
        raise typer.BadParameter("--prompts FILE is needed: prompts like those the model will see")
    from ..evaluation.emoji import prompts

    return prompts(wanted)


def _workload(
    pipe: Any,
    texts: list[str],
    steps: int,
    batch_size: int,
    start: int,
    call: dict[str, Any],
    component: str | None,
) -> Pipeline:
    from ..calibration import Pipeline

    return Pipeline(
        pipe, texts, steps=steps, batch_size=batch_size, seed=start, call=call, component=component
    )


def _join_group(device: str) -> tuple[int, int, str]:
    """(rank, processes, this process's device) of the group `torchrun` started; (0, 1, device) without it."""
    import torch

    if not torch.distributed.is_torchelastic_launched():
        return 0, 1, device
    if device == "cuda":
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return torch.distributed.get_rank(), torch.distributed.get_world_size(), device


def _text_rows(given: list[str] | None) -> dict[str, int]:
    found = {}
    for text in given or ():
        glob, _, rows = text.rpartition("=")
        if not glob or not rows.removeprefix("-").isdecimal():
            raise typer.BadParameter(
                f"--text-rows {text!r} is not GLOB=N or GLOB=-N, as 'single_blocks.*=512' or 'layers.*=-64'"
            )
        found[glob] = int(rows)
    return found


def _check_reach(fastest: float, costs: str, speed: float | None) -> None:
    """An aim that no choice can meet is refused before anything is measured."""
    if fastest <= 1.0:
        raise typer.BadParameter(
            f"no layer of this model is faster sparse by the table {costs!r}; --costs flops counts FLOPs"
        )
    if speed is not None and speed > fastest:
        raise typer.BadParameter(
            f"--speed {speed} is out of reach: with all that may be sparse it is {fastest:.3f}"
        )


def _choose(
    profile: Profile,
    held_out: Pipeline,
    max_error: float | None,
    speed: float | None,
    costs: str,
    text_rows: dict[str, int],
) -> list[Choice]:
    """Measure, choose, write both into the profile; returns the front and what was measured."""
    from ..calibration.choose import apply_choice, chooser_for
    from ..calibration.costs import costs_of
    from ..calibration.front import sparse_share
    from ..calibration.sensitivity import Sensitivity
    from ..calibration.text_rows import joint_text_rows
    from ..evaluation.ground import branches_of

    study = Sensitivity(held_out, calls=5)
    branches = branches_of(profile, held_out.model)
    try:
        rows = joint_text_rows(study, branches, text_rows)
        table = costs_of(profile, held_out.model, costs, rows)
        last = profile.dense_last_steps
        share = sparse_share(study.span(profile.steps), 0, profile.steps - last)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if share:  # else the chooser says what is wrong
        _check_reach(table.fastest(share), costs, speed)
    ways = len(branches) + len(rows)
    seconds = study.estimate_s(branches, "layer") * ways / len(branches)
    console.print(f"sensitivity of {ways} choices: about {seconds / 60:.1f} min, then some runs to choose")
    measured: list[Choice] = []
    try:
        chooser = chooser_for(study, profile, branches, costs, text_rows=rows, dense_last_steps=last)
        choice = chooser.choose(max_error=max_error, speed=speed, note=measured.append)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    apply_choice(profile, choice)
    texts = sum(rows != 0 for rows in choice.sparse.values())
    console.print(
        f"expected error {choice.error:.4f}, measured {choice.measured:.4f}, speed {choice.speed:.2f}×; "
        f"{len(choice.sparse)} of {len(branches)} layers sparse, {texts} of them with dense text rows, "
        f"first {choice.dense_steps} and last {choice.dense_last_steps} of {profile.steps} steps dense"
    )
    return [*chooser.points(), *measured]
