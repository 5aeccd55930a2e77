"""Choose what stays dense: layers, text rows of joint sequences, first steps. Then measure what was chosen.

Every layer's effect on the final sample is measured twice: alone sparse, as a vector, and as what a likely
set gains when the layer turns dense in it. `front` makes proposals from either. They are measured as a whole,
with and without dense first steps, and so are what the safe rules leave dense and the nearest exchanges of
layers: the best measured one is the choice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..profile.branch import Branch
from ..profile.format import Profile
from .costs import Costs, costs_of
from .emulation import Forward
from .front import Choice, Problem, Way, neighbours, pick, points, sparse_share
from .sensitivity import SENSITIVE, Sensitivity, class_of, gram_of

STEP_COUNTS = (0, 1, 2, 3, 4)  # of dense steps to choose from, the first in which the model runs
TRIALS = 8  # exchanges measured a round
# What the last step does wrong stays in the picture, as grain: no later step removes it.
DENSE_LAST_STEPS = 1


@dataclass
class Chooser:
    """Chooses among what the problem says, and measures it.

    forwards: of each way, in the problem's order.  within: a second problem, of effects within a set.
    """

    study: Sensitivity
    problem: Problem
    forwards: Sequence[Forward]
    within: Problem | None = None

    @functools.cached_property
    def _fronts(self) -> list[tuple[Problem, list[Choice]]]:
        return [(problem, points(problem)) for problem in (self.problem, self.within) if problem is not None]

    def points(self) -> list[Choice]:
        """The front as expected."""
        return self._fronts[0][1]

    def measure(self, choice: Choice) -> Choice:
        """The choice with its measured error."""
        chosen = np.flatnonzero(self.problem.members(choice)).tolist()
        layers = {self.problem.ways[i].layer: self.forwards[i] for i in chosen}
        steps = self.problem.steps
        sparse = self.study.calls_between(choice.dense_steps, steps - choice.dense_last_steps, steps)
        return replace(choice, measured=self.study.sample(layers, sparse))

    def ending(self, dense_last_steps: int) -> Chooser:
        """The same with another number of dense last steps in every choice."""
        problem, within = (
            None if p is None else replace(p, dense_last_steps=dense_last_steps)
            for p in (self.problem, self.within)
        )
        assert problem is not None
        return Chooser(self.study, problem, self.forwards, within)

    def choose(
        self,
        *,
        max_error: float | None = None,
        speed: float | None = None,
        rounds: int = 2,
        note: Callable[[Choice], None] = lambda _: None,
    ) -> Choice:
        """The best measured choice: least error at `speed`, or least time within `max_error`.

        rounds: how often the nearest exchanges are measured too. `note` is told every measured choice.
        Raises ValueError unless exactly one aim is given, or when no choice is fast enough.
        """
        first = pick(self.points(), max_error=max_error, speed=speed)

        def measured(choice: Choice) -> Choice:
            found = self.measure(choice)
            note(found)
            return found

        if speed is None:
            assert max_error is not None
            return self._fastest_within(max_error, first, measured)
        return self._best_at(speed, first, rounds, measured)

    def _best_at(
        self, speed: float, first: Choice, rounds: int, measured: Callable[[Choice], Choice]
    ) -> Choice:
        """For each number of dense first steps the expected best, then exchanges from the best of them."""
        proposed = [first]
        for problem, front in self._fronts:
            sets = [problem.members(choice) for choice in front if choice.sparse]
            # Each number of dense steps, also where another is expected to do better.
            for n in problem.step_factors:
                with_n = [problem.choice(members, n) for members in sets]
                fast = [choice for choice in with_n if choice.speed >= speed * (1 - 1e-9)]
                proposed += [min(fast, key=lambda c: c.error)] if fast else []
        proposed += self._by_the_rules(speed)
        distinct = {(tuple(c.sparse.items()), c.dense_steps): c for c in proposed}
        best = min(map(measured, distinct.values()), key=_measured)
        for _ in range(rounds):
            near = neighbours(self.problem, best, TRIALS)
            now = min([best, *map(measured, near)], key=_measured)
            if now is best:
                break
            best = now
        return best

    def _by_the_rules(self, speed: float) -> list[Choice]:
        """Sensitive classes dense, as without a profile, and as many first steps as the speed allows."""
        ways = self.problem.ways
        kept = [way.saved > 0 and not way.tokens and class_of(way.layer) not in SENSITIVE for way in ways]
        found = [self.problem.choice(np.array(kept), n) for n in sorted(self.problem.step_factors)]
        return [choice for choice in found if choice.speed >= speed * (1 - 1e-9)][-1:]

    def _fastest_within(
        self, max_error: float, first: Choice, measured: Callable[[Choice], Choice]
    ) -> Choice:
        """Bisection on the front: measured errors rise along it as the expected ones do."""
        front = sorted(self.points(), key=lambda c: c.time, reverse=True)
        low, high = 0, len(front)  # front[0] is all dense: its error is 0
        best, at = replace(front[0], measured=0.0), front.index(first)
        while high - low > 1:
            found = measured(front[at]) if at else best
            assert found.measured is not None
            if found.measured <= max_error:
                low, best = at, found
            else:
                high = at
            at = (low + high) // 2
        return best


def _measured(choice: Choice) -> float:
    assert choice.measured is not None
    return choice.measured


def usual_last_steps(steps: int) -> int:
    """How many last steps of a run stay dense unless told otherwise."""
    return min(DENSE_LAST_STEPS, steps - 1)


def problem_of(
    costs: Costs,
    ways: Sequence[tuple[str, int]],
    gram: np.ndarray,
    steps: int,
    step_factors: Mapping[int, float] | None = None,
    dense_last_steps: int = 0,
    span: tuple[int, int] | None = None,
) -> Problem:
    """ways: (layer, leading tokens of each sample that stay dense), in the order of gram."""
    listed = [Way(name, tokens, (costs.rows_saved if tokens else costs.saved)[name]) for name, tokens in ways]
    factors = step_factors or {0: 1.0}
    return Problem(listed, gram, costs.dense_time, steps, factors, dense_last_steps, span)


def chooser_for(
    study: Sensitivity,
    profile: Profile,
    branches: Mapping[str, Branch],
    device: str,
    share: float = 0.85,
    text_rows: Mapping[str, int] | None = None,
    dense_last_steps: int | None = None,
) -> Chooser:
    """Measure every layer's and the first steps' effect, note them in the profile, and return a chooser.

    device: whose times count, or "flops".  share: of the saving at which the effect of dense first steps is
    measured; it depends on what else is dense.  text_rows: layer → leading rows that are text (below 0: last
    rows) and may stay dense while the others are sparse.  dense_last_steps: of every choice, and of all that
    is measured; `usual_last_steps` by default. Raises ValueError when they leave no sparse step.
    """
    if dense_last_steps is None:
        dense_last_steps = usual_last_steps(profile.steps)
    if dense_last_steps >= profile.steps:
        raise ValueError(
            f"{dense_last_steps} dense last steps leave none of {profile.steps} sparse; take fewer"
        )
    span = study.span(profile.steps)
    if not sparse_share(span, 0, profile.steps - dense_last_steps):
        raise ValueError(
            f"{dense_last_steps} dense last steps of {profile.steps} leave none of those sparse in which the "
            f"model runs, {span[0] + 1} to {span[1]}; take fewer"
        )
    text = text_rows or {}
    ways = [(name, 0) for name in branches] + [(name, tokens) for name, tokens in text.items()]
    forwards = [replace(branches[name], dense_tokens=tokens) for name, tokens in ways]
    units = {
        f"{name} {tokens}": {name: forward} for (name, tokens), forward in zip(ways, forwards, strict=True)
    }
    steps = profile.steps
    sparse = study.calls_between(0, steps - dense_last_steps, steps)
    gram = gram_of(study.deviations(units, sparse)).numpy()
    for i, (name, tokens) in enumerate(ways):
        sensitivity = profile.layers[name].sensitivity
        if tokens:
            sensitivity["sample_text_dense"] = float(gram[i, i]) ** 0.5
        else:
            sensitivity["sample"] = float(gram[i, i]) ** 0.5
            sensitivity["velocity"] = study.velocity({name: forwards[i]}).velocity
    costs = costs_of(profile, study.workload.model, device, text)
    problem = problem_of(costs, ways, gram, steps, dense_last_steps=dense_last_steps, span=span)
    added = Chooser(study, problem, forwards)
    fastest = min(point.time for point in added.points())
    likely = pick(added.points(), speed=1 / (1 - share * (1 - fastest)))
    members = added.problem.members(likely)
    layers = {ways[i][0]: forwards[i] for i in np.flatnonzero(members).tolist()}
    counts = [span[0] + n if n else 0 for n in STEP_COUNTS]
    counts = [n for n in counts if n < min(span[1], steps - dense_last_steps)]
    measured = study.steps(layers, counts, steps, dense_last_steps)
    profile.studies["dense_first_steps"] = {str(n): list(errors) for n, errors in measured.items()}
    together = max(measured[0][0], 1e-9)
    factors = {n: (errors[0] / together) ** 2 for n, errors in measured.items()}
    alone = float(np.diag(gram)[members].sum())
    # How far effects of one direction add up: not at all where the picture can only be so wrong.
    adding = (together**2 - alone) / (likely.error**2 - alone) if likely.error**2 != alone else 0.0
    adding = min(max(adding, 0.0), 1.0)
    own = np.diag(np.diag(gram))
    problem = problem_of(costs, ways, own + adding * (gram - own), steps, factors, dense_last_steps, span)
    within = _within(study, ways, layers, np.diag(gram), together**2, sparse)
    profile.studies["interactions"] = {
        "sum_of_own": alone**0.5,
        "sum_of_vectors": likely.error,
        "measured_together": together,
        "adding": adding,
        "within": {f"{name} {tokens}": square for (name, tokens), square in zip(ways, within, strict=True)},
    }
    return Chooser(study, problem, forwards, replace(problem, gram=np.diag(within)))


def _within(
    study: Sensitivity,
    ways: Sequence[tuple[str, int]],
    layers: Mapping[str, Forward],
    alone: np.ndarray,
    whole: float,
    sparse_calls: Callable[[int], bool],
) -> list[float]:
    """The squared error that each layer of a set takes off by turning dense, (U,).

    Other ways of a member, and layers outside the set, are scaled from their own effects.
    """
    gains = {}
    for name in layers:
        rest = {other: forward for other, forward in layers.items() if other != name}
        gains[name] = max(whole - study.sample(rest, sparse_calls) ** 2, 0.0)
    of_way = dict(zip(ways, alone.tolist(), strict=True))
    taken = {name: of_way[name, getattr(forward, "dense_tokens", 0)] for name, forward in layers.items()}
    usual = sum(gains.values()) / max(sum(taken.values()), 1e-30)
    scale = {name: gains[name] / taken[name] if taken[name] > 0 else usual for name in layers}
    return [square * scale.get(name, usual) for (name, _), square in of_way.items()]


def apply_choice(profile: Profile, choice: Choice) -> None:
    """Write the decisions into a profile."""
    for name, layer in profile.layers.items():
        layer.sparse = name in choice.sparse
        effect = layer.sensitivity.get("sample")
        known = "" if effect is None else f", alone {effect:.3f} of the final sample"
        layer.reason = f"chosen by end-to-end sensitivity{known}"
        layer.branch = replace(layer.branch, dense_tokens=choice.sparse.get(name, 0))
    profile.dense_steps, profile.dense_last_steps = choice.dense_steps, choice.dense_last_steps
