"""What one layer, one class of layers, one block or some steps do to the velocity and to the final sample.

Everything is a perturbation run: only the unit under study is sparse, all else dense. The velocity is the
transformer's output at the dense model's own inputs, recorded once and replayed; the final sample is the
whole run's. Errors are ‖perturbed − dense‖ / ‖dense‖ over all held-out batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from ..profile.steps import StepSwitch
from .emulation import Forward, emulate
from .workload import Workload, first_tensor

# What the last parts of a linear layer's name say about its place, in diffusers' transformers; first match
# wins.
_CLASSES = (
    ("text", ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context", "txt_mlp")),
    ("q", ("to_q",)),
    ("k", ("to_k",)),
    ("v", ("to_v",)),
    ("out", ("to_out",)),
    ("up", ("proj_mlp", "net.0.proj", "w1", "w3", "gate_proj", "up_proj")),
    ("down", ("net.2", "proj_out", "w2", "down_proj")),
)


SENSITIVE = ("text", "out")  # classes that stay dense where nothing was measured


def gram_of(deviations: Tensor, chunk: int = 1 << 20) -> Tensor:
    """Inner products of the rows of (U, D), summed in fp32 by stretches, (U, U) fp64 on the CPU."""
    parts = [part.float() @ part.float().T for part in deviations.split(chunk, dim=1)]
    return torch.stack(parts).double().sum(0).cpu()


@dataclass(frozen=True)
class Effect:
    """Relative errors of the velocity and of the final sample, and of the velocity at each call of a run."""

    velocity: float
    sample: float | None = None
    per_call: tuple[float, ...] = ()


def class_of(name: str) -> str:
    """q, k, v, out, up or down; "text" for a dual-stream block's text stream; else the name's last part."""
    for label, parts in _CLASSES:
        if any(f".{part}." in f".{name}." for part in parts):
            return label
    return name.rsplit(".", 1)[-1]


def block_of(name: str) -> str:
    """The numbered block a layer sits in, as "transformer_blocks.3"."""
    parts = name.split(".")
    last = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return name if last is None else ".".join(parts[: last + 1])


def units(names: Iterable[str], by: str) -> dict[str, list[str]]:
    """Layers gathered by "layer", "class" or "block"; raises ValueError for anything else."""
    keys: dict[str, Callable[[str], str]] = {"layer": str, "class": class_of, "block": block_of}
    if by not in keys:
        raise ValueError(f"units by {by!r} are unknown; one of {', '.join(keys)}")
    gathered: dict[str, list[str]] = {}
    for name in names:
        gathered.setdefault(keys[by](name), []).append(name)
    return gathered


@dataclass
class Sensitivity:
    """Perturbation runs over a workload's batches. Dense references are made once, on first use.

    Everything runs eagerly, also where the model was compiled: the dense layers are what counts.

    calls: how many of a run's model calls are recorded for the velocity, spread evenly; None for all of them.
    """

    workload: Workload
    calls: int | None = None
    quiet: bool = False
    _samples: list[Tensor] = field(default_factory=list)
    _recorded: list[list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]] = field(default_factory=list)
    _steps: list[tuple[int, int]] = field(default_factory=list)  # of each call, and of how many
    _seconds: float = 0.0
    calls_per_run: int = 0

    @torch.compiler.set_stance("force_eager")
    def samples(self) -> list[Tensor]:
        """The dense model's final samples, batch by batch; records the calls on the way."""
        if self._samples:
            return self._samples
        recorded: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            recorded.append((args, kwargs, first_tensor(out)))
            if self._in_part:
                self._steps.append(self.workload.step())  # type: ignore[attr-defined]

        handle = self.workload.model.register_forward_hook(hook, with_kwargs=True)
        try:
            for batch in range(len(self.workload)):
                self._steps.clear()  # all batches make the same calls
                start = time.monotonic()
                self._samples.append(_synchronised(self.workload.run(batch)))
                self._seconds += time.monotonic() - start
                self._recorded.append([recorded[i] for i in _spread(len(recorded), self.calls)])
                self.calls_per_run = len(recorded)
                recorded.clear()
        finally:
            handle.remove()
        return self._samples

    def first_calls(self) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Positional and keyword arguments of the model's first call, batch by batch."""
        self.samples()
        return [calls[0][:2] for calls in self._recorded]

    @torch.compiler.set_stance("force_eager")
    @torch.no_grad()
    def velocity(self, layers: Mapping[str, Forward]) -> Effect:
        """The effect on the recorded calls alone."""
        self.samples()
        model = self.workload.model
        squares: list[list[float]] = []
        energies: list[list[float]] = []
        with emulate(model, layers):
            for calls in self._recorded:
                outs = [
                    (first_tensor(model(*args, **kwargs)).float(), v.float()) for args, kwargs, v in calls
                ]
                squares.append([float((out - v).square().sum()) for out, v in outs])
                energies.append([float(v.square().sum()) for _, v in outs])
        sums = [
            (sum(s), sum(e))
            for s, e in zip(zip(*squares, strict=True), zip(*energies, strict=True), strict=True)
        ]
        per_call = tuple((s / e) ** 0.5 if e else 0.0 for s, e in sums)
        energy = sum(e for _, e in sums)
        return Effect((sum(s for s, _ in sums) / energy) ** 0.5 if energy else 0.0, None, per_call)

    def sample(
        self, layers: Mapping[str, Forward], sparse_steps: Callable[[int], bool] | None = None
    ) -> float:
        """The effect on the final sample; sparse_steps(call) says which calls of a run are perturbed."""
        return float(self.deviation(layers, sparse_steps).float().norm())

    @torch.compiler.set_stance("force_eager")
    def deviation(
        self, layers: Mapping[str, Forward], sparse_steps: Callable[[int], bool] | None = None
    ) -> Tensor:
        """What becomes of the final samples of all batches, (D,) bf16, relative to their norm."""
        reference = self.samples()
        model = self.workload.model
        switch, call = StepSwitch(), [0]

        def before(_module: nn.Module, _args: Any) -> None:
            switch.dense = sparse_steps is not None and not sparse_steps(call[0])
            call[0] += 1

        handle = model.register_forward_pre_hook(before)
        parts = []
        try:
            with emulate(model, layers, switch):
                for batch, dense in enumerate(reference):
                    call[0] = 0
                    parts.append((self.workload.run(batch).float() - dense.float()).flatten())
        finally:
            handle.remove()
        energy = sum(float(dense.float().square().sum()) for dense in reference)
        return (torch.cat(parts) / max(energy, 1e-30) ** 0.5).bfloat16()

    def calls_between(self, first: int, end: int, steps: int) -> Callable[[int], bool]:
        """Whether a call belongs to steps first … end − 1 of `steps`; each step makes as many calls.

        Of one of several transformers the scheduler says to which step a call belongs.
        """
        self.samples()
        if self._in_part:
            return lambda call: first <= self._steps[call][0] * steps // self._steps[call][1] < end
        return lambda call: first <= call * steps // self.calls_per_run < end

    def span(self, steps: int) -> tuple[int, int]:
        """First and end of those of `steps` steps in which the model is called: Wan 2.2 has two, in turn."""
        if not self._in_part:
            return 0, steps
        self.samples()
        taken = [step * steps // total for step, total in self._steps]
        return min(taken), max(taken) + 1

    @property
    def _in_part(self) -> bool:
        return getattr(self.workload, "component", None) is not None

    def deviations(
        self,
        units: Mapping[str, Mapping[str, Forward]],
        sparse_steps: Callable[[int], bool] | None = None,
    ) -> Tensor:
        """Each unit alone sparse: (U, D) bf16, one row a unit."""
        wanted = track(units.values(), "effects on the sample", disable=self.quiet, transient=True)
        return torch.stack([self.deviation(layers, sparse_steps) for layers in wanted])

    def measure(self, layers: Mapping[str, Forward], by: str, *, sample: bool = True) -> dict[str, Effect]:
        """Each unit alone sparse: unit → effect."""
        effects = {}
        for unit, names in track(
            units(layers, by).items(), f"sensitivity by {by}", disable=self.quiet, transient=True
        ):
            chosen = {name: layers[name] for name in names}
            velocity = self.velocity(chosen)
            effects[unit] = Effect(
                velocity.velocity, self.sample(chosen) if sample else None, velocity.per_call
            )
        return effects

    def steps(
        self, layers: Mapping[str, Forward], counts: Sequence[int], steps: int, dense_last_steps: int = 0
    ) -> dict[int, tuple[float, float]]:
        """n → the final sample's error with the first n of `steps` dense, and with only these sparse.

        dense_last_steps: dense besides.
        """
        end = steps - dense_last_steps
        return {
            n: (
                self.sample(layers, self.calls_between(n, end, steps)),
                self.sample(layers, self.calls_between(0, min(n, end), steps)),
            )
            for n in counts
        }

    @torch.compiler.set_stance("force_eager")
    def estimate_s(self, layers: Mapping[str, Forward], by: str, *, sample: bool = True) -> float:
        """Seconds `measure` will take, from one dense run and one perturbed call, both measured now."""
        args, kwargs = self.first_calls()[0]
        start = time.monotonic()
        with torch.no_grad(), emulate(self.workload.model, layers):
            _synchronised(first_tensor(self.workload.model(*args, **kwargs)))
        perturbed = time.monotonic() - start
        start = time.monotonic()
        with torch.no_grad():
            _synchronised(first_tensor(self.workload.model(*args, **kwargs)))
        dense = time.monotonic() - start
        count = len(units(layers, by))
        replay = sum(len(calls) for calls in self._recorded) * dense
        extra = (
            max(perturbed - dense, 0.0) / max(dense, 1e-9) / count
        )  # of one unit sparse, relative to a dense call
        return count * (1 + extra) * (replay + (self._seconds if sample else 0.0))


def _spread(total: int, wanted: int | None) -> list[int]:
    if wanted is None or wanted >= total:
        return list(range(total))
    return sorted({round(i * (total - 1) / max(wanted - 1, 1)) for i in range(wanted)})


def _synchronised(value: Tensor) -> Tensor:
    if value.is_cuda:
        torch.cuda.synchronize(value.device)
    return value
