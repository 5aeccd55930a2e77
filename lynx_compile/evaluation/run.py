"""The whole quality study: every stage's methods, measured one by one against the dense model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..calibration.choose import apply_choice
from ..profile import Profile
from ..profile.fingerprint import linear_layers
from .distilled import distilled
from .ground import Ground, Settings, branches_of
from .levers import levers
from .methods import Method, chosen, ladder, ruled, sparse_weights
from .perceptual import Scorer
from .recipe import paper_recipe
from .table import Features, Row, Table, ToPictures

Stage = Callable[[Ground], Iterator[Method]]


# name → its methods, in the order they are measured: what the others are compared with comes first.
STAGES: dict[str, Stage] = {
    "ladder": ladder,
    "rules": ruled,
    "chosen": chosen,
    "weights": sparse_weights,
    "levers": levers,
    "distilled": distilled,  # last: its branches take the place of the closed form's in the profile
    "recipe": paper_recipe,
}


class Study:
    """One pipeline and its prompts. prompts(count, start): disjoint ranges share no prompt.

    stages: names of STAGES; all by default.  note: told each row as it is measured.  scorers: of further
    metrics.  limit_s: seconds after which no further method is begun.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Callable[[int, int], list[str]],
        settings: Settings,
        to_pictures: ToPictures,
        features: Features | None = None,
        real: Tensor | None = None,
        note: Callable[[Row], None] = lambda _: None,
        log: Callable[[str], None] = lambda _: None,
        stages: Sequence[str] = tuple(STAGES),
        scorers: Mapping[str, Scorer] | None = None,
        limit_s: float = math.inf,
    ) -> None:
        unknown = [name for name in stages if name not in STAGES]
        if unknown:
            raise ValueError(f"stage {unknown[0]!r} is unknown; stages are {', '.join(STAGES)}")
        self.ground = Ground(pipe, prompts, settings, log)
        self.to_pictures, self.features, self.real = to_pictures, features, real
        self.note, self.stages, self.scorers = note, stages, scorers or {}
        self.ends = time.monotonic() + limit_s
        self.table: Table | None = None

    def run(self) -> Table:
        """Fill the table."""
        ground, s = self.ground, self.ground.settings
        test = ground.workload(s.prompts, ground.held_out)
        profile = ground.ours(ground.rank).profile
        tokens = {name: layer.tokens for name, layer in profile.layers.items()}
        shapes = {name: (m.out_features, m.in_features) for name, m in linear_layers(ground.model).items()}
        table = self.table = Table(
            test,
            {**tokens, **profile.studies["other_tokens"]},
            shapes,
            s.steps,
            self.to_pictures,
            self.features,
            self.real,
            self.scorers,
            test.prompts,
            note=self.note,
        )
        other = ground.workload(s.prompts, ground.held_out, seed=100_000)
        table.add_samples("dense, another seed", Table.samples_of(other))
        failures = []
        for name in self.stages:
            try:
                methods = STAGES[name](ground)
                while time.monotonic() < self.ends and (method := next(methods, None)) is not None:
                    table.add(method)
            except Exception as error:  # the other stages' rows are worth having all the same
                ground.log(f"stage {name!r} failed: {type(error).__name__}: {error}")
                failures.append(error)
        if time.monotonic() >= self.ends:
            ground.log("the time limit cut the study short")
        if failures:
            raise failures[0]
        return table

    def profile(self) -> Profile | None:
        """What `calibrate` makes, with the layers chosen at `main_share`; None before they were."""
        share = self.ground.settings.main_share
        if not self.ground.has_chosen(share):
            return None
        profile = self.ground.ours(self.ground.rank).profile
        apply_choice(profile, self.ground.choice(share))
        return profile


__all__ = ["STAGES", "Settings", "Study", "branches_of"]
