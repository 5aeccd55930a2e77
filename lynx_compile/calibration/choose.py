"""Which layers and which first steps stay dense: least error at a speed, or least time within an error.

Squared errors of the final sample add up over layers to a good approximation (interactions are checked: the
chosen set is measured as a whole, every member's marginal effect within it is measured, and the problem is
solved again with those). A layer costs its predicted time; one knapsack over time saved gives the whole
Pareto front. Dense first steps scale both: n of T dense steps leave (T − n)/T of the saving and a measured
share of the error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from ..cost import predict
from ..profile.fingerprint import linear_layers
from ..profile.format import Profile
from .emulation import Forward
from .sensitivity import Sensitivity

STEP_COUNTS = (0, 1, 2, 3, 4)  # of dense first steps to choose from
BUCKETS = 2000  # of time saved; finer than any cost model is true


@dataclass(frozen=True)
class Cost:
    """Predicted time of one layer, dense and sparse, in any one unit."""

    dense: float
    sparse: float


@dataclass(frozen=True)
class Choice:
    """One point of the front: sparse layers, dense first steps, and what is expected of them.

    time: of all linear layers over a run, relative to all dense.  error: expected relative error of the final
    sample.  measured: the same, measured; None before.
    """

    sparse: frozenset[str]
    dense_steps: int
    time: float
    error: float
    measured: float | None = None

    @property
    def speed(self) -> float:
        return 1 / self.time


def flops_costs(profile: Profile) -> dict[str, Cost]:
    """Costs where only FLOPs count: a sparse layer takes half."""
    return {
        name: Cost(flops := float(layer.tokens * layer.shape[0] * layer.shape[1]), flops / 2)
        for name, layer in profile.layers.items()
    }


def device_costs(
    profile: Profile, device: str, batch: int = 1, tokens: Mapping[str, int] | None = None
) -> dict[str, Cost]:
    """Costs from the measured table of a device (`lynx_compile.cost.devices()`), in ms.

    batch: samples in one call.  tokens: layer → tokens of one sample, where other than in the calibration.
    """
    costs = {}
    for name, layer in profile.layers.items():
        m = batch * (tokens or {}).get(name, layer.tokens)
        predicted = predict(device, m, *layer.shape, rank=layer.branch.rank)
        costs[name] = Cost(predicted.dense_ms, predicted.sparse_ms)
    return costs


def costs_of(profile: Profile, model: nn.Module, costs: str) -> tuple[dict[str, Cost], float]:
    """(cost of each layer of the profile, time of the linear layers that are never sparse).

    costs: "flops", or a device of `lynx_compile.cost.devices()`.
    """
    linears = linear_layers(model)
    others = {
        name: (tokens, linears[name].weight.shape) for name, tokens in profile.studies["other_tokens"].items()
    }
    if costs == "flops":
        return flops_costs(profile), float(sum(m * n * k for m, (n, k) in others.values()))
    other_time = sum(predict(costs, m, n, k).dense_ms for m, (n, k) in others.values())
    return device_costs(profile, costs), other_time


def front(
    costs: Mapping[str, Cost],
    squared_errors: Mapping[str, float],
    steps: int,
    step_factors: Mapping[int, float],
    other_time: float = 0.0,
) -> list[Choice]:
    """The Pareto front, from all dense to all sparse.

    squared_errors: layer → its squared error.  step_factors: n → what is left of the squared error when the
    first n of `steps` steps run dense (0 → 1).  other_time: of linear layers that are never sparse.
    """
    names = [name for name, cost in costs.items() if cost.sparse < cost.dense]
    dense_time = sum(cost.dense for cost in costs.values()) + other_time
    savings = np.array([costs[name].dense - costs[name].sparse for name in names])
    errors = np.array([max(squared_errors[name], 0.0) for name in names])
    sets = _knapsack(savings, errors)
    choices = [Choice(frozenset(), 0, 1.0, 0.0)]
    for n, factor in sorted(step_factors.items()):
        share = (steps - n) / steps
        for members in sets:
            saved = float(savings[members].sum()) * share
            error = (float(errors[members].sum()) * factor) ** 0.5
            choices.append(Choice(frozenset(names[i] for i in members), n, 1 - saved / dense_time, error))
    return _undominated(choices)


def _knapsack(savings: np.ndarray, errors: np.ndarray) -> list[list[int]]:
    """For each level of time saved the set of least squared error that saves it, exact on the buckets."""
    if not len(savings):
        return []
    total = float(savings.sum())
    # Rounded down, so that no set saves less than its bucket says.
    weights = np.floor(savings / total * BUCKETS).astype(int)
    least = np.full(BUCKETS + 1, np.inf)
    least[0] = 0.0
    taken = np.zeros((len(savings), BUCKETS + 1), dtype=bool)
    for i, (weight, error) in enumerate(zip(weights, errors, strict=True)):
        candidate = np.full_like(least, np.inf)
        candidate[weight:] = least[: BUCKETS + 1 - weight] + error
        taken[i] = candidate < least
        least = np.where(taken[i], candidate, least)
    sets = []
    for bucket in np.flatnonzero(np.isfinite(least)):
        members, at = [], int(bucket)
        for i in range(len(savings) - 1, -1, -1):
            if taken[i, at]:
                members.append(i)
                at -= weights[i]
        # A layer whose saving rounds to nothing is never needed for a bucket, but is free where it does no
        # harm.
        members += [i for i in range(len(savings)) if weights[i] == 0 and errors[i] == 0 and i not in members]
        if members:
            sets.append(members)
    return sets


def _undominated(choices: list[Choice]) -> list[Choice]:
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.time, c.error), reverse=False):
        if not kept or choice.error < kept[-1].error:
            kept.append(choice)
    return kept[::-1]


def pick(points: list[Choice], *, max_error: float | None = None, speed: float | None = None) -> Choice:
    """Least time within `max_error`, or least error at `speed` (of the linear layers, over dense).

    Raises ValueError unless exactly one is given, or when no point of the front is fast enough.
    """
    if (max_error is None) == (speed is None):
        raise ValueError("give either max_error or speed")
    if max_error is not None:
        return min((c for c in points if c.error <= max_error), key=lambda c: c.time)
    assert speed is not None
    fast = [c for c in points if c.speed >= speed * (1 - 1e-9)]
    if not fast:
        best = max(c.speed for c in points)
        raise ValueError(f"no choice reaches a speed of {speed:.3f}; all that may be sparse gives {best:.3f}")
    return min(fast, key=lambda c: c.error)


@dataclass
class Chooser:
    """Chooses, measures what was chosen, and corrects the model of errors by what it finds.

    layers: every candidate's forward.  costs, other_time, steps: as in `front`.  squared_errors: layer →
    squared error when it alone is sparse; overwritten by marginal effects as they are measured.
    """

    study: Sensitivity
    layers: Mapping[str, Forward]
    costs: Mapping[str, Cost]
    squared_errors: dict[str, float]
    step_factors: Mapping[int, float]
    steps: int
    other_time: float = 0.0

    def points(self) -> list[Choice]:
        return front(self.costs, self.squared_errors, self.steps, self.step_factors, self.other_time)

    def measure(self, choice: Choice) -> Choice:
        """The choice with its measured error."""
        layers = {name: self.layers[name] for name in choice.sparse}
        return replace(
            choice, measured=self.study.sample(layers, lambda call: self._step(call) >= choice.dense_steps)
        )

    def _step(self, call: int) -> int:
        """Guidance may call the transformer several times a step, always as often."""
        return call * self.steps // self.study.calls_per_run

    def marginals(self, choice: Choice) -> None:
        """Replace each member's squared error by what the chosen set loses when it turns dense."""
        whole = self.measure(replace(choice, dense_steps=0)).measured
        assert whole is not None
        for name in sorted(choice.sparse):
            rest = self.measure(replace(choice, sparse=choice.sparse - {name}, dense_steps=0)).measured
            assert rest is not None
            self.squared_errors[name] = max(whole**2 - rest**2, 0.0)

    def choose(
        self,
        *,
        max_error: float | None = None,
        speed: float | None = None,
        rounds: int = 2,
        note: Callable[[Choice], None] = lambda _: None,
    ) -> Choice:
        """The best measured choice after `rounds` of solving, measuring and correcting.

        For max_error the expected error is scaled by what the last measurement said of it. `note` is told
        every measured choice.
        """
        best: Choice | None = None
        correction = 1.0
        for round_ in range(rounds + 1):
            limit = None if max_error is None else max_error / max(correction, 1e-6)
            choice = self.measure(pick(self.points(), max_error=limit, speed=speed))
            note(choice)
            assert choice.measured is not None
            if best is None or self._better(choice, best, max_error):
                best = choice
            if round_ < rounds and choice.sparse:
                self.marginals(choice)
            correction = choice.measured / max(self._expected(choice), 1e-9)
        assert best is not None
        return best

    def _expected(self, choice: Choice) -> float:
        squares = sum(self.squared_errors[name] for name in choice.sparse)
        return (squares * self.step_factors[choice.dense_steps]) ** 0.5 if choice.sparse else 0.0

    @staticmethod
    def _better(one: Choice, other: Choice, max_error: float | None) -> bool:
        assert one.measured is not None
        assert other.measured is not None
        if max_error is None:
            return one.measured < other.measured
        fits = (one.measured <= max_error, other.measured <= max_error)
        if fits[0] != fits[1]:
            return fits[0]
        return one.time < other.time if fits[0] else one.measured < other.measured


def chooser_for(
    study: Sensitivity, profile: Profile, layers: Mapping[str, Forward], costs: str, share: float = 0.85
) -> Chooser:
    """Measure every layer's and the first steps' effect, note them in the profile, and return a chooser.

    costs: "flops", or a device of `lynx_compile.cost.devices()`.  share: of the saving at which the effect of
    dense first steps is measured; it depends on what else is dense.
    """
    table, other_time = costs_of(profile, study.workload.model, costs)
    effects = study.measure(layers, "layer")
    squares = {name: (effect.sample or 0.0) ** 2 for name, effect in effects.items()}
    for name, effect in effects.items():
        profile.layers[name].sensitivity = {"velocity": effect.velocity, "sample": effect.sample or 0.0}
    points = front(table, squares, profile.steps, {0: 1.0}, other_time)
    fastest = min(point.time for point in points)
    likely = pick(points, speed=1 / (1 - share * (1 - fastest)))
    measured = study.steps({name: layers[name] for name in likely.sparse}, STEP_COUNTS)
    profile.studies["dense_first_steps"] = {str(n): list(errors) for n, errors in measured.items()}
    whole = max(measured[0][0], 1e-9)
    factors = {n: (errors[0] / whole) ** 2 for n, errors in measured.items() if n < profile.steps}
    return Chooser(study, layers, table, squares, factors, profile.steps, other_time)


def apply_choice(profile: Profile, choice: Choice) -> None:
    """Write the decisions into a profile."""
    for name, layer in profile.layers.items():
        layer.sparse = name in choice.sparse
        effect = layer.sensitivity.get("sample")
        known = "" if effect is None else f", alone {effect:.3f} of the final sample"
        layer.reason = f"chosen by end-to-end sensitivity{known}"
    profile.dense_steps = choice.dense_steps
