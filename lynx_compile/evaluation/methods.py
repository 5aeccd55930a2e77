"""The methods of the quality table: the forwards of the layers each changes, and what they cost to make.

A method sees the dense model and calibration batches, never a held-out prompt.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration.emulation import Forward
from ..calibration.refine import Call, distill_layers, random_branches
from ..calibration.statistics import Hooks, Readers, rows_of
from ..calibration.workload import Workload
from ..profile import Branch, Profile
from ..profile.fingerprint import linear_layers
from .weight_sparsity import InputStatistics, bawa, magnitude, ria, slim, wanda


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
    """One row of the table. layers: the forwards of what it makes sparse.  rank: of its branch."""

    name: str
    layers: Mapping[str, Forward]
    calibration_s: float = 0.0
    rank: int = 0
    dense_steps: int = 0


@dataclass
class Clock:
    """Wall time of device work between entering and leaving."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        _finish()
        start = time.monotonic()
        try:
            yield
        finally:
            _finish()
            self.seconds += time.monotonic() - start


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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


def sparse_weights(workload: Workload, names: list[str], rank: int) -> Iterator[Method]:
    """2:4 weights by magnitude, Wanda, RIA, BaWA and SLiM, one after another."""
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
    clock = Clock(gathering.seconds)
    with clock.running(), torch.no_grad():
        layers = {name: _slim_layer(linears[name], statistics[name], rank) for name in names}
    yield Method(f"2:4 weights, SLiM r{rank}", layers, clock.seconds, rank)


def _slim_layer(module: nn.Linear, statistics: InputStatistics, rank: int) -> PrunedWeight:
    pruned, down, up = slim(module.weight, statistics, min(rank, *module.weight.shape))
    return PrunedWeight(pruned, down.to(pruned.dtype), up.to(pruned.dtype))


def branches_of(profile: Profile, model: nn.Module, names: list[str] | None = None) -> dict[str, Branch]:
    """A profile's branches, on the model's device in its dtype."""
    linears = linear_layers(model)
    return {
        name: layer.branch.to(linears[name].weight.device, linears[name].weight.dtype)
        for name, layer in profile.layers.items()
        if names is None or name in names
    }


def paper_recipe(
    model: nn.Module, calls: list[Call], names: list[str], rank: int, steps: int, lr: float
) -> Method:
    """SA-NC-LoRA as RT-Lynx trains it: norm compensation, no shift, branches from a random start."""
    clock = Clock()
    with clock.running():
        start = random_branches(model, {name: Branch() for name in names}, rank)
        trained = distill_layers(model, calls, start, steps=steps, lr=lr, quiet=True)
    linears = linear_layers(model)
    layers = {
        name: branch.to(linears[name].weight.device, linears[name].weight.dtype)
        for name, branch in trained.items()
    }
    return Method(f"SA-NC-LoRA r{rank}, paper's recipe ({steps} steps)", layers, clock.seconds, rank)
