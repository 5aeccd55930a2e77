"""The layers chosen at the main share after joint distillation, from the closed form."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from ..calibration.amplification import amplification
from ..calibration.joint import distill_jointly
from ..calibration.refine import Call, record
from ..calibration.sensitivity import Sensitivity
from ..calibration.workload import Pipeline
from ..profile import Branch
from .clock import Clock
from .ground import Ground, placed
from .methods import OURS, Method

CHECKS = 6
FEW = 32  # validation prompts of a check


def distilled(ground: Ground) -> Iterator[Method]:
    """Trained on the guided velocity, steps weighted by the root of what their errors do to the sample.

    The final sample's error on validation prompts decides what is kept. The branches stay in the profile of
    `ground.ours`.
    """
    s, model = ground.settings, ground.model
    choice, ours = ground.choice(s.main_share), ground.ours(ground.rank)
    layers = ours.profile.layers
    start = {name: replace(layers[name].branch, dense_tokens=rows) for name, rows in choice.sparse.items()}
    few = ground.workload(min(FEW, s.validation_prompts), max(s.calibration_prompts, s.distill_prompts))
    study = Sensitivity(few, calls=1, quiet=True)

    def judge(branches: Mapping[str, Branch]) -> float:
        return study.sample(placed(branches, model), trained())

    def trained() -> Callable[[int], bool]:
        return study.calls_between(choice.dense_steps, s.steps - choice.dense_last_steps, s.steps)

    clock = Clock(ours.seconds + ground.choosing.seconds)
    with clock.running():
        calls = record(ground.training, quiet=True)
        guidance = guidance_of(ground.training, calls)
        weights = amplification(few, placed(start, model), guidance)
        # The root: amplification itself leaves the later steps untrained, and the sample gains less.
        weights = [w**0.5 if trained()(i) else 0.0 for i, w in enumerate(weights)]
        found = distill_jointly(
            model,
            calls,
            judge,
            start,
            steps=s.joint_steps,
            batch=s.distill_samples,
            lr=s.joint_lr,
            guidance=guidance,
            weights=weights,
            check_every=max(s.joint_steps // CHECKS, 1),
            quiet=True,
        )
    for name, branch in found.branches.items():
        layers[name].branch = branch
    ground.studies["joint_distillation"] = {
        "columns": ["step", "training loss", "error of the final sample on validation prompts"],
        "history": [[step, None if step == 0 else loss, error] for step, loss, error in found.history],
        "weights_of_steps": weights,
        "guidance": guidance,
    }
    ends = choice.dense_steps, choice.dense_last_steps
    title = f"{OURS} r{ground.rank} + SL end to end, {s.main_share:.0%} + joint distillation"
    yield Method(title, placed(found.branches, model), clock.seconds, ground.rank, *ends)


def guidance_of(workload: Pipeline, calls: list[Call]) -> float | None:
    """The scale of classifier-free guidance if the pipeline calls the model on both halves in one batch."""
    if calls[0][2].shape[0] != 2 * min(workload.batch_size, len(workload.prompts)):
        return None
    default = inspect.signature(type(workload.pipe).__call__).parameters.get("guidance_scale")
    scale = workload.call.get("guidance_scale", None if default is None else default.default)
    return float(scale) if isinstance(scale, (int, float)) else None
