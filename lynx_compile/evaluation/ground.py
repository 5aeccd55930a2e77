"""What every method of the quality table is made from: the dense model, prompts, and what methods share.

Calibration and training prompts come first, then validation, then the held-out prompts of the table; no range
overlaps another. Everything here is made on first use and timed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.choose import Chooser, chooser_for, usual_last_steps
from ..calibration.costs import FLOPS, Costs, costs_of
from ..calibration.front import Choice
from ..calibration.refine import Call, record, split_calls
from ..calibration.run import calibrate
from ..calibration.sensitivity import Sensitivity
from ..calibration.text_rows import joint_text_rows
from ..calibration.workload import Pipeline
from ..profile import Branch, Profile
from ..profile.fingerprint import linear_layers
from .clock import Clock


@dataclass(frozen=True)
class Settings:
    """How much of everything.

    ranks: of the branches; dense layers are chosen for the last.  shares: of linear FLOPs × steps sparse, for
    the rows with layers left dense.  main_share: the one at which variants are compared with each other.
    calibration_steps: of a calibration's runs; more prompts say more than more steps of one.
    """

    prompts: int = 512
    steps: int = 20
    ranks: tuple[int, ...] = (16, 64, 128)
    calibration_prompts: int = 256
    calibration_steps: int = 5
    distill_prompts: int = 256
    validation_prompts: int = 64
    recipe_steps: int = 2000
    recipe_lr: float = 1e-3
    joint_steps: int = 1000
    joint_lr: float = 1e-4
    shares: tuple[float, ...] = (0.92, 0.85, 0.75)
    main_share: float = 0.85
    batch_size: int = 256
    distill_samples: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Closed:
    """A calibration in closed form: its profile, branches on the model's device, and seconds."""

    profile: Profile
    branches: dict[str, Branch]
    seconds: float


class Ground:
    """prompts(count, start): disjoint ranges share no prompt.  log: told what is worth a line."""

    def __init__(
        self,
        pipe: Any,
        prompts: Callable[[int, int], list[str]],
        settings: Settings,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.pipe, self.prompts, self.settings, self.log = pipe, prompts, settings, log
        self.model = pipe.transformer
        self.studies: dict[str, Any] = {}  # measured on the way, for the result file
        training = max(settings.calibration_prompts, settings.distill_prompts)
        self.held_out = training + settings.validation_prompts
        self.calibration = self.workload(settings.calibration_prompts, 0, steps=settings.calibration_steps)
        self.training = self.workload(settings.distill_prompts, 0)
        self.validation = self.workload(settings.validation_prompts, training)
        self.recording, self.choosing = Clock(), Clock()
        self._choices: dict[tuple[float, int], Choice] = {}
        self._closed: dict[str, Closed] = {}
        self.measured: list[Choice] = []  # every choice that was measured

    def workload(self, count: int, start: int, seed: int = 0, steps: int | None = None) -> Pipeline:
        """Prompts start … start + count; one seed each.  steps: None for the settings'."""
        s = self.settings
        return Pipeline(
            self.pipe,
            self.prompts(count, start),
            steps=steps or s.steps,
            batch_size=min(s.batch_size, count),
            seed=s.seed + seed + start,
        )

    @property
    def rank(self) -> int:
        """Of the branches whose layers are chosen."""
        return self.settings.ranks[-1]

    def ours(self, rank: int) -> Closed:
        """What `calibrate` makes."""
        return self._calibrated(rank=rank)

    def lora(self, rank: int, prompts: int | None = None, steps: int | None = None) -> Closed:
        """Norm compensation and a LoRA branch of each layer's own, no shift: what the paper trains."""
        return self._calibrated(prompts, steps, rank=rank, shift=False, deflate=False, shared=False)

    def _calibrated(self, prompts: int | None = None, steps: int | None = None, **options: Any) -> Closed:
        s = self.settings
        count, of_run = prompts or s.calibration_prompts, steps or s.calibration_steps
        given = ", ".join(f"{name}={value}" for name, value in options.items())
        called = f"calibrate({count} prompts × {of_run} steps, {given})"
        if not self._closed:  # what is loaded on first use is no method's time
            calibrate(self.workload(1, 0, steps=1), rank=1, deflate=False, quiet=True)
        if called not in self._closed:
            workload, clock = self.workload(count, 0, steps=of_run), Clock()
            with clock.running():
                profile = calibrate(workload, steps=s.steps, quiet=True, **options)
            self.log(f"{called}: {clock.seconds:.1f} s")
            self._closed[called] = Closed(profile, branches_of(profile, self.model), clock.seconds)
        return self._closed[called]

    def last_steps(self, share: float) -> int:
        """Dense last steps of what is chosen at this share, which has to leave room for them."""
        last, steps = usual_last_steps(self.settings.steps), self.settings.steps
        return last if share <= self._most * (steps - last) / steps else 0

    @property
    def _most(self) -> float:
        return 2 * sum(self.costs.saved.values()) / self.costs.dense_time

    @property
    def names(self) -> list[str]:
        """The layers that may be sparse."""
        return list(self.ours(self.rank).profile.layers)

    @cached_property
    def costs(self) -> Costs:
        """What each layer saves, in FLOPs."""
        return costs_of(self.ours(self.rank).profile, self.model, FLOPS)

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """Those of the settings that are within reach: some layers are never sparse."""
        most = self._most
        beyond = [share for share in self.settings.shares if share > most]
        if beyond:
            listed = ", ".join(f"{share:.0%}" for share in beyond)
            self.log(f"{listed} sparse is out of reach: all that may be sparse is {most:.1%}")
        return tuple(share for share in self.settings.shares if share <= most)

    @cached_property
    def calls(self) -> list[Call]:
        """The dense model's calls over the training prompts, cut to training batches."""
        s = self.settings
        with self.recording.running():
            return split_calls(record(self.training, quiet=True), s.distill_samples, s.seed)

    @cached_property
    def checks(self) -> list[Call]:
        """Every third call over the validation prompts."""
        return record(self.validation, quiet=True)[::3]

    @cached_property
    def chooser(self) -> Chooser:
        """End-to-end sensitivity of every layer, measured on the validation prompts."""
        with self.choosing.running():
            study = Sensitivity(self.validation, calls=5, quiet=True)
            text = joint_text_rows(study, self.names)
            ours = self.ours(self.rank)
            share = self.settings.main_share
            made = chooser_for(study, ours.profile, ours.branches, FLOPS, share, text, self.last_steps(share))
        self.log(f"sensitivity of {len(self.names)} layers: {self.choosing.seconds:.1f} s")
        self.studies["sensitivity"] = sensitivity_study(study, ours.profile, ours.branches)
        self.studies["rungs"] = {"classes": rungs_study(study, self.rungs())}
        return made

    def rungs(self) -> dict[str, Mapping[str, Branch]]:
        """Each way to make up for pruning, the least first: rung → the branches of all layers."""
        least = self.settings.ranks[0]
        plain = {c: dict.fromkeys(self.names, Branch(compensation=c)) for c in ("native", "norm")}
        found: dict[str, Mapping[str, Branch]] = {**plain}
        found[f"norm, LoRA r{least}"] = self.lora(least).branches
        for rank in dict.fromkeys((least, self.rank)):
            found[f"shift, deflation r{rank}"] = self.ours(rank).branches
        return found

    def take_choices(self, result: Mapping[str, Any]) -> None:
        """Take over what an earlier result file chose, instead of measuring it.

        Raises ValueError when the file holds no choice of layers of this model.
        """
        text = joint_text_rows(Sensitivity(self.validation, calls=1, quiet=True), self.names)
        for method, details in result.get("details", {}).items():
            share = _share_in(method)
            if share is None or "dense_layers" not in details:
                continue
            unknown = [name for name in details["dense_layers"] if name not in self.names]
            if unknown:
                raise ValueError(f"{unknown[0]!r} of {method!r} is no layer that may be sparse in this model")
            apart = set(details["text_rows_dense"])
            sparse = [name for name in self.names if name not in details["dense_layers"]]
            ways = {name: text[name] if name in apart else 0 for name in sparse}
            first, last = details.get("dense_steps", 0), details.get("dense_last_steps", 0)
            choice = Choice(ways, first, 0.0, 0.0, dense_last_steps=last)
            self._choices.setdefault((share, self.last_steps(share)), choice)
        if not self._choices:
            raise ValueError("the result file holds no choice of layers by end-to-end sensitivity")

    def has_chosen(self, share: float) -> bool:
        """Whether `choice(share)` is known without measuring."""
        return (share, self.last_steps(share)) in self._choices

    def choice(self, share: float, dense_last_steps: int | None = None) -> Choice:
        """What to leave dense so that `share` of FLOPs × steps is sparse, by end-to-end sensitivity.

        dense_last_steps: `last_steps(share)` by default.
        """
        key = share, self.last_steps(share) if dense_last_steps is None else dense_last_steps
        if key not in self._choices:
            chooser = self.chooser.ending(key[1])
            with self.choosing.running():
                self._choices[key] = chooser.choose(
                    speed=speed_of(share), rounds=1, note=self.measured.append
                )
        return self._choices[key]


def sensitivity_study(study: Sensitivity, profile: Profile, branches: Mapping[str, Branch]) -> dict[str, Any]:
    """What each layer, class and block does to the sample, beside the layers' own errors, as JSON values.

    spearman: rank correlation over the layers of the effect on the sample with the layer's own output error,
    and with the velocity's error.
    """
    layers = {}
    for name, layer in profile.layers.items():
        layers[name] = {"output": layer.error_after or 0.0, **layer.sensitivity}
    units = {}
    for by in ("class", "block"):
        effects = study.measure(branches, by)
        units[by] = {unit: {"velocity": e.velocity, "sample": e.sample} for unit, e in effects.items()}
    columns = {
        key: torch.tensor([row[key] for row in layers.values()]) for key in ("output", "velocity", "sample")
    }
    ranks = {key: column.argsort().argsort().double() for key, column in columns.items()}
    spearman = {
        key: float(torch.corrcoef(torch.stack([ranks[key], ranks["sample"]]))[0, 1])
        for key in ("output", "velocity")
    }
    return {
        "layers": layers,
        **units,
        "spearman": spearman,
        "dense_first_steps": profile.studies["dense_first_steps"],
        "interactions": profile.studies["interactions"],
    }


def rungs_study(
    study: Sensitivity, rungs: Mapping[str, Mapping[str, Branch]]
) -> dict[str, dict[str, dict[str, float | None]]]:
    """class → rung → what the class alone sparse does with this compensation, as JSON values."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for rung, branches in rungs.items():
        for unit, effect in study.measure(branches, "class").items():
            found.setdefault(unit, {})[rung] = {"velocity": effect.velocity, "sample": effect.sample}
    return found


def _share_in(method: str) -> float | None:
    """0.85 for "… + SL end to end, 85%"; None for other methods."""
    found = re.search(r"SL end to end, (\d+)%$", method)
    return int(found[1]) / 100 if found else None


def branches_of(profile: Profile, model: nn.Module) -> dict[str, Branch]:
    """A profile's branches, on the model's device in its dtype."""
    return placed({name: layer.branch for name, layer in profile.layers.items()}, model)


def placed(branches: Mapping[str, Branch], model: nn.Module) -> dict[str, Branch]:
    """Branches on the model's device in its dtype; what layers have in common stays one tensor."""
    linears = linear_layers(model)
    copies: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def copy(given: Tensor | None, weight: Tensor) -> Tensor | None:
        key = id(given), weight.device, weight.dtype
        if given is not None and key not in copies:
            copies[key] = given.to(weight.device, weight.dtype)
        return copies.get(key)

    placed = {}
    for name, branch in branches.items():
        down, up, shift = (copy(t, linears[name].weight) for t in (branch.down, branch.up, branch.shift))
        placed[name] = replace(branch, down=down, up=up, shift=shift)
    return placed


def speed_of(share: float) -> float:
    """The speed at which `share` of the FLOPs is sparse and costs half."""
    return 1 / (1 - share / 2)
