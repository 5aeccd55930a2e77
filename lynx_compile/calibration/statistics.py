"""Streaming second moments of what linear layers read, and of what 2:4 pruning takes away from it.

For every distinct input X of the chosen layers, over all tokens seen, with z = X − μ and e = z − s·z̃:

    m = Σ z        (K,)       G = Σ zᵀz      D = Σ zᵀe      C = Σ eᵀe      (K, K)

They are independent of N, shared by all layers that read the same X, and add up over batches and devices.
From them follow the closed-form LoRA branch, every layer's output error and every linear correction of W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..profile.branch import exact_products
from ..runtime import semantics

MATRICES = ("gram", "cross", "error")


@dataclass
class Moments:
    """The sums above for one distinct input. Matrices are fp32, (K, K); total is fp64, (K,)."""

    rows: int
    total: Tensor
    gram: Tensor
    cross: Tensor
    error: Tensor

    @classmethod
    def zeros(cls, k: int, device: torch.device) -> Moments:
        gram, cross, error = (torch.zeros(k, k, device=device) for _ in MATRICES)
        return cls(0, torch.zeros(k, dtype=torch.float64, device=device), gram, cross, error)

    def update(self, x: Tensor, shift: Tensor | None, compensation: str) -> None:
        """Add the rows of x (M, K)."""
        z = x if shift is None else (x.float() - shift.float()).to(x.dtype)
        pruned, _, scale, _ = semantics.sparsify(z, compensation=compensation)
        z = z.float()
        lost = z - scale[:, None].float() * pruned.float()
        self.rows += z.shape[0]
        self.total += z.double().sum(0)
        with exact_products(x.dtype):  # of z; what is lost is rounded to TF32, 2⁻¹¹ of it and unbiased
            self.gram.addmm_(z.T, z)
            self.cross.addmm_(z.T, lost)
            self.error.addmm_(lost.T, lost)

    def all_reduce(self) -> None:
        """Sum over all processes of the default group."""
        rows = torch.tensor(self.rows, dtype=torch.int64, device=self.gram.device)
        for tensor in (rows, self.total, self.gram, self.cross, self.error):
            dist.all_reduce(tensor)
        self.rows = int(rows)

    def state(self) -> dict[str, Tensor]:
        return {
            "rows": torch.tensor(self.rows),
            "total": self.total,
            **{name: getattr(self, name) for name in MATRICES},
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        self.rows = int(state["rows"])
        for name in ("total", *MATRICES):
            getattr(self, name).copy_(state[name])


def moments_bytes(k: int) -> int:
    """Device memory one distinct input of K channels takes."""
    return len(MATRICES) * 4 * k * k + 8 * k


@dataclass
class InputMean:
    """Σx and the number of rows of one distinct input; x̄ becomes the shift."""

    total: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, k: int, device: torch.device) -> InputMean:
        return cls(torch.zeros(k, dtype=torch.float64, device=device))

    def update(self, x: Tensor) -> None:
        self.total += x.double().sum(0)
        self.rows += x.shape[0]

    def all_reduce(self) -> None:
        rows = torch.tensor(self.rows, dtype=torch.int64, device=self.total.device)
        dist.all_reduce(rows)
        dist.all_reduce(self.total)
        self.rows = int(rows)

    def mean(self) -> Tensor:
        """(K,) fp32."""
        return (self.total / max(self.rows, 1)).float()


class Readers:
    """Groups layers by the tensor they read, by identity, while the model runs.

    A layer joins the group of the first layer that reads the same tensor, and leaves it for good when it once
    reads another; `see` returns the leader of the layer's group now.
    """

    def __init__(self) -> None:
        self._leaders: dict[str, str] = {}
        self._reading: list[tuple[Tensor, str]] = []

    def see(self, name: str, x: Tensor) -> str:
        leader = next((first for seen, first in self._reading if seen is x), name)
        if leader == name:
            self._reading.append((x, name))
        if self._leaders.setdefault(name, leader) != leader:
            self._leaders[name] = name
        return self._leaders[name]

    def end_of_call(self) -> None:
        self._reading.clear()

    def groups(self) -> dict[str, list[str]]:
        """leader → the layers that read the same X, in the order they run."""
        groups: dict[str, list[str]] = {}
        for name, leader in self._leaders.items():
            groups.setdefault(leader, []).append(name)
        return groups


@dataclass
class Hooks:
    """While entered: `see(name, x)` as each linear layer runs, `end()` after each call of the model."""

    model: nn.Module
    layers: Mapping[str, nn.Linear]
    see: Callable[[str, Tensor], object]
    end: Callable[[], None] | None = None
    _handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    def __enter__(self) -> Hooks:
        for name, module in self.layers.items():

            def hook(_module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                self.see(name, args[0])

            self._handles.append(module.register_forward_pre_hook(hook))
        if self.end is not None:
            end = self.end
            self._handles.append(self.model.register_forward_hook(lambda *_: end()))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def rows_of(x: Tensor, dense_tokens: int = 0) -> Tensor:
    """The tokens of x that run sparse, as (M, K): all but the `dense_tokens` of each sample."""
    if dense_tokens and x.dim() == 3:
        _, x = semantics.split_tokens(x, dense_tokens)
    return x.reshape(-1, x.shape[-1])


def spread_over(rows: Tensor, most: int) -> Tensor:
    """At most `most` of the rows (M, K), evenly spaced."""
    # An odd distance, so that they do not all come from one column of a picture.
    return rows[:: -(-len(rows) // most) | 1] if len(rows) > most else rows
