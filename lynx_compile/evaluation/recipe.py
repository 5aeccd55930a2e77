"""RT-Lynx's own recipe as a rival: branches trained layer by layer from a random start (arXiv 2605.26632).

It trains the layers that the closed form solves. Its error on validation calls is watched as it trains, so
that the time to any error can be read off.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration.emulation import Forward
from ..calibration.refine import Call, distill_layers, random_branches
from ..calibration.statistics import Hooks
from ..profile import Branch
from ..profile.fingerprint import linear_layers
from .clock import Clock
from .ground import Closed, Ground, placed
from .methods import Method, by_local_error, method_of

RECIPE = "paper's recipe"
CHECKS = 20  # times its error is looked at while it trains
REFINED = 10  # of the recipe's steps one in so many, at a rate as much lower, refine the closed form


def paper_recipe(ground: Ground) -> Iterator[Method]:
    """SA-NC-LoRA by the paper's loss at the largest and the least rank, whole and with layers left dense."""
    s = ground.settings
    for rank in dict.fromkeys((s.ranks[-1], s.ranks[0])):
        trained, seconds = _train(ground, rank)
        details = {"training_steps": s.recipe_steps}
        yield Method(f"SA-NC-LoRA r{rank}, {RECIPE}", trained, seconds, rank, details=details)
        errors = output_errors(ground.model, ground.checks, trained)
        for share in ground.shares if rank == ground.rank else (s.main_share,):
            choice = by_local_error(ground, errors, share)
            title = f"{RECIPE} r{rank} + SL by local error, {share:.0%}"
            yield method_of(title, choice, trained, seconds, rank, share == s.main_share)


def _train(ground: Ground, rank: int) -> tuple[dict[str, Branch], float]:
    """Trained branches and the seconds they took; what was seen on the way goes into `ground.studies`."""
    s, model = ground.settings, ground.model
    calls, checks = ground.calls, ground.checks
    closed = {
        size: ground.lora(rank, *size) for size in sizes(s.calibration_prompts, s.calibration_steps, s.steps)
    }
    history: list[list[float]] = []
    clock, watched = Clock(), Clock()
    start = 0.0

    def watch(step: int, branches: Mapping[str, Branch]) -> None:
        with watched.running():
            error = mean(output_errors(model, checks, placed(branches, model)))
        seconds = time.monotonic() - start - watched.seconds if step else 0.0
        history.append([step, round(seconds + ground.recording.seconds, 3), error])

    untrained = random_branches(model, {name: Branch() for name in ground.names}, rank)
    watch(0, untrained)
    watched.seconds = 0.0
    with clock.running():
        start = time.monotonic()
        trained = distill_layers(
            model,
            calls,
            untrained,
            steps=s.recipe_steps,
            lr=s.recipe_lr,
            quiet=True,
            report=watch,
            report_every=max(s.recipe_steps // CHECKS, 1),
        )
    seconds = ground.recording.seconds + clock.seconds - watched.seconds
    races: list[dict[str, Any]] = []
    for (prompts, steps), made in closed.items():
        aim = mean(output_errors(model, checks, made.branches))
        races.append({"prompts": prompts, "steps": steps, "seconds": round(made.seconds, 3), "error": aim})
        races[-1]["training_to_within"] = reached(aim, history)
        ground.log(f"paper's recipe r{rank}: {seconds:.1f} s; closed form {races[-1]}")
    usual = closed[s.calibration_prompts, s.calibration_steps]
    ground.studies.setdefault("recipe_against_closed_form", {})[f"r{rank}"] = {
        "refined": refined(ground, usual, checks),
        "error": "mean over layers of the relative output error on validation prompts",
        "closed_form": races,
        "history": history,
    }
    return placed(trained, model), seconds


def refined(ground: Ground, made: Closed, checks: list[Call]) -> dict[str, Any]:
    """The closed form trained on by the recipe's loss: steps, seconds in all, the error before and after."""
    s, model, clock = ground.settings, ground.model, Clock()
    start = {name: layer.branch for name, layer in made.profile.layers.items()}
    steps = max(s.recipe_steps // REFINED, 1)
    with clock.running():
        trained = distill_layers(
            model, ground.calls, start, steps=steps, lr=s.recipe_lr / REFINED, quiet=True
        )
    return {
        "training_steps": steps,
        "seconds": round(made.seconds + ground.recording.seconds + clock.seconds, 3),
        "error_before": mean(output_errors(model, checks, made.branches)),
        "error": mean(output_errors(model, checks, placed(trained, model))),
    }


def sizes(prompts: int, steps: int, most_steps: int) -> list[tuple[int, int]]:
    """(prompts, steps of a run) of the closed form's calibrations: less than usual, as usual, more steps."""
    fewer = [(max(prompts // part, 1), steps) for part in (16, 4)]
    return list(dict.fromkeys([*fewer, *((prompts, min(n * steps, most_steps)) for n in (1, 2, 4))]))


def reached(aim: float, history: list[list[float]]) -> dict[str, Any]:
    """When training, as (step, seconds, error), came to within 0, 1, 5 and 10% of an error; None: never."""
    found = {}
    for slack in (0.0, 0.01, 0.05, 0.1):
        met = next((entry for entry in history if entry[2] <= aim * (1 + slack)), None)
        found[f"{slack:.0%}"] = None if met is None else {"step": met[0], "seconds": met[1]}
    return found


@torch.no_grad()
def output_errors(model: nn.Module, calls: list[Call], forwards: Mapping[str, Forward]) -> dict[str, float]:
    """‖Ŷ − Y‖ / ‖Y‖ of each layer at the dense model's own inputs."""
    linears = {name: linear_layers(model)[name] for name in forwards}
    sums: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        module = linears[name]
        y = F.linear(x, module.weight, module.bias).float()
        parts = torch.stack([(forwards[name](module, x).float() - y).square().sum(), y.square().sum()])
        sums[name] = sums[name] + parts if name in sums else parts

    with Hooks(model, linears, see):
        for args, kwargs, _ in calls:
            model(*args, **kwargs)
    totals = torch.stack(list(sums.values())).double().cpu()
    roots = (totals[:, 0] / totals[:, 1].clamp_min(1e-300)).sqrt()
    return dict(zip(sums, roots.tolist(), strict=True))


def mean(errors: Mapping[str, float]) -> float:
    return sum(errors.values()) / max(len(errors), 1)
