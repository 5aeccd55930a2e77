"""What an error of the velocity at one step does to the final sample: early ones grow, late ones do not.

    amplification of a call = ‖x̂ − x‖² / ‖x‖²  over  ‖v̂ − v‖² / ‖v‖²,  only that call of a run perturbed

Measured with the sparse layers themselves, so that the perturbation has the shape of the errors in question.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from .emulation import Forward, emulate
from .joint import Pool
from .refine import record
from .sensitivity import Sensitivity
from .workload import Workload


def amplification(
    workload: Workload, layers: Mapping[str, Forward], guidance: float | None = None, measured: int = 8
) -> list[float]:
    """The amplification of each call of a run, with mean 1: `weights` of `joint.distill_jointly`.

    guidance: as there.  measured: how many calls are, each by one run over the workload; most of them early
    ones, where it changes fast. The others lie on a line between them.
    """
    study = Sensitivity(workload, quiet=True)
    study.samples()
    count = study.calls_per_run
    calls = record(workload, quiet=True)
    chosen = sorted({round((count - 1) * (i / max(measured - 1, 1)) ** 2) for i in range(measured)})
    found = []
    for i in chosen:
        total = 0.0
        with torch.no_grad(), emulate(workload.model, layers):
            for call in calls[i::count]:
                pool = Pool([call], guidance)
                total += (
                    sum(float(pool.loss(workload.model, part)) * n for part, n in pool.parts(256))
                    / pool.count
                )
        velocity = total / len(calls[i::count])
        sample = study.sample(layers, lambda call, i=i: call == i) ** 2  # type: ignore[misc]
        found.append(sample / max(velocity, 1e-12))
    between = np.interp(np.arange(count), chosen, found)
    return (between / between.mean() if between.any() else np.ones(count)).tolist()
