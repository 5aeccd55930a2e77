"""Generate the same seeds with every variant of one model and measure what differs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .. import clear_report, report
from ..evaluation.emoji import to_pictures
from ..evaluation.metrics import Distance, distance
from ..profile import Profile, apply_profile, remove_profile
from ..profile.apply import check_fits
from ..profile.components import transformer_of
from ..profile.steps import dense_ends
from ..report import Report
from ..runtime import kernels
from .layer_error import LayerErrors

ERROR_STEPS = 3  # of the short dense run on which layer errors are measured
ERROR_TITLE = "layer errors"

Told = Callable[[str], None]  # takes a variant's title


def _ignore(_: str) -> None:
    pass


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    compensation: None for the dense model.  calibrated: with the profile given to `run`.  noise: offset of
    the seeds.
    """

    title: str
    compensation: str | None = None
    calibrated: bool = False
    noise: int = 0


VARIANTS = (
    Variant("dense"),
    Variant("SA-native", compensation="native"),
    Variant("SA-NC", compensation="norm"),
    Variant("SA-NC, calibrated", compensation="norm", calibrated=True),
    Variant("dense, other seeds", noise=10_000),
)


def variants_with(profile: object | None) -> tuple[Variant, ...]:
    """`VARIANTS`, without the calibrated one when there is no profile."""
    return tuple(variant for variant in VARIANTS if profile is not None or not variant.calibrated)


def dense_steps_of(variant: Variant, profile: Profile | None, steps: int) -> int:
    """How many of a run's steps the variant leaves dense because its profile says so."""
    if not variant.calibrated or profile is None:
        return 0
    return min(steps, sum(dense_ends(profile.dense_steps, profile.dense_last_steps, profile.steps, steps)))


def warm_up_steps(variant: Variant, profile: Profile | None, steps: int) -> int:
    """Steps of the shortest run, of `steps` at most, in which all compiles that the variant runs compiled."""
    return next((n for n in range(1, steps) if dense_steps_of(variant, profile, n) < n), steps)


@dataclass
class Outcome:
    """What one variant made.

    pictures: (P, 3, H, W) in [0, 1].  latents: (P, T, C).  seconds: all steps after the warm-up.
    step_ms: median of one denoising step of the whole batch.  compile_s: the warm-up, which compiles.
    sparse_steps: share of the steps that are not dense as a whole.
    distance: to the dense pictures of the same prompts, None for the dense variant itself.
    """

    variant: Variant
    pictures: Tensor
    latents: Tensor
    seconds: float
    step_ms: float
    compile_s: float
    sparse_steps: float = 1.0
    report: Report | None = None
    distance: Distance | None = None

    @property
    def sparse_share(self) -> float:
        """Share of the linear FLOPs of all steps that ran sparse, 0 to 1."""
        return self.report.sparse_share * self.sparse_steps if self.report else 0.0


@dataclass
class Demo:
    """Everything the table, the grid and the page show. layer_errors: {layer: {compensation: error}}."""

    prompts: list[str]
    seed: int
    steps: int
    guidance: float
    device: str
    emulated: bool
    outcomes: list[Outcome] = field(default_factory=list)
    layer_errors: dict[str, dict[str, float]] = field(default_factory=dict)


def run(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 20,
    guidance: float = 3.5,
    profile: Profile | None = None,
    variants: Sequence[Variant] | None = None,
    begin: Told = _ignore,
    advance: Told = _ignore,
) -> Demo:
    """Generate `prompts` with every variant; picture i of each starts from the noise of seed + i.

    pipe: a pipeline with a `transformer`, called as `EmojiFluxPipeline` is; the first variant is the dense
    one that the others are compared with; None stands for `variants_with(profile)`. Without kernels for the
    pipeline's device the sparse variants are emulated. begin is told a variant's title before its first
    step, advance after each of its `warm_up_steps` and of its steps; last come the steps of
    `error_steps(steps)` under `ERROR_TITLE`.
    Raises ValueError when the first variant is sparse, when a calibrated one has no profile or one that
    leaves all steps dense, ProfileError when the profile is another model's, RuntimeError when a sparse
    variant has no sparse layer.
    """
    variants = variants_with(profile) if variants is None else variants
    if not variants or variants[0].compensation is not None:
        raise ValueError("the first variant is what the others are compared with, so it has to be dense")
    if profile is None and any(variant.calibrated for variant in variants):
        raise ValueError("a calibrated variant needs a profile")
    model = transformer_of(pipe)
    if profile is not None:
        check_fits(model, profile)  # before the work, not after it
    for variant in variants:
        if dense_steps_of(variant, profile, steps) == steps:
            raise ValueError(
                f"{variant.title}: the profile leaves none of {steps} steps sparse; take more steps"
            )
    demo = Demo(list(prompts), seed, steps, guidance, str(model.device), _needs_emulation(model))
    try:
        for variant in variants:
            begin(variant.title)
            clear_report()
            torch.compiler.reset()  # the variants share their code objects: no cache entry may serve two
            pipe.transformer = model
            if variant.calibrated and profile is not None:
                apply_profile(pipe, profile)
            else:
                remove_profile(pipe)
            pipe.transformer = _as_variant(model, variant, demo.emulated)
            outcome = _generate(pipe, demo, variant, warm_up_steps(variant, profile, steps), advance)
            outcome.sparse_steps = 1 - dense_steps_of(variant, profile, steps) / steps
            if demo.outcomes:
                dense = demo.outcomes[0]
                outcome.distance = distance(outcome.latents, dense.latents, outcome.pictures, dense.pictures)
            demo.outcomes.append(outcome)
    finally:
        pipe.transformer = model
        remove_profile(pipe)
    begin(ERROR_TITLE)
    demo.layer_errors = _layer_errors(pipe, demo, advance)
    return demo


def error_steps(steps: int) -> int:
    """Steps of the run on which layer errors are measured, for pictures of `steps` steps."""
    return min(ERROR_STEPS, steps)


def _needs_emulation(model: torch.nn.Module) -> bool:
    weight = next(model.parameters())
    return kernels.unavailable_reason(weight.device, weight.dtype) is not None


def _as_variant(model: Any, variant: Variant, emulated: bool) -> Any:
    cuda = model.device.type == "cuda"
    if variant.compensation is None:
        return torch.compile(model) if cuda else model
    options: dict[str, Any] = {
        "compensation": variant.compensation,
        "emulate": emulated,
        "min_tokens": 0,  # the model is far smaller than any for which sparsity pays
        "rest": "inductor" if cuda else "eager",
    }
    return torch.compile(model, backend="rt_lynx", options=options)


def _checked(made: Report, variant: Variant, dense_too: bool) -> Report:
    """The report, without the second graph of a model that is compiled for its dense steps too."""
    if not made.sparse_share:
        reasons = dict.fromkeys([*made.notes, *sorted({row.reason for row in made.rows})])
        raise RuntimeError(f"{variant.title}: no layer became sparse ({'; '.join(reasons) or 'none found'})")
    if not dense_too:
        return made
    return Report(tuple(g for g in made.graphs if any(row.decision == "sparse" for row in g.rows)))


def _generate(pipe: Any, demo: Demo, variant: Variant, warm_up: int, advance: Told) -> Outcome:
    """Warm up with a run of `warm_up` steps, which compiles, then generate."""
    device = torch.device(demo.device)
    marks: list[float] = []

    def mark() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())

    def after_step(_: Any, step: int, __: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        mark()
        advance(variant.title)
        return state

    mark()
    _sample(pipe, demo, warm_up, variant.noise, after_step)
    compile_s = marks[-1] - marks[0]
    made = None if variant.compensation is None else _checked(report(), variant, dense_too=warm_up > 1)
    marks.clear()
    mark()
    latents = _sample(pipe, demo, demo.steps, variant.noise, after_step)
    taken = [later - earlier for earlier, later in pairwise(marks)]
    return Outcome(
        variant,
        pictures=to_pictures(latents).cpu(),
        latents=latents.float().cpu(),
        seconds=sum(taken),
        step_ms=1000 * median(taken),
        compile_s=compile_s,
        report=made,
    )


def _sample(pipe: Any, demo: Demo, steps: int, noise: int, after_step: Any = None) -> Tensor:
    seeds = [demo.seed + noise + i for i in range(len(demo.prompts))]
    return pipe(
        demo.prompts,
        num_inference_steps=steps,
        guidance_scale=demo.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        callback_on_step_end=after_step,
    ).images


def _layer_errors(pipe: Any, demo: Demo, advance: Told) -> dict[str, dict[str, float]]:
    """Of the layers that became sparse, over a short dense run of the same prompts."""

    def after_step(_: Any, step: int, __: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        advance(ERROR_TITLE)
        return state

    errors = LayerErrors()
    with errors.observing(pipe.transformer):
        _sample(pipe, demo, error_steps(demo.steps), noise=0, after_step=after_step)
    made = next((outcome.report for outcome in demo.outcomes if outcome.report), None)
    measured = errors.relative()
    names = [row.name for row in made.rows if row.decision == "sparse"] if made else []
    return {name: measured[name] for name in names if name in measured}
