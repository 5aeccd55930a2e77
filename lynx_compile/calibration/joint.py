"""Joint distillation: all branches trained together on the velocity of the whole transformer.

    loss = mean over samples of w · ‖v − v̂‖² / ‖v‖²

v is the dense model's velocity, under classifier-free guidance the guided one; w says what an error at that
step does to the final sample (`amplification`). Layers correct each other's errors, which no fit of single
layers can. Training starts from the closed form and keeps the branches that a judge of held-out prompts likes
best. On a GPU one step is a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..profile.branch import Branch
from ..runtime import semantics
from .emulation import emulate
from .factors import Factors
from .refine import Call
from .workload import first_tensor

_VELOCITY, _WEIGHT = "", "weight of a sample"  # columns of a pool beside the arguments
MAX_NORM = 1.0  # of the gradient of all factors together
WARM_UP = 50  # steps in which the learning rate rises
# cuDNN's attention backward gives NaN or writes out of bounds for short sequences (torch 2.11, H200).
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


Judge = Callable[[Mapping[str, Branch]], float]


@dataclass(frozen=True)
class Distilled:
    """Result of `distill_jointly`: the best branches, and (step, training loss, judged error) as it went."""

    branches: dict[str, Branch]
    history: list[tuple[int, float, float]]


def distill_jointly(
    model: nn.Module,
    calls: Sequence[Call],
    judge: Judge,
    branches: Mapping[str, Branch],
    *,
    steps: int = 2000,
    batch: int = 32,
    lr: float = 1e-3,
    guidance: float | None = None,
    weights: Sequence[float] | None = None,
    check_every: int = 200,
    patience: int = 5,
    seed: int = 0,
    quiet: bool = False,
) -> Distilled:
    """Train A, B and shift of all branches, and keep those with the least error on held-out prompts.

    calls: of the dense model, all of one resolution (`refine.record`); a step draws `batch` samples.
    judge: the error that decides, on prompts that are not trained on (`velocity_judge`, or the error of the
    final sample).  guidance: the scale of classifier-free guidance where a call's batch holds the negative
    half first, then the positive; None for models that are called once a step.  weights: w of each call of a
    run; the calls then are whole runs.  Adam, a cosine to zero. Stops after `patience` checks without
    improvement. The start is a candidate: the judge never finds the result worse than what was given.

    Raises ValueError without calls, or for calls of different shapes.
    """
    pool = Pool(calls, guidance, weights)
    factors = Factors(branches, pool.device)
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        best = factors.branches()
        least, waited = judge(best), 0
        history = [(0, math.nan, least)]
        trainer = _Trainer(model, pool, factors, batch, lr, steps, seed)
        for step in track(range(1, steps + 1), "distilling jointly", disable=quiet, transient=True):
            trainer.step(step)
            if step % check_every == 0 or step == steps:
                candidate = factors.branches()
                now = judge(candidate)
                history.append((step, trainer.mean_loss(), now))
                best, least, waited = (candidate, now, 0) if now < least else (best, least, waited + 1)
                if waited >= patience or not math.isfinite(now):
                    break
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return Distilled(best, history)


class Pool:
    """The samples of many calls, to draw batches from. A sample is a pair of rows under guidance.

    weights: of the calls of a run, in turn; 1 by default.
    """

    def __init__(
        self, calls: Sequence[Call], guidance: float | None = None, weights: Sequence[float] | None = None
    ) -> None:
        if not calls:
            raise ValueError("there are no recorded calls to train on")
        if weights is not None and (not weights or len(calls) % len(weights)):
            raise ValueError(
                f"{len(calls)} calls are no whole number of runs of {len(weights)} weighted calls; "
                "record whole runs"
            )
        self.guidance = guidance
        args, kwargs, _ = calls[0]
        self._args, self._kwargs = args, kwargs
        columns: dict[int | str, list[Tensor]] = {}
        for i, (call_args, call_kwargs, velocity) in enumerate(calls):
            rows = velocity.shape[0]
            named: list[tuple[int | str, Any]] = [*enumerate(call_args), *call_kwargs.items()]
            for key, value in named:
                if per_sample(value, rows, str(key)):
                    columns.setdefault(key, []).append(self._paired(value))
            columns.setdefault(_VELOCITY, []).append(self._paired(velocity))
            weight = 1.0 if weights is None else weights[i % len(weights)]
            weighed = columns[_VELOCITY][-1].new_full(
                columns[_VELOCITY][-1].shape[:1], weight, dtype=torch.float32
            )
            columns.setdefault(_WEIGHT, []).append(weighed)
        self._columns = {key: _stacked(str(key), values) for key, values in columns.items()}
        velocities = self._columns[_VELOCITY]
        self.count, self.device = len(velocities), velocities.device
        if any(len(column) != self.count for column in self._columns.values()):
            raise ValueError(
                "some calls lack an argument that others have; record calls of one pipeline only"
            )

    def _paired(self, value: Tensor) -> Tensor:
        if self.guidance is None:
            return value.detach()
        if value.shape[0] % 2:
            raise ValueError(f"a guided call's batch is even, got {value.shape[0]} rows; give guidance=None")
        return torch.stack(value.detach().chunk(2), 1)

    def static(self, batch: int) -> dict[int | str, Tensor]:
        """Room for `batch` samples, to be filled by `draw`."""
        return {key: torch.empty_like(column[:1]).repeat(batch, *[1] * (column.dim() - 1))
                for key, column in self._columns.items()}  # fmt: skip

    def draw(self, index: Tensor, into: Mapping[int | str, Tensor]) -> None:
        for key, column in self._columns.items():
            torch.index_select(column, 0, index, out=into[key])

    def parts(self, size: int) -> Iterator[tuple[dict[int | str, Tensor], int]]:
        """All samples once, in order: (as `draw` gives them, how many)."""
        for start in range(0, self.count, size):
            part = {key: column[start : start + size] for key, column in self._columns.items()}
            yield part, len(part[_VELOCITY])

    def loss(self, model: nn.Module, drawn: Mapping[int | str, Tensor]) -> Tensor:
        """Mean over the drawn samples of the weighted relative squared error of the (guided) velocity."""
        rows = {key: self._rows(value) for key, value in drawn.items() if key != _WEIGHT}
        args = tuple(rows.get(i, value) for i, value in enumerate(self._args))
        kwargs = {name: rows.get(name, value) for name, value in self._kwargs.items()}
        wanted = rows[_VELOCITY].float()
        apart = first_tensor(model(*args, **kwargs)).float() - wanted
        if self.guidance is not None:
            apart, wanted = (_guided(v, self.guidance) for v in (apart, wanted))
        energy = wanted.square().flatten(1).sum(1).clamp_min(1e-12)
        return (drawn[_WEIGHT] * apart.square().flatten(1).sum(1) / energy).mean()

    def _rows(self, value: Tensor) -> Tensor:
        """Rows as the model takes them: all negative halves, then all positive ones."""
        return value if self.guidance is None else value.transpose(0, 1).reshape(-1, *value.shape[2:])


def per_sample(value: Any, rows: int, name: str) -> bool:
    """Whether an argument holds one row a sample; flags and the ids of positions are shared."""
    has_rows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
    return has_rows and not name.endswith("_ids")


def _stacked(name: str, values: list[Tensor]) -> Tensor:
    shapes = {tuple(value.shape[1:]) for value in values}
    if len(shapes) > 1:
        raise ValueError(
            f"recorded calls differ in the shape of {name or 'velocity'!r} ({sorted(shapes)}); "
            "record prompts of one resolution only"
        )
    return torch.cat(values)


def _guided(velocity: Tensor, scale: float) -> Tensor:
    negative, positive = velocity.chunk(2)
    return negative + scale * (positive - negative)


@dataclass(frozen=True, eq=False)
class Trained:
    """A branch's forward for training: products in the model's dtype, the row scale a constant."""

    branch: Branch

    def __call__(self, module: nn.Linear, x: Tensor) -> Tensor:
        b, weight = self.branch, module.weight
        text, sparse = None, x
        if b.dense_tokens and x.dim() == 3:
            text, sparse = semantics.split_tokens(x, b.dense_tokens)
        z = sparse
        bias: Tensor | None = module.bias
        if b.shift is not None:
            z = z - b.shift.to(x.dtype)
            folded = weight.float() @ b.shift
            bias = (folded if bias is None else folded + bias.float()).to(x.dtype)
        y: Tensor | float = 0.0
        if b.down is not None and b.up is not None:
            down = b.down.to(x.dtype)
            t = F.linear(z, down)
            y = F.linear(t, b.carrying(weight).to(x.dtype))
            if b.deflate:
                z = z - t @ down
        rows = z.reshape(-1, z.shape[-1])
        kept = _Prune.apply(rows, b.score, b.compensation).view(z.shape)
        y = y + F.linear(kept, weight, bias)
        if text is not None:
            y = semantics.join_tokens(F.linear(text, weight, module.bias), y, b.dense_tokens)
        return y


class _Prune(torch.autograd.Function):
    """s·z̃ of rows z (M, K).

    The gradient passes where z was kept, times s. The scale counts as a constant: the root in it has an
    infinite slope at an all-zero row.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, score: Tensor | None, compensation: str) -> Tensor:
        kept, keep, scale = prune_rows(z, score, compensation)
        ctx.save_for_backward(keep, scale)
        return kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        keep, scale = ctx.saved_tensors
        return torch.where(keep, grad * scale, 0), None, None


def _prune(z: Tensor, score: Tensor | None, compensation: str) -> tuple[Tensor, Tensor, Tensor]:
    pruned, keep, scale, _ = semantics.sparsify(z, score=score, compensation=compensation)
    return (scale[:, None] * pruned).to(z.dtype), keep, scale[:, None].to(z.dtype)


_compiled: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {}


def prune_rows(z: Tensor, score: Tensor | None, compensation: str) -> tuple[Tensor, Tensor, Tensor]:
    """s·z̃ (M, K) in z's dtype, what was kept (M, K), and s (M, 1) of rows z; one kernel on a GPU."""
    if z.device.type != "cuda":
        return _prune(z, score, compensation)
    if not _compiled:
        _compiled["cuda"] = torch.compile(_prune, dynamic=True)
    return _compiled["cuda"](z, score, compensation)


def _forwards(factors: Factors) -> dict[str, Trained]:
    return {name: Trained(branch) for name, branch in factors.trained.items()}


class _Trainer:
    """Steps of Adam on drawn batches; on a GPU forward and backward are captured once and replayed."""

    def __init__(
        self, model: nn.Module, pool: Pool, factors: Factors, batch: int, lr: float, steps: int, seed: int
    ) -> None:
        self.model, self.pool, self.lr, self.steps = model, pool, lr, steps
        self.parameters, self.forwards = factors.parameters, _forwards(factors)
        self.static = pool.static(min(batch, pool.count))
        self.device = pool.device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.total, self.number = torch.zeros((), device=self.device), 0
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, betas=(0.9, 0.99), fused=on_gpu)
        self.replay = self._captured() if on_gpu else self._forward_backward

    def step(self, number: int) -> None:
        """The `number`-th step, from 1."""
        rate = self.lr * min(1.0, number / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * number / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._draw()
        self.total += self.replay()
        self.number += 1
        nn.utils.clip_grad_norm_(self.parameters, MAX_NORM, foreach=self.device.type == "cuda")
        self.optimizer.step()

    def mean_loss(self) -> float:
        """Since it was last asked."""
        mean = float(self.total) / max(self.number, 1)
        self.total.zero_()
        self.number = 0
        return mean

    def _draw(self) -> None:
        size = len(self.static[_VELOCITY])
        index = torch.randint(self.pool.count, (size,), device=self.device, generator=self.generator)
        self.pool.draw(index, self.static)

    def _forward_backward(self) -> Tensor:
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        with torch.enable_grad(), emulate(self.model, self.forwards), sdpa_kernel(ATTENTION):
            loss = self.pool.loss(self.model, self.static)
            loss.backward()
        return loss.detach()

    def _captured(self) -> Callable[[], Tensor]:
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for _ in range(3):  # what is compiled or allocated once must be so before the capture
                self._draw()
                self._forward_backward()
        torch.cuda.current_stream(self.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._forward_backward()

        def replay() -> Tensor:
            graph.replay()
            return loss

        return replay


def velocity_judge(
    model: nn.Module,
    calls: Sequence[Call],
    guidance: float | None = None,
    weights: Sequence[float] | None = None,
    size: int = 256,
) -> Judge:
    """The loss over all samples of held-out calls."""
    pool = Pool(calls, guidance, weights)

    @torch.no_grad()
    def judge(branches: Mapping[str, Branch]) -> float:
        total = torch.zeros((), device=pool.device)
        moved = {name: Trained(branch.to(pool.device, torch.float32)) for name, branch in branches.items()}
        with sdpa_kernel(ATTENTION), emulate(model, moved):  # attention as in training
            for part, count in pool.parts(size):
                total += pool.loss(model, part) * count
        return float(total) / pool.count

    return judge
