"""Self-distillation of LoRA branches: layer by layer as RT-Lynx trains them, or jointly on the velocity.

    per layer   ‖X·Wᵀ − Ŷ(X)‖² at the dense model's own inputs, all layers at once     (the paper's loss)
    jointly     ‖v − v̂‖² / ‖v‖² of the whole transformer, stopped when held-out calls no longer improve

Both work on recorded calls of the dense model, drawn in a seeded random order: one call is one training step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from ..profile.branch import Branch, exact_products
from ..profile.fingerprint import linear_layers
from .emulation import emulate
from .statistics import Hooks
from .workload import Workload, first_tensor

MAX_NORM = 1.0  # of the gradient of all factors together
Call = tuple[tuple[Any, ...], dict[str, Any], Tensor]  # positional and keyword arguments, dense velocity


def record(workload: Workload, quiet: bool = False) -> list[Call]:
    """Every call of the model in the workload's runs, with its dense output."""
    calls: list[Call] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        calls.append((args, kwargs, first_tensor(out).detach()))

    handle = workload.model.register_forward_hook(hook, with_kwargs=True)
    try:
        for batch in track(range(len(workload)), "recording calls", disable=quiet, transient=True):
            workload.run(batch)
    finally:
        handle.remove()
    return calls


def split_calls(calls: list[Call], samples: int, seed: int = 0) -> list[Call]:
    """Each call cut into smaller ones of `samples` random samples (all of a smaller call); no remainders."""
    generator = torch.Generator().manual_seed(seed)
    smaller: list[Call] = []
    for args, kwargs, velocity in calls:
        batch = velocity.shape[0]
        for chosen in torch.randperm(batch, generator=generator).split(samples):
            if len(chosen) == min(samples, batch):
                index = chosen.to(velocity.device)
                smaller.append(
                    (
                        tuple(_samples(value, index, batch) for value in args),
                        {name: _samples(value, index, batch, name) for name, value in kwargs.items()},
                        velocity[index],
                    )
                )
    return smaller


def _samples(value: Any, index: Tensor, batch: int, name: str = "") -> Any:
    """Rows of what holds one a sample; flags and the like, and the ids of positions, are shared."""
    if name.endswith("_ids"):  # one row a token, and there may be as many tokens as samples
        return value
    per_sample = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch
    return value[index] if per_sample else value


@dataclass
class Factors:
    """Trainable fp32 copies of branches' A and B; `branches()` gives them back, as shared as they were."""

    start: Mapping[str, Branch]
    down: dict[str, nn.Parameter] = field(default_factory=dict)
    up: dict[str, nn.Parameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shared: dict[int, nn.Parameter] = {}
        for name, branch in self.start.items():
            if branch.down is not None and branch.up is not None:
                if id(branch.down) not in shared:
                    shared[id(branch.down)] = nn.Parameter(branch.down.detach().float().clone())
                self.down[name] = shared[id(branch.down)]
                self.up[name] = nn.Parameter(branch.up.detach().float().clone())

    def parameters(self) -> list[nn.Parameter]:
        return list(dict.fromkeys([*self.down.values(), *self.up.values()]))

    def branches(self, dtype: torch.dtype = torch.float32) -> dict[str, Branch]:
        downs = {down: down.detach().to(dtype, copy=True) for down in dict.fromkeys(self.down.values())}
        return {
            name: replace(branch, down=downs[self.down[name]], up=self.up[name].detach().to(dtype, copy=True))
            if name in self.down
            else branch
            for name, branch in self.start.items()
        }

    def forward(self, name: str) -> Callable[[nn.Linear, Tensor], Tensor]:
        """The layer's forward with gradients to its factors, rounded to the model's dtype on the way."""
        if name not in self.down:
            return self.start[name]

        def run(module: nn.Linear, x: Tensor) -> Tensor:
            down, up = (p.to(module.weight.dtype) for p in (self.down[name], self.up[name]))
            return replace(self.start[name], down=down, up=up)(module, x)

        return run


def random_branches(
    model: nn.Module, branches: Mapping[str, Branch], rank: int, seed: int = 0
) -> dict[str, Branch]:
    """PEFT's usual start: A uniform after Kaiming, B zero; shift and everything else as given."""
    generator = torch.Generator().manual_seed(seed)
    linears = linear_layers(model)
    started = {}
    for name, branch in branches.items():
        n, k = linears[name].out_features, linears[name].in_features
        r = min(rank, n, k)
        device = linears[name].weight.device
        down = (torch.rand(r, k, generator=generator) * 2 - 1) / k**0.5
        started[name] = replace(branch, down=down.to(device), up=torch.zeros(n, r, device=device))
    return started


def distill_layers(
    model: nn.Module,
    calls: list[Call],
    branches: Mapping[str, Branch],
    *,
    steps: int = 2000,
    lr: float = 1e-3,
    seed: int = 0,
    quiet: bool = False,
    report: Callable[[int, dict[str, Branch]], None] | None = None,
    report_every: int = 500,
) -> dict[str, Branch]:
    """Train every layer's branch on its own output error at the dense model's inputs (RT-Lynx's loss).

    Adam with a cosine to zero. `report(step, branches)` is called every `report_every` steps.
    """
    factors = Factors(branches)
    linears = {name: linear_layers(model)[name] for name in factors.down}
    optimizer = torch.optim.Adam(factors.parameters(), lr=lr, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    bare = {name: replace(branches[name], down=None, up=None) for name in linears}

    def see(name: str, x: Tensor) -> None:
        module, shift = linears[name], branches[name].shift
        with torch.no_grad():
            residual = (F.linear(x, module.weight, module.bias) - bare[name](module, x)).float()
            z = x.float() if shift is None else x.float() - shift
        with exact_products(x.dtype), torch.enable_grad():
            loss = (residual - (z @ factors.down[name].T) @ factors.up[name].T).square().mean()
            (loss / residual.square().mean().clamp_min(1e-12)).backward()

    order = _order(len(calls), steps, seed)
    for step, index in enumerate(track(order, "distilling layers", disable=quiet, transient=True), start=1):
        args, kwargs, _ = calls[index]
        with torch.no_grad(), Hooks(model, linears, see):
            model(*args, **kwargs)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if report is not None and step % report_every == 0:
            report(step, factors.branches())
    return factors.branches()


@dataclass(frozen=True)
class Distilled:
    """Result of `distill_jointly`: the best branches, and (step, training loss, held-out loss) as it went."""

    branches: dict[str, Branch]
    history: list[tuple[int, float, float]]


def distill_jointly(
    model: nn.Module,
    calls: list[Call],
    held_out: list[Call],
    branches: Mapping[str, Branch],
    *,
    steps: int = 1000,
    lr: float = 2e-4,
    check_every: int = 50,
    patience: int = 4,
    seed: int = 0,
    quiet: bool = False,
) -> Distilled:
    """Train all branches together on the velocity, and keep those with the least held-out loss.

    Stops after `patience` checks without improvement. The start is one of the candidates: the result is never
    worse on the held-out calls than what was given.
    """
    factors = Factors(branches)
    forwards = {name: factors.forward(name) for name in branches}
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(factors.parameters(), lr=lr, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, least, waited, training = factors.branches(), _held_out(model, held_out, forwards), 0, 0.0
    history = [(0, least, least)]
    try:
        order = _order(len(calls), steps, seed)
        for step, index in enumerate(
            track(order, "distilling jointly", disable=quiet, transient=True), start=1
        ):
            with torch.enable_grad(), emulate(model, forwards):
                loss = _velocity_loss(model, calls[index])
                loss.backward()
            training += float(loss.detach())
            norm = torch.nn.utils.clip_grad_norm_(factors.parameters(), MAX_NORM)
            if bool(torch.isfinite(norm)):
                optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % check_every == 0 or step == steps:
                now = _held_out(model, held_out, forwards)
                history.append((step, training / check_every, now))
                training = 0.0
                best, least, waited = (
                    (factors.branches(), now, 0) if now < least else (best, least, waited + 1)
                )
                if waited >= patience:
                    break
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return Distilled(best, history)


def _velocity_loss(model: nn.Module, call: Call) -> Tensor:
    args, kwargs, velocity = call
    out = first_tensor(model(*args, **kwargs)).float()
    return (out - velocity.float()).square().sum() / velocity.float().square().sum().clamp_min(1e-12)


@torch.no_grad()
def _held_out(
    model: nn.Module, calls: list[Call], forwards: Mapping[str, Callable[[nn.Linear, Tensor], Tensor]]
) -> float:
    with emulate(model, forwards):
        return sum(float(_velocity_loss(model, call)) for call in calls) / max(len(calls), 1)


def _order(calls: int, steps: int, seed: int) -> list[int]:
    """`steps` indices: random permutations of the calls, one after another."""
    if not calls:
        raise ValueError("there are no recorded calls to train on")
    generator = random.Random(seed)
    order: list[int] = []
    while len(order) < steps:
        order += generator.sample(range(calls), calls)
    return order[:steps]
