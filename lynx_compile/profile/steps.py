"""Dense first and last steps in an unmodified pipeline: a hook before the transformer follows the schedule.

The switch it sets is read by every prepared layer. Under `torch.compile` Dynamo guards on it, so a model gets
two compiled variants over one set of weights, each compiled once; hooks run outside the compiled graph.
"""

from __future__ import annotations

import inspect
import logging
import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


@dataclass
class StepSwitch:
    """Which variant of a model runs now: while `dense`, every layer is the plain linear layer."""

    dense: bool = False


def dense_ends(dense_steps: int, dense_last_steps: int, steps: int, total: int) -> tuple[int, int]:
    """How many first and last steps of `total` are dense under a profile that was made for `steps`."""
    return math.ceil(dense_steps * total / steps), math.ceil(dense_last_steps * total / steps)


def scheduled_step(pipe: Any, usual: int) -> tuple[int, int] | None:
    """The step that a pipeline's scheduler is at and how many there are; None if it tells none or is idle.

    Schedulers of second order call twice a step, and count calls.  usual: how many where they do not say.
    """
    scheduler: Any = getattr(pipe, "scheduler", None)
    if not hasattr(scheduler, "step_index"):
        return None
    index, timesteps = scheduler.step_index, getattr(scheduler, "timesteps", None)
    step = index if index is not None else getattr(scheduler, "begin_index", None) or 0
    told = getattr(scheduler, "num_inference_steps", None)
    total = (told or usual) if timesteps is None else len(timesteps)
    never_set = index is None and told is None and timesteps is not None  # all 1000 of training
    return None if never_set or step >= total else (step, total)


class StepTracker:
    """Sets `switch.dense` before each call of the transformer: on during a run's first and last steps.

    dense_steps, dense_last_steps, steps: how many of how many denoising steps were dense when the profile was
    made; another number of steps scales both, rounded up. pipe: its scheduler is read for the step, at no
    cost; without one, or where another pipeline runs the transformer, the step is told by the transformer's
    `timestep` argument, which costs one device synchronisation a call, and runs are taken to have `steps`
    steps.
    """

    def __init__(
        self, switch: StepSwitch, dense_steps: int, dense_last_steps: int, steps: int, pipe: Any = None
    ) -> None:
        self.switch, self.steps = switch, steps
        self.dense_steps, self.dense_last_steps = dense_steps, dense_last_steps
        self._pipe = weakref.ref(pipe) if pipe is not None else None
        self._last: float | None = None
        self._direction = 0.0
        self._step = 0
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        """A copied or saved transformer is in no pipeline yet: its copy goes by the timestep."""
        return {**vars(self), "_pipe": None}

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pipe = self._pipe() if self._pipe is not None else None
        scheduled = scheduled_step(pipe, self.steps)
        if scheduled is None and hasattr(getattr(pipe, "scheduler", None), "step_index") and not self._warned:
            self._warned = True
            log.warning(
                "%s runs, but not in the %s that its profile was applied to: its dense steps now go by the "
                "timestep, for runs of %d steps; apply the profile to the pipeline that runs",
                *(type(module).__name__, type(pipe).__name__, self.steps),
            )
        step, total = scheduled or (self._from_timestep(module, args, kwargs), self.steps)
        first, last = dense_ends(self.dense_steps, self.dense_last_steps, self.steps, total)
        self.switch.dense = step < first or step >= total - last

    def _from_timestep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Timesteps move one way during a run, up or down by pipeline; turning back starts the next run."""
        value = kwargs.get("timestep")
        if value is None:
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            value = dict(zip(names, args, strict=False)).get("timestep")
        if value is None:
            raise TypeError(
                f"{type(module).__name__} is called without a timestep, so its dense steps cannot be told; "
                "apply the profile to the pipeline, or set dense_steps to 0"
            )
        now = float(value.reshape(-1)[0]) if isinstance(value, Tensor) else float(value)
        change = 0.0 if self._last is None else now - self._last
        if self._last is None or change * self._direction < 0:
            self._step, self._direction = 0, 0.0
        elif change:
            self._step, self._direction = self._step + 1, change
        self._last = now
        return self._step
