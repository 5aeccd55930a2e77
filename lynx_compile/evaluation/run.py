"""The whole quality study in one function: calibrate, choose, train the rivals, and fill the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..calibration.choose import Choice, Chooser, apply_choice, chooser_for, front, pick
from ..calibration.refine import Call, distill_jointly, record, split_calls
from ..calibration.run import calibrate
from ..calibration.sensitivity import Sensitivity
from ..calibration.workload import Pipeline
from ..profile import Branch, Profile
from ..profile.fingerprint import linear_layers
from .methods import Clock, Method, branches_of, paper_recipe, sparse_weights
from .table import Features, Row, Table, ToPictures


@dataclass(frozen=True)
class Settings:
    """How much of everything. shares: of linear FLOPs × steps sparse, for the rows with layers left dense."""

    prompts: int = 512
    steps: int = 20
    rank: int = 16
    calibration_prompts: int = 64
    distill_prompts: int = 256
    validation_prompts: int = 64
    recipe_steps: int = 2000
    joint_steps: int = 1000
    joint_lr: float = 3e-4
    shares: tuple[float, ...] = (0.92, 0.85, 0.75, 0.5)
    distilled_share: float = 0.85
    batch_size: int = 256
    distill_samples: int = 32
    seed: int = 0


@dataclass
class Study:
    """One pipeline and its prompts. prompts(count, start): disjoint ranges share no prompt."""

    pipe: Any
    prompts: Callable[[int, int], list[str]]
    settings: Settings
    to_pictures: ToPictures
    features: Features | None = None
    real: Tensor | None = None
    note: Callable[[Row], None] = lambda _: None
    log: Callable[[str], None] = lambda _: None
    profile: Profile | None = None

    def run(self) -> Table:
        """Fill the table; the distilled one's profile stays in `profile`."""
        s = self.settings
        training_prompts = max(s.calibration_prompts, s.distill_prompts)
        held_out = training_prompts + s.validation_prompts
        calibration = self._workload(s.calibration_prompts, 0)
        validation = self._workload(s.validation_prompts, training_prompts)
        clock, plain_clock = Clock(), Clock()
        with clock.running():
            profile = calibrate(calibration, rank=s.rank, steps=s.steps, quiet=True)
        with plain_clock.running():
            plain = calibrate(calibration, rank=s.rank, steps=s.steps, shift=False, quiet=True)
        self.log(f"calibrated in {clock.seconds:.1f} s and {plain_clock.seconds:.1f} s")
        model = self.pipe.transformer
        names = list(profile.layers)
        shapes = {
            name: (module.out_features, module.in_features) for name, module in linear_layers(model).items()
        }
        tokens = {
            **{n: layer.tokens for n, layer in profile.layers.items()},
            **profile.studies["other_tokens"],
        }
        test = self._workload(s.prompts, held_out)
        table = Table(
            test, tokens, shapes, s.steps, self.to_pictures, self.features, self.real, note=self.note
        )
        other = self._workload(s.prompts, held_out, seed=s.seed + 100_000)
        table.add_samples("dense, another seed", Table.samples_of(other))
        ours = branches_of(profile, model)
        table.add(Method("SA-native", {name: Branch(compensation="native") for name in names}))
        table.add(Method("SA-NC", {name: Branch() for name in names}))
        without = branches_of(plain, model)
        table.add(Method("SA-NC-LoRA, closed form", without, plain_clock.seconds, s.rank))
        table.add(Method("SA-NC-LoRA, closed form + shift", ours, clock.seconds, s.rank))

        with clock.running():
            study = Sensitivity(validation, calls=5, quiet=True)
            chooser = chooser_for(study, profile, ours, "flops", s.distilled_share)
        shares = sorted(s.shares, key=lambda share: abs(share - s.distilled_share))
        choice = self._choose(table, chooser, profile, ours, clock, shares[0])
        for method in sparse_weights(calibration, names, s.rank):
            table.add(method)
        training = self._workload(s.distill_prompts, 0)
        calls = split_calls(record(training, quiet=True), s.distill_samples, s.seed)
        recipe = paper_recipe(model, calls, names, s.rank, s.recipe_steps, lr=1e-3)
        table.add(recipe)
        local = {name: (layer.error_after or 0.0) ** 2 for name, layer in plain.layers.items()}
        points = front(chooser.costs, local, s.steps, {0: 1.0}, chooser.other_time)
        for share in shares:
            chosen = pick(points, speed=speed_of(share))
            layers = {name: recipe.layers[name] for name in names if name in chosen.sparse}
            title = f"{recipe.name} + SL by local error, {share:.0%}"
            table.add(Method(title, layers, recipe.calibration_s, s.rank))
        checks = split_calls(record(validation, quiet=True), 2 * s.validation_prompts)[::3]
        self._distill(table, profile, choice, calls, checks, clock)
        for share in shares[1:]:
            self._choose(table, chooser, profile, ours, clock, share)
        return table

    def _workload(self, count: int, start: int, seed: int | None = None) -> Pipeline:
        s = self.settings
        seed = (s.seed if seed is None else seed) + start
        prompts = self.prompts(count, start)
        return Pipeline(self.pipe, prompts, steps=s.steps, batch_size=min(s.batch_size, count), seed=seed)

    def _choose(
        self,
        table: Table,
        chooser: Chooser,
        profile: Profile,
        ours: dict[str, Branch],
        clock: Clock,
        share: float,
    ) -> Choice:
        """The row of one share: layers and first steps left dense by end-to-end sensitivity."""
        choosing = Clock(clock.seconds)
        with choosing.running():
            choice = chooser.choose(speed=speed_of(share), rounds=1)
        layers = {name: branch for name, branch in ours.items() if name in choice.sparse}
        title = f"closed form + shift + SL end to end, {share:.0%}"
        table.add(Method(title, layers, choosing.seconds, self.settings.rank, choice.dense_steps))
        self.log(f"{title}: dense {sorted(set(ours) - choice.sparse)}, first {choice.dense_steps} steps")
        return choice

    def _distill(
        self,
        table: Table,
        profile: Profile,
        choice: Choice,
        calls: list[Call],
        checks: list[Call],
        clock: Clock,
    ) -> None:
        """The row of the chosen layers after joint distillation; keeps the profile."""
        s = self.settings
        apply_choice(profile, choice)
        model = self.pipe.transformer
        start = branches_of(profile, model, sorted(choice.sparse))
        training = Clock(clock.seconds)
        with training.running():
            distilled = distill_jointly(
                model, calls, checks, start, steps=s.joint_steps, lr=s.joint_lr, check_every=50, quiet=True
            )
        history = ", ".join(f"{step}: {least:.5f}" for step, _, least in distilled.history)
        self.log(f"joint distillation, held-out loss by step: {history}")
        profile.studies["joint_distillation"] = [list(entry) for entry in distilled.history]
        for name, branch in distilled.branches.items():
            profile.layers[name].branch = branch
        title = f"closed form + shift + SL end to end, {s.distilled_share:.0%} + joint distillation"
        trained = branches_of(profile, model, sorted(choice.sparse))
        table.add(Method(title, trained, training.seconds, s.rank, choice.dense_steps))
        self.profile = profile


def speed_of(share: float) -> float:
    """The speed at which `share` of the FLOPs is sparse and costs half."""
    return 1 / (1 - share / 2)
