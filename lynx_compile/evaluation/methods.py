"""The methods of the quality table: the forwards of the layers each changes, and what they cost to make.

A method sees the dense model and prompts to calibrate, train and validate with, never a held-out prompt. A
stage is a function from `Ground` to methods; `run.STAGES` lists them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration.choose import problem_of
from ..calibration.emulation import Forward
from ..calibration.front import Choice, pick, points
from ..calibration.sensitivity import SENSITIVE, class_of
from ..calibration.statistics import Hooks, Readers, rows_of
from ..calibration.workload import Workload
from ..profile import Branch
from ..profile.fingerprint import linear_layers
from .clock import Clock
from .ground import Ground, speed_of
from .weight_sparsity import InputStatistics, bawa, magnitude, ria, slim, wanda

OURS = "shift + deflation"  # what `calibrate` makes


@dataclass(frozen=True, eq=False)
class PrunedWeight:
    """The forward of a layer with 2:4 sparse weights and, for SLiM, a branch beside them."""

    weight: Tensor
    down: Tensor | None = None
    up: Tensor | None = None

    def __call__(self, module: nn.Linear, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, module.bias)
        if self.down is not None and self.up is not None:
            y = y + F.linear(F.linear(x, self.down), self.up)
        return y


@dataclass
class Method:
    """One row of the table. layers: the forwards of what it makes sparse.  rank: of its branch.

    dense_steps, dense_last_steps: the first and the last steps in which nothing is sparse.  details: what
    else to write down of it (JSON values).  shown: whether its pictures join the sheet.
    """

    name: str
    layers: Mapping[str, Forward]
    calibration_s: float = 0.0
    rank: int = 0
    dense_steps: int = 0
    dense_last_steps: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    shown: bool = True


def ladder(ground: Ground) -> Iterator[Method]:
    """Sparse activations: 2:4 alone, with norm compensation, with branches in closed form, and ours."""
    names = ground.names
    yield Method("SA-native", {name: Branch(compensation="native") for name in names})
    yield Method("SA-NC", {name: Branch() for name in names})
    for rank in ground.settings.ranks:
        lora, ours = ground.lora(rank), ground.ours(rank)
        yield Method(f"SA-NC-LoRA r{rank}, closed form", lora.branches, lora.seconds, rank)
        yield Method(f"{OURS} r{rank}", ours.branches, ours.seconds, rank)


def ruled(ground: Ground) -> Iterator[Method]:
    """Ours with what the safe rules leave dense (text stream, attention outputs), and a step at an end."""
    names = [name for name in ground.names if class_of(name) not in SENSITIVE]
    for rank in ground.settings.ranks[-2:]:
        ours = ground.ours(rank)
        layers = {name: ours.branches[name] for name in names}
        for title, first, last in (("", 0, 0), (", first step dense", 1, 0), (", last step dense", 0, 1)):
            name = f"{OURS} r{rank}, safe rules{title}"
            yield Method(name, layers, ours.seconds, rank, first, last, shown=False)


def chosen(ground: Ground) -> Iterator[Method]:
    """Ours with layers left dense by end-to-end sensitivity, and by local error at equal shares."""
    s, rank = ground.settings, ground.rank
    for share in sorted(ground.shares, key=lambda share: abs(share - s.main_share)):
        choice = ground.choice(share)
        for r in reversed(s.ranks if share == s.main_share else (rank,)):
            ours = ground.ours(r)
            seconds = ours.seconds + ground.choosing.seconds
            title = f"{OURS} r{r} + SL end to end, {share:.0%}"
            yield method_of(title, choice, ours.branches, seconds, r, share == s.main_share)
        if share == s.main_share and ground.last_steps(share):
            title = f"{OURS} r{rank} + SL end to end, {share:.0%}, no last step dense"
            choice, ours = ground.choice(share, 0), ground.ours(rank)
            yield method_of(title, choice, ours.branches, ours.seconds + ground.choosing.seconds, rank, True)
    ours = ground.ours(rank)
    errors = {name: layer.error_after or 0.0 for name, layer in ours.profile.layers.items()}
    for share in ground.shares:
        choice = by_local_error(ground, errors, share)
        title = f"{OURS} r{rank} + SL by local error, {share:.0%}"
        yield method_of(title, choice, ours.branches, ours.seconds, rank, share == s.main_share)


def by_local_error(ground: Ground, errors: Mapping[str, float], share: float) -> Choice:
    """The layers of the least sum of squared local errors at this share."""
    gram = np.diag([error**2 for error in errors.values()])
    problem = problem_of(ground.costs, [(name, 0) for name in errors], gram, ground.settings.steps)
    return pick(points(problem), speed=speed_of(share))


def method_of(
    title: str, choice: Choice, branches: Mapping[str, Branch], seconds: float, rank: int, shown: bool
) -> Method:
    """A row with the layers of a choice."""
    layers = {name: replace(branches[name], dense_tokens=rows) for name, rows in choice.sparse.items()}
    details = {
        "dense_layers": sorted(set(branches) - set(choice.sparse)),
        "text_rows_dense": sorted(name for name, rows in choice.sparse.items() if rows),
    }
    ends = choice.dense_steps, choice.dense_last_steps
    return Method(title, layers, seconds, rank, *ends, details, shown)


def input_statistics(workload: Workload, names: list[str]) -> dict[str, InputStatistics]:
    """What the weight-sparsity methods need, per layer; layers that read the same tensor share one object."""
    linears = linear_layers(workload.model)
    readers = Readers()
    sums: dict[str, tuple[Tensor, Tensor, list[int]]] = {}

    def see(name: str, x: Tensor) -> None:
        if readers.see(name, x) != name:
            return
        rows = rows_of(x).float()
        k = rows.shape[1]
        second, size, count = sums.setdefault(
            name, (torch.zeros(k, k, device=x.device), torch.zeros(k, device=x.device), [0])
        )
        second.addmm_(rows.T, rows)
        size += rows.abs().sum(0)
        count[0] += len(rows)

    with Hooks(workload.model, {name: linears[name] for name in names}, see, readers.end_of_call):
        for batch in range(len(workload)):
            workload.run(batch)
    shared = {
        leader: InputStatistics(second, size / count[0], count[0])
        for leader, (second, size, count) in sums.items()
    }
    return {name: shared[leader] for leader, group in readers.groups().items() for name in group}


def sparse_weights(ground: Ground) -> Iterator[Method]:
    """The rivals: sparse weights in every layer that may be sparse."""
    ranks = ground.settings.ranks
    return weight_methods(ground.calibration, ground.names, sorted({ranks[0], ranks[-1]}))


def weight_methods(workload: Workload, names: list[str], ranks: Sequence[int]) -> Iterator[Method]:
    """2:4 weights by magnitude, Wanda, RIA, BaWA and, for each rank, SLiM."""
    linears = linear_layers(workload.model)
    statistics: dict[str, InputStatistics] = {}
    gathering = Clock()
    with gathering.running():
        statistics = input_statistics(workload, names)
    for title, prune in (
        ("2:4 weights, magnitude", lambda w, _: magnitude(w)),
        ("2:4 weights, Wanda", wanda),
        ("2:4 weights, RIA", ria),
        ("2:4 weights, BaWA", bawa),
    ):
        clock = Clock(0.0 if "magnitude" in title else gathering.seconds)
        with clock.running(), torch.no_grad():
            layers = {name: PrunedWeight(prune(linears[name].weight, statistics[name])) for name in names}
        yield Method(title, layers, clock.seconds)
    for rank in ranks:
        clock = Clock(gathering.seconds)
        with clock.running(), torch.no_grad():
            layers = {name: _slim_layer(linears[name], statistics[name], rank) for name in names}
        yield Method(f"2:4 weights, SLiM r{rank}", layers, clock.seconds, rank)


def _slim_layer(module: nn.Linear, statistics: InputStatistics, rank: int) -> PrunedWeight:
    pruned, down, up = slim(module.weight, statistics, min(rank, *module.weight.shape))
    return PrunedWeight(pruned, down.to(pruned.dtype), up.to(pruned.dtype))
