"""Self-distillation of LoRA branches layer by layer, as RT-Lynx trains them, and the calls training works on.

    loss = ‖X·Wᵀ − Ŷ(X)‖² at the dense model's own inputs, all layers at once

Calls of the dense model are recorded and drawn in a seeded random order: one call is one training step.
`joint` trains on the same calls.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from ..profile.branch import Branch, exact_products
from ..profile.fingerprint import linear_layers
from .factors import Factors
from .replay import replayed
from .statistics import Hooks
from .workload import Workload, first_tensor

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
    deflating = [name for name, branch in branches.items() if branch.deflate]
    if deflating:
        raise ValueError(
            f"{deflating[0]!r} deflates: its branch has nothing left to learn from its own error"
        )
    linears = {name: linear_layers(model)[name] for name, branch in branches.items() if branch.rank}
    factors = Factors(branches, next(model.parameters()).device)
    optimizer = torch.optim.Adam(factors.parameters, lr=lr, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    bare = {name: replace(branches[name], down=None, up=None) for name in linears}

    def see(name: str, x: Tensor) -> None:
        module, shift = linears[name], branches[name].shift
        with torch.no_grad():
            residual = (F.linear(x, module.weight, module.bias) - bare[name](module, x)).float()
            z = x.float() if shift is None else x.float() - shift
        with exact_products(x.dtype), torch.enable_grad():
            down, up = factors.trained[name].down, factors.trained[name].up
            assert down is not None
            assert up is not None
            loss = (residual - (z @ down.T) @ up.T).square().mean()
            (loss / residual.square().mean().clamp_min(1e-12)).backward()

    def gradients(call: Call) -> None:
        optimizer.zero_grad(set_to_none=False)
        with torch.no_grad(), Hooks(model, linears, see):
            model(*call[0], **call[1])

    order = _order(len(calls), steps, seed)
    run = replayed(gradients, calls)
    for step, index in enumerate(track(order, "distilling layers", disable=quiet, transient=True), start=1):
        run(calls[index])
        optimizer.step()
        schedule.step()
        if report is not None and step % report_every == 0:
            report(step, factors.branches())
    return factors.branches()


def _order(calls: int, steps: int, seed: int) -> list[int]:
    """`steps` indices: random permutations of the calls, one after another."""
    if not calls:
        raise ValueError("there are no recorded calls to train on")
    generator = random.Random(seed)
    order: list[int] = []
    while len(order) < steps:
        order += generator.sample(range(calls), calls)
    return order[:steps]
