"""What stays dense, layers, text rows of joint sequences, first steps: least error at a speed or the reverse.

Squared errors of the final sample add up over layers to a good approximation (interactions are checked: the
chosen set is measured as a whole, every member's marginal effect within it is measured, and the problem is
solved again with those). A layer runs sparse in one of several ways, each with the time it saves; one
knapsack over time saved gives the whole Pareto front. Dense first steps scale both: n of T dense steps leave
(T − n)/T of the saving and a measured share of the error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..profile.branch import Branch
from ..profile.format import Profile
from .costs import Costs, costs_of
from .emulation import Forward
from .sensitivity import Sensitivity

STEP_COUNTS = (0, 1, 2, 3, 4)  # of dense first steps to choose from
BUCKETS = 2000  # of time saved; finer than any cost model is true


@dataclass(frozen=True)
class Way:
    """One way to run a layer sparse: time saved, and squared error of the final sample."""

    saved: float
    square: float


Ways = Mapping[str, Mapping[int, Way]]  # layer → leading tokens of each sample that stay dense → way


@dataclass(frozen=True)
class Choice:
    """One point of the front: sparse layers, dense first steps, and what is expected of them.

    sparse: layer → leading tokens of each sample that stay dense in it, 0 for none.  time: of all linear
    layers over a run, relative to all dense.  error: expected relative error of the final sample.
    measured: the same, measured; None before.
    """

    sparse: Mapping[str, int]
    dense_steps: int
    time: float
    error: float
    measured: float | None = None

    @property
    def speed(self) -> float:
        return 1 / self.time


def front(ways: Ways, dense_time: float, steps: int, step_factors: Mapping[int, float]) -> list[Choice]:
    """The Pareto front, from all dense to the fastest.

    dense_time: of all linear layers, also those that are never sparse.  step_factors: n → what is left of the
    squared error when the first n of `steps` steps run dense (0 → 1).
    """
    names = [name for name, options in ways.items() if any(way.saved > 0 for way in options.values())]
    options = [[(t, way) for t, way in ways[name].items() if way.saved > 0] for name in names]
    choices = [Choice({}, 0, 1.0, 0.0)]
    sets = _knapsack([[way for _, way in option] for option in options])
    for members in sets:
        taken = [(names[i], *options[i][way]) for i, way in members]
        saved = sum(way.saved for _, _, way in taken)
        square = sum(max(way.square, 0.0) for _, _, way in taken)
        sparse = {name: tokens for name, tokens, _ in sorted(taken, key=lambda entry: entry[0])}
        for n, factor in step_factors.items():
            time = 1 - saved * (steps - n) / steps / dense_time
            choices.append(Choice(sparse, n, time, (square * factor) ** 0.5))
    return _undominated(choices)


def _knapsack(groups: list[list[Way]]) -> list[list[tuple[int, int]]]:
    """For each level of time saved the (layer, way) pairs of least squared error that save it, on buckets."""
    if not groups:
        return []
    total = sum(max(way.saved for way in group) for group in groups)
    # Rounded down, so that no set saves less than its bucket says.
    weights = [[int(way.saved / total * BUCKETS) for way in group] for group in groups]
    least = np.full(BUCKETS + 1, np.inf)
    least[0] = 0.0
    taken = np.full((len(groups), BUCKETS + 1), -1, dtype=np.int8)
    for i, group in enumerate(groups):
        best = least.copy()
        for w, way in enumerate(group):
            candidate = np.full_like(least, np.inf)
            candidate[weights[i][w] :] = least[: BUCKETS + 1 - weights[i][w]] + max(way.square, 0.0)
            # A way that does no harm is taken for nothing, also where its saving rounds to nothing.
            better = (candidate < best) | ((candidate == best) & (way.square <= 0) & np.isfinite(best))
            taken[i][better] = w
            best = np.where(better, candidate, best)
        least = best
    sets = []
    for bucket in np.flatnonzero(np.isfinite(least)):
        members, at = [], int(bucket)
        for i in range(len(groups) - 1, -1, -1):
            if (w := int(taken[i, at])) >= 0:
                members.append((i, w))
                at -= weights[i][w]
        if members:
            sets.append(members)
    return sets


def _undominated(choices: list[Choice]) -> list[Choice]:
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.time, c.error)):
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

    forwards: layer → leading tokens that stay dense → its forward.  squares: the same → squared error when it
    alone is sparse, corrected by marginal effects as they are measured.  step_factors, steps: as in `front`.
    """

    study: Sensitivity
    forwards: Mapping[str, Mapping[int, Forward]]
    costs: Costs
    squares: dict[str, dict[int, float]]
    step_factors: Mapping[int, float]
    steps: int

    def points(self) -> list[Choice]:
        return front(ways_of(self.costs, self.squares), self.costs.dense_time, self.steps, self.step_factors)

    def measure(self, choice: Choice) -> Choice:
        """The choice with its measured error."""
        layers = {name: self.forwards[name][tokens] for name, tokens in choice.sparse.items()}
        return replace(
            choice, measured=self.study.sample(layers, lambda call: self._step(call) >= choice.dense_steps)
        )

    def _step(self, call: int) -> int:
        """Guidance may call the transformer several times a step, always as often."""
        return call * self.steps // self.study.calls_per_run

    def marginals(self, choice: Choice) -> None:
        """Replace each member's squared error by what the chosen set loses when it turns dense.

        A layer's other ways are corrected in proportion.
        """
        whole = self.measure(replace(choice, dense_steps=0)).measured
        assert whole is not None
        for name, tokens in choice.sparse.items():
            others = {other: kept for other, kept in choice.sparse.items() if other != name}
            rest = self.measure(replace(choice, sparse=others, dense_steps=0)).measured
            assert rest is not None
            squares = self.squares[name]
            now = max(whole**2 - rest**2, 0.0)
            ratio = now / squares[tokens] if squares[tokens] > 0 else 1.0
            self.squares[name] = {
                way: now if way == tokens else before * ratio for way, before in squares.items()
            }

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
        squares = sum(self.squares[name][tokens] for name, tokens in choice.sparse.items())
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


def ways_of(costs: Costs, squares: Mapping[str, Mapping[int, float]]) -> Ways:
    """squares: layer → leading tokens that stay dense → squared error."""
    return {
        name: {
            tokens: Way((costs.rows_saved if tokens else costs.saved)[name], square)
            for tokens, square in options.items()
        }
        for name, options in squares.items()
    }


def chooser_for(
    study: Sensitivity,
    profile: Profile,
    branches: Mapping[str, Branch],
    device: str,
    share: float = 0.85,
    text_rows: Mapping[str, int] | None = None,
) -> Chooser:
    """Measure every layer's and the first steps' effect, note them in the profile, and return a chooser.

    device: whose times count, or "flops".  share: of the saving at which the effect of dense first steps is
    measured; it depends on what else is dense.  text_rows: layer → leading rows that are text and may stay
    dense while the others are sparse.
    """
    text_rows = dict(text_rows or {})
    costs = costs_of(profile, study.workload.model, device, text_rows)
    forwards: dict[str, dict[int, Forward]] = {
        name: {tokens: replace(branch, dense_tokens=tokens) for tokens in {0, text_rows.get(name, 0)}}
        for name, branch in branches.items()
    }
    whole = study.measure({name: ways[0] for name, ways in forwards.items()}, "layer")
    rows = study.measure({name: forwards[name][tokens] for name, tokens in text_rows.items()}, "layer")
    squares = {name: {0: (effect.sample or 0.0) ** 2} for name, effect in whole.items()}
    for name, effect in whole.items():
        profile.layers[name].sensitivity = {"velocity": effect.velocity, "sample": effect.sample or 0.0}
    for name, effect in rows.items():
        squares[name][text_rows[name]] = (effect.sample or 0.0) ** 2
        profile.layers[name].sensitivity["sample_text_dense"] = effect.sample or 0.0
    points = front(ways_of(costs, squares), costs.dense_time, profile.steps, {0: 1.0})
    fastest = min(point.time for point in points)
    likely = pick(points, speed=1 / (1 - share * (1 - fastest)))
    measured = study.steps({name: forwards[name][t] for name, t in likely.sparse.items()}, STEP_COUNTS)
    profile.studies["dense_first_steps"] = {str(n): list(errors) for n, errors in measured.items()}
    together = max(measured[0][0], 1e-9)
    factors = {n: (errors[0] / together) ** 2 for n, errors in measured.items() if n < profile.steps}
    return Chooser(study, forwards, costs, squares, factors, profile.steps)


def apply_choice(profile: Profile, choice: Choice) -> None:
    """Write the decisions into a profile."""
    for name, layer in profile.layers.items():
        layer.sparse = name in choice.sparse
        effect = layer.sensitivity.get("sample")
        known = "" if effect is None else f", alone {effect:.3f} of the final sample"
        layer.reason = f"chosen by end-to-end sensitivity{known}"
        layer.branch = replace(layer.branch, dense_tokens=choice.sparse.get(name, 0))
    profile.dense_steps = choice.dense_steps
