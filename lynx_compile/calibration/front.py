"""The Pareto front of sparse layers: least error of the final sample for the time they save.

What a layer does to the final sample is a vector, and to first order the vectors of several layers add up. So
a set's squared error is the sum over their Gram matrix: each one's own squared error and how far any two pull
the same way. Under a least saving that is a quadratic knapsack. It is solved from two starts, an exact
knapsack over the layers' own errors alone and greedy descent from everything sparse, each improved by
exchanges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BUCKETS = 2000  # of time saved; finer than any cost model is true
LEVELS = 100  # of time saved, each with its own best set
EXCHANGES = 200  # at most, for each start


@dataclass(frozen=True)
class Way:
    """One way to run a layer sparse. tokens: leading ones of each sample that stay dense.  saved: time."""

    layer: str
    tokens: int
    saved: float


@dataclass(frozen=True)
class Choice:
    """One point of the front: sparse layers, dense steps at both ends, and what is expected of them.

    sparse: layer → leading tokens of each sample that stay dense in it, 0 for none.  time: of all linear
    layers over a run, relative to all dense.  error: expected relative error of the final sample.
    measured: the same, measured; None before.  dense_last_steps: of the run, dense as the first ones are.
    """

    sparse: Mapping[str, int]
    dense_steps: int
    time: float
    error: float
    measured: float | None = None
    dense_last_steps: int = 0

    @property
    def speed(self) -> float:
        return 1 / self.time


@dataclass(frozen=True)
class Problem:
    """ways, gram (U, U): inner products of what each does to the final sample, over the sample's energy.

    dense_time: of all linear layers.  step_factors: n → what is left of the squared error when the first n of
    `steps` steps run dense (0 → 1).  dense_last_steps: of every choice.  span: first and end of the steps in
    which the model runs, None for all.
    """

    ways: Sequence[Way]
    gram: np.ndarray
    dense_time: float
    steps: int
    step_factors: Mapping[int, float]
    dense_last_steps: int = 0
    span: tuple[int, int] | None = None

    def choice(self, members: np.ndarray, dense_steps: int) -> Choice:
        """members: (U,) bool, one way a layer at most."""
        chosen = [self.ways[i] for i in np.flatnonzero(members).tolist()]
        share = sparse_share(self.span or (0, self.steps), dense_steps, self.steps - self.dense_last_steps)
        saved = sum(way.saved for way in chosen) * share
        square = max(float(members @ self.gram @ members), 0.0) * self.step_factors[dense_steps]
        sparse = {way.layer: way.tokens for way in sorted(chosen, key=lambda way: way.layer)}
        time = 1 - saved / self.dense_time
        if not sparse:
            return Choice(sparse, 0, time, square**0.5)
        return Choice(sparse, dense_steps, time, square**0.5, dense_last_steps=self.dense_last_steps)

    def members(self, choice: Choice) -> np.ndarray:
        return np.array([choice.sparse.get(way.layer) == way.tokens for way in self.ways], dtype=bool)


def sparse_share(span: tuple[int, int], first: int, end: int) -> float:
    """Share of a model's steps, span[0] … span[1] − 1, that lie in first … end − 1."""
    return max(min(span[1], end) - max(span[0], first), 0) / (span[1] - span[0])


def points(problem: Problem) -> list[Choice]:
    """The front, from all dense to the fastest: no point is both slower and worse than another."""
    found = [problem.choice(np.zeros(len(problem.ways), dtype=bool), 0)]
    for members in best_sets(problem):
        found += [problem.choice(members, n) for n in problem.step_factors]
    return undominated(found)


def undominated(choices: Sequence[Choice]) -> list[Choice]:
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.time, c.error)):
        if not kept or choice.error < kept[-1].error:
            kept.append(choice)
    return kept[::-1]


def pick(choices: Sequence[Choice], *, max_error: float | None = None, speed: float | None = None) -> Choice:
    """Least time within `max_error`, or least error at `speed` (of the linear layers, over dense).

    Raises ValueError unless exactly one is given, or when no point of the front is fast enough.
    """
    if (max_error is None) == (speed is None):
        raise ValueError("give either max_error or speed")
    if max_error is not None:
        return min((c for c in choices if c.error <= max_error), key=lambda c: c.time)
    assert speed is not None
    fast = [c for c in choices if c.speed >= speed * (1 - 1e-9)]
    if not fast:
        best = max(c.speed for c in choices)
        raise ValueError(f"no choice reaches a speed of {speed:.3f}; all that may be sparse gives {best:.3f}")
    return min(fast, key=lambda c: c.error)


def best_sets(problem: Problem) -> list[np.ndarray]:
    """For each level of time saved the best set found that saves it, as (U,) bool."""
    saved = np.array([way.saved for way in problem.ways])
    if not (saved > 0).any():
        return []
    layers = _layers(problem.ways)
    most = sum(max(saved[group].max(), 0.0) for group in layers)
    alone = _knapsack(saved, np.diag(problem.gram), layers)
    greedy = _greedy(problem.gram, saved, layers)
    sets = []

    def square(members: np.ndarray) -> float:
        return float(members @ problem.gram @ members)

    for level in np.linspace(0, most, LEVELS + 1)[1:] * (1 - 1e-9):
        starts = (min(_fast(path, saved, level), key=square) for path in (alone, greedy))
        improved = [_exchange(problem.gram, saved, layers, start, level) for start in starts]
        sets.append(min(improved, key=square))
    return sets


def neighbours(problem: Problem, choice: Choice, count: int) -> list[Choice]:
    """The `count` sets of least expected error one or two layers away that are no slower."""
    members = problem.members(choice)
    saved = np.array([way.saved for way in problem.ways])
    least = float(saved[members].sum()) * (1 - 1e-9)
    near = _exchanges(problem.gram, saved, _layers(problem.ways), members, least, count)
    return [problem.choice(moved, choice.dense_steps) for moved, _ in near]


def _fast(path: list[np.ndarray], saved: np.ndarray, level: float) -> list[np.ndarray]:
    """The sets of a path that save at least `level`; its fastest where rounding leaves none."""
    return [s for s in path if saved[s].sum() >= level] or [max(path, key=lambda s: saved[s].sum())]


def _layers(ways: Sequence[Way]) -> list[np.ndarray]:
    """The ways of each layer."""
    groups: dict[str, list[int]] = {}
    for i, way in enumerate(ways):
        groups.setdefault(way.layer, []).append(i)
    return [np.array(group) for group in groups.values()]


def _knapsack(saved: np.ndarray, squares: np.ndarray, layers: list[np.ndarray]) -> list[np.ndarray]:
    """Sets of least Σ squares for each bucket of time saved, the least first; exact on the buckets."""
    groups = [[i for i in group if saved[i] > 0] for group in layers]
    groups = [group for group in groups if group]
    total = sum(max(saved[i] for i in group) for group in groups)
    # Rounded down, so that no set saves less than its bucket says.
    weights = [[int(saved[i] / total * BUCKETS) for i in group] for group in groups]
    least = np.full(BUCKETS + 1, np.inf)
    least[0] = 0.0
    taken = np.full((len(groups), BUCKETS + 1), -1, dtype=np.int8)
    for row, group in enumerate(groups):
        best = least.copy()
        for column, i in enumerate(group):
            weight, square = weights[row][column], max(float(squares[i]), 0.0)
            candidate = np.full_like(least, np.inf)
            candidate[weight:] = least[: BUCKETS + 1 - weight] + square
            # A way that does no harm is taken for nothing, also where its saving rounds to nothing.
            better = (candidate < best) | ((candidate == best) & (square == 0) & np.isfinite(best))
            taken[row][better] = column
            best = np.where(better, candidate, best)
        least = best
    sets = []
    for bucket in np.flatnonzero(np.isfinite(least)):
        members, at = np.zeros(len(saved), dtype=bool), int(bucket)
        for row in range(len(groups) - 1, -1, -1):
            if (column := int(taken[row, at])) >= 0:
                members[groups[row][column]] = True
                at -= weights[row][column]
        sets.append(members)
    return sets


def _greedy(gram: np.ndarray, saved: np.ndarray, layers: list[np.ndarray]) -> list[np.ndarray]:
    """From everything at its fastest, always the change that takes off most error for the time it gives up.

    Returns the sets on the way, the least saving first.
    """
    members = np.zeros(len(saved), dtype=bool)
    for group in layers:
        fastest = group[np.argmax(saved[group])]
        members[fastest] = saved[fastest] > 0
    path = [members]
    while members.any():
        delta, _ = _changes(layers, members)
        lost = -(delta @ saved)
        gained = -_own(gram, delta, members)
        ratio = np.where(lost > 0, gained / np.where(lost > 0, lost, 1), -np.inf)
        members = _moved(members, delta[np.argmax(ratio)])
        path.append(members)
    return path[::-1]


def _exchange(
    gram: np.ndarray, saved: np.ndarray, layers: list[np.ndarray], members: np.ndarray, least_saved: float
) -> np.ndarray:
    """Descent by changes of one layer and of two, whatever takes off most and keeps the saving."""
    for _ in range(EXCHANGES):
        better = _exchanges(gram, saved, layers, members, least_saved, 1)
        if not better or better[0][1] >= -1e-15:
            break
        members = better[0][0]
    return members


def _exchanges(
    gram: np.ndarray,
    saved: np.ndarray,
    layers: list[np.ndarray],
    members: np.ndarray,
    least_saved: float,
    count: int,
) -> list[tuple[np.ndarray, float]]:
    """The `count` best sets one or two layers away that save enough, and the change of the squared error."""
    delta, layer_of = _changes(layers, members)
    if not len(delta):
        return []
    own = _own(gram, delta, members)
    gained, room = delta @ saved, saved[members].sum() - least_saved
    pairs = own[:, None] + own[None, :] + 2 * (delta @ gram @ delta.T)
    np.fill_diagonal(pairs, own)
    gains = gained[:, None] + gained[None, :]
    np.fill_diagonal(gains, gained)
    once = (layer_of[:, None] < layer_of[None, :]) | np.eye(len(delta), dtype=bool)
    pairs = np.where(once & (room + gains >= 0), pairs, np.inf)
    count = min(count, pairs.size)
    nearest = np.argpartition(pairs, count - 1, axis=None)[:count]
    found = []
    for flat in nearest[np.argsort(pairs.flat[nearest])]:
        i, j = divmod(int(flat), len(delta))
        if np.isfinite(pairs[i, j]):
            both = delta[i] if i == j else delta[i] + delta[j]
            found.append((_moved(members, both), float(pairs[i, j])))
    return found


def _own(gram: np.ndarray, delta: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Change of the squared error by each row of delta."""
    product = delta @ gram
    return 2 * (product @ members) + (product * delta).sum(1)


def _changes(layers: list[np.ndarray], members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every change of one layer to another way or to dense: rows of −1, 0, 1, and the layer of each."""
    rows, layer_of = [], []
    for number, group in enumerate(layers):
        now = group[members[group]]
        for way in [*group[~members[group]], *([None] if len(now) else [])]:
            row = np.zeros(len(members))
            row[now] = -1
            if way is not None:
                row[way] = 1
            rows.append(row)
            layer_of.append(number)
    return np.array(rows).reshape(len(rows), len(members)), np.array(layer_of)


def _moved(members: np.ndarray, delta: np.ndarray) -> np.ndarray:
    return (members + delta) > 0.5
