"""Every lever by itself and with the best: what stands in for X, what is added, what is folded into W.

All rows make the *safe set* sparse (no text stream, no attention output of dual-stream blocks), so that they
differ in nothing else. A lever is a forward in plain products; only those that won are in the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration.collect import MOST_ROWS
from ..calibration.joint import prune_rows
from ..calibration.sensitivity import SENSITIVE, Sensitivity, class_of
from ..calibration.solve import lora_branches
from ..calibration.statistics import Hooks, Moments, Readers, spread_over
from ..calibration.text_rows import joint_text_rows
from ..profile.fingerprint import linear_layers
from ..runtime import semantics
from . import pruning
from .clock import Clock
from .ground import Ground
from .methods import Method

Centre = Callable[
    [Tensor], Tensor
]  # X (B, T, K) → what is taken out of it before pruning, broadcastable to X
Restore = Callable[[Tensor], Tensor]  # z (M, K) → what stands in for it in the product, s·z̃
RANK = 16
RANKS = (RANK, 4 * RANK, 8 * RANK)  # of deflation
SAMPLE_DIRECTIONS = 16
PROMPTS = 64  # to calibrate with; whole runs, as some levers tell the steps apart
STRIDE = 8


def norm(z: Tensor) -> Tensor:
    """Top-2 of 4, scaled to the row's norm."""
    return prune_rows(z, None, "norm")[0]


def native(z: Tensor) -> Tensor:
    """Top-2 of 4."""
    return prune_rows(z, None, "native")[0]


@dataclass(frozen=True, eq=False)
class Lever:
    """y = restore(z)·Wₛᵀ + c·Wᵀ + z·Aᵀ·Bᵀ + b with c = centre(X), z = X − c.

    weight: Wₛ (N, K), W by default.  down: A, (R, K).  up: B, (N, R).
    dense_tokens: leading rows left dense, below 0 the last.
    """

    restore: Restore = norm
    centre: Centre | None = None
    weight: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    dense_tokens: int = 0

    def __call__(self, module: nn.Linear, x: Tensor) -> Tensor:
        weight = module.weight
        c = None if self.centre is None else self.centre(x)
        z = x if c is None else x - c
        kept = self.restore(z.reshape(-1, z.shape[-1])).view(z.shape)
        y = F.linear(kept, weight if self.weight is None else self.weight.to(x.dtype), module.bias)
        if c is not None:
            y = y + F.linear(c, weight)
        if self.down is not None and self.up is not None:
            y = y + F.linear(F.linear(z, self.down.to(x.dtype)), self.up.to(x.dtype))
        if self.dense_tokens:
            y = semantics.with_dense_tokens(y, x, weight, module.bias, self.dense_tokens)
        return y


@dataclass
class Inputs:
    """What is known of each distinct input X: the sums of its rows and squares, and of samples' means.

    text_rows: leading rows of text in a joint sequence; their means are kept apart.
    """

    text_rows: int
    moments: Moments
    means: list[Tensor] = field(default_factory=list)  # of each sample at each call, (B, K), image rows
    per_call: dict[int, list[Tensor]] = field(default_factory=dict)

    def mean(self) -> Tensor:
        return (self.moments.total / self.moments.rows).float()

    def directions(self, rank: int) -> Tensor:
        """(R, K): the leading principal directions of X − mean."""
        mean = self.mean().double()
        covariance = self.moments.gram.double() / self.moments.rows - torch.outer(mean, mean)
        return torch.linalg.eigh(covariance)[1].flip(-1)[:, :rank].T.float().contiguous()

    def sample_directions(self, rank: int) -> Tensor:
        """(R, K): the leading principal directions of the samples' means."""
        means = torch.cat(self.means).double()
        _, _, right = torch.linalg.svd(means - means.mean(0), full_matrices=False)
        return right[:rank].float()

    def centres(self, step: Callable[[], int]) -> dict[str, Centre]:
        """The centres in question by name. step: which call of a run it is now."""
        mean, text = self.mean(), self.text_rows
        own = self.sample_directions(SAMPLE_DIRECTIONS)
        table = {call: torch.cat(means).mean(0) for call, means in self.per_call.items()}

        def of_sample(x: Tensor, stride: int = 1) -> Tensor:
            parts = [x[:, :text], x[:, text:]] if text else [x]
            means = [part[:, ::stride].mean(1, keepdim=True) for part in parts]
            wide = zip(means, parts, strict=True)
            return torch.cat([m.expand(-1, p.shape[1], -1) for m, p in wide], 1) if text else means[0]

        def near(x: Tensor, point: Tensor, directions: Tensor) -> Tensor:
            """`point` moved to the mean along the directions."""
            mu, down = mean.to(x.dtype), directions.to(x.dtype)
            return mu + F.linear(F.linear(point - mu, down), down.T)

        return {
            "mean": lambda x: mean.to(x.dtype),
            "mean of the step": lambda x: table[step()].to(x.dtype),
            "mean of the sample": of_sample,
            f"mean of the sample, every {STRIDE}th row": lambda x: of_sample(x, STRIDE),
            f"mean of the sample, {SAMPLE_DIRECTIONS} directions": lambda x: near(x, of_sample(x), own),
            **{f"deflation r{rank}": self._deflation(rank) for rank in RANKS},
        }

    def _deflation(self, rank: int) -> Centre:
        mean, leading = self.mean(), self.directions(rank)

        def centre(x: Tensor) -> Tensor:
            mu, down = mean.to(x.dtype), leading.to(x.dtype)
            return mu + F.linear(F.linear(x - mu, down), down.T)

        return centre


class Bench:
    """The safe set, what is known of its inputs, and the moments that levers are solved from."""

    def __init__(self, ground: Ground) -> None:
        self.model = ground.model
        self.calibration = ground.workload(min(PROMPTS, ground.settings.calibration_prompts), 0)
        self.names = [name for name in ground.names if class_of(name) not in SENSITIVE]
        linears = linear_layers(self.model)
        self.linears = {name: linears[name] for name in self.names}
        study = Sensitivity(ground.validation, calls=1, quiet=True)
        self.text_rows = joint_text_rows(study, self.names)
        self.calls, self.per_run = 0, 1
        self.leader: dict[str, str] = {}
        self.inputs = self._inputs()
        self.centres = {leader: found.centres(self.step) for leader, found in self.inputs.items()}

    def step(self) -> int:
        """Which call of a run it is now."""
        return self.calls % self.per_run

    def count(self, *_: object) -> None:
        """Hook behind the model."""
        self.calls += 1

    @torch.no_grad()
    def _inputs(self) -> dict[str, Inputs]:
        found: dict[str, Inputs] = {}
        readers, call = Readers(), [0]

        def see(name: str, x: Tensor) -> None:
            if readers.see(name, x) != name:
                return
            text = self.text_rows.get(name, 0)
            one = found.setdefault(name, Inputs(text, Moments.zeros(x.shape[-1], x.device)))
            rows = spread_over(x.reshape(-1, x.shape[-1]), MOST_ROWS).float()
            one.moments.rows += len(rows)
            one.moments.total += rows.double().sum(0)
            one.moments.gram.addmm_(rows.T, rows)
            one.means.append(semantics.split_tokens(x, text)[1].float().mean(1))
            one.per_call.setdefault(call[0], []).append(x.float().mean(1))

        def end() -> None:
            readers.end_of_call()
            call[0] += 1

        with Hooks(self.model, self.linears, see, end):
            for batch in range(len(self.calibration)):
                call[0] = 0
                self.calibration.run(batch)
        self.per_run = call[0]
        self.leader = {name: leader for leader, group in readers.groups().items() for name in group}
        return found

    @torch.no_grad()
    def moments(self, centre: str | None, restore: Restore) -> dict[str, Moments]:
        """Σzᵀz, Σzᵀe and Σeᵀe of every input, e = z − restore(z)."""
        readers = Readers()
        found = {
            name: Moments.zeros(len(one.moments.gram), one.moments.gram.device)
            for name, one in self.inputs.items()
        }

        def see(name: str, x: Tensor) -> None:
            if readers.see(name, x) == name:
                c = None if centre is None else self.centres[name][centre](x)
                z = spread_over((x if c is None else x - c).reshape(-1, x.shape[-1]), MOST_ROWS)
                lost = z.float() - restore(z).float()
                wide, sums = z.float(), found[name]
                sums.rows += len(z)
                sums.total += wide.double().sum(0)
                for total, left, right in (
                    (sums.gram, wide, wide), (sums.cross, wide, lost), (sums.error, lost, lost)
                ):  # fmt: skip
                    total.addmm_(left.T, right)

        self.calls = 0
        with Hooks(self.model, self.linears, see, readers.end_of_call):
            for batch in range(len(self.calibration)):
                self.calibration.run(batch)
        return found

    def rows(self) -> Iterator[tuple[str, Mapping[str, Lever], int, int]]:
        """(title, forwards, rank, dense first steps) of every row."""
        weights = {name: module.weight.detach().float() for name, module in self.linears.items()}
        centred = {name: self.centres[self.leader[name]] for name in self.names}

        def every(make: Callable[[str], Lever]) -> dict[str, Lever]:
            return {name: make(name) for name in self.names}

        def with_lora(lever: Lever, found: Mapping[str, Moments], name: str, rank: int) -> Lever:
            fit = lora_branches(found[self.leader[name]], None, {name: weights[name]}, rank)[name]
            return replace(lever, down=fit.down(rank).to(weights[name]), up=fit.up(rank).to(weights[name]))

        yield "native", every(lambda _: Lever(native)), 0, 0
        yield "norm", every(lambda _: Lever()), 0, 0
        unscaled = self.moments(None, native)
        scaled = {n: pruning.calibrated(unscaled[self.leader[n]], weights[n]) for n in self.names}
        yield "calibrated scale", every(lambda n: Lever(native, weight=scaled[n])), 0, 0
        scores = {n: pruning.scored(pruning.column_norms(weights[n])) for n in self.names}
        yield "norm, score by weight norms", every(lambda n: Lever(scores[n])), 0, 0
        yield "second-order in groups", every(lambda n: Lever(pruning.second_order(weights[n]))), 0, 0
        energies = {leader: one.moments.gram.diagonal() for leader, one in self.inputs.items()}
        mixed = {leader: pruning.permuted(energy) for leader, energy in energies.items()}
        yield "norm, K permuted by energy", every(lambda n: Lever(mixed[self.leader[n]])), 0, 0
        plain = self.moments(None, norm)
        yield f"norm, LoRA r{RANK}", every(lambda n: with_lora(Lever(), plain, n, RANK)), RANK, 0
        yield "norm, mean", every(lambda n: Lever(centre=centred[n]["mean"])), 0, 0
        shifted = self.moments("mean", norm)
        for title, fold in pruning.FOLDS.items():
            yield (
                f"norm, mean, {title} folded into W",
                every(lambda n, fold=fold: Lever(  # type: ignore[misc]
                    centre=centred[n]["mean"], weight=fold(shifted[self.leader[n]], weights[n])
                )), 0, 0,
            )  # fmt: skip
        means = every(lambda n: Lever(centre=centred[n]["mean"]))
        for rank in (RANK, 4 * RANK):
            fitted = {n: with_lora(lever, shifted, n, rank) for n, lever in means.items()}
            yield f"norm, mean, LoRA r{rank}", fitted, rank, 0
        for centre in next(iter(centred.values())):
            if centre.startswith("mean of"):
                found = self.moments(centre, norm)
                bare = {n: Lever(centre=centred[n][centre]) for n in self.names}
                fitted = {n: with_lora(lever, found, n, RANK) for n, lever in bare.items()}
                yield f"norm, {centre}, LoRA r{RANK}", fitted, RANK, 0
        for rank in RANKS:
            deflated = every(lambda n, r=rank: Lever(centre=centred[n][f"deflation r{r}"]))  # type: ignore[misc]
            yield f"norm, deflation r{rank}", deflated, rank, 0
            yield f"norm, deflation r{rank}, first step dense", deflated, rank, 1
            if rank == 4 * RANK:
                tokens = self.text_rows
                text = {n: replace(lever, dense_tokens=tokens.get(n, 0)) for n, lever in deflated.items()}
                yield f"norm, deflation r{rank}, text rows dense", text, rank, 0
                paired = {n: replace(lever, restore=pruning.one_mask) for n, lever in deflated.items()}
                yield f"norm, deflation r{rank}, one mask for both halves of guidance", paired, rank, 0
            if rank == RANK:
                yield f"norm, deflation r{rank}, first 2 steps dense", deflated, rank, 2
                bare = {n: replace(lever, restore=native) for n, lever in deflated.items()}
                yield f"native, deflation r{rank}", bare, rank, 0
                found = self.moments(f"deflation r{rank}", norm)
                both = {n: with_lora(lever, found, n, RANK) for n, lever in deflated.items()}
                yield f"norm, deflation r{rank}, LoRA r{RANK}", both, 2 * RANK, 0


def levers(ground: Ground) -> Iterator[Method]:
    """Every lever, one row each."""
    clock, counting = Clock(), None
    try:
        with clock.running():
            bench = Bench(ground)
            counting = ground.model.register_forward_hook(bench.count)
            rows = bench.rows()
        while True:
            with clock.running():
                row = next(rows, None)
            if row is None:
                return
            title, layers, rank, dense_steps = row
            bench.calls = 0
            yield Method(f"lever: {title}", layers, clock.seconds, rank, dense_steps, shown=False)
    finally:
        if counting is not None:
            counting.remove()
