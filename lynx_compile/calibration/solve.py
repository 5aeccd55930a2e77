"""Closed forms: the best LoRA branch of a layer from its input's moments, and how to spend a total of ranks.

The residual of a sparse layer is E = e·Wᵀ with e = z − s·z̃. The branch that minimises ‖E − z·Aᵀ·Bᵀ‖² over
all tokens is reduced-rank regression: with G = Σzᵀz = L·Lᵀ and D = Σzᵀe, the full-rank answer is G⁻¹·D·Wᵀ,
and the best rank-R one is the truncated SVD of P = L⁻¹·D·Wᵀ mapped back through L⁻ᵀ. Its error is ‖E‖² minus
the squares of the R singular values kept, so every rank's error is known from one factorisation. A ridge on
G keeps it from learning by heart what tokens there are: on held-out prompts it decides more than the rank.

Layers that read one X share A, so that t = z·Aᵀ is computed once for all of them: the same regression on
their outputs side by side, each in units of its own ‖XWᵀ‖, gives the directions, and the best B of each layer
given those is its part of the right factor.

Deflation is the other closed form: A holds the leading principal directions of X − μ, which leave X before it
is pruned and cross the layer exactly. What is left of X has the least energy that R directions can leave, and
what pruning loses is in proportion to that.

Source: reduced-rank regression (Izenman 1975) applied to the branch of RT-Lynx (arXiv 2605.26632).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .statistics import Moments

# Relative to each channel's own energy. Tokens of one picture repeat each other, so there are far fewer than
# rows to fit to; it also is well above what fp32 sums leave of rounding.
RIDGE = 0.1


@dataclass(frozen=True, eq=False)
class Branches:
    """Every rank's branch of one layer, and its errors.

    directions: (K, R_max), columns of L⁻ᵀ·U, one tensor for all layers of an X.  right: (N, R_max), of unit
    columns.  singular: (R_max,), what each direction takes off E; descending for the only layer of an X.
    lost: ‖E‖².  energy: ‖XWᵀ‖².  rows: tokens seen.
    """

    directions: Tensor
    right: Tensor
    singular: Tensor
    lost: float
    energy: float
    rows: int

    def down(self, rank: int) -> Tensor:
        """A (R, K) in fp32, scaled so that the columns of t = z·Aᵀ have unit mean square."""
        return (self.directions[:, :rank].T * max(self.rows, 1) ** 0.5).float().contiguous()

    def up(self, rank: int) -> Tensor:
        """B (N, R) in fp32, to go with `down`."""
        return (self.right[:, :rank] * (self.singular[:rank] / max(self.rows, 1) ** 0.5)).float().contiguous()

    def error(self, rank: int) -> float:
        """Relative output error ‖Y − Ŷ‖ / ‖Y‖ with a branch of this rank, over the tokens seen."""
        left = self.lost - float(self.singular[:rank].square().sum())
        return (max(left, 0.0) / self.energy) ** 0.5 if self.energy > 0 else 0.0


@dataclass(frozen=True, eq=False)
class Deflation(Branches):
    """Every rank's deflation of one layer: orthonormal directions, no B of its own (`right` is (N, 0)).

    Errors are predictions: what pruning lost of X, times the share of X's energy that the directions leave.
    """

    def down(self, rank: int) -> Tensor:
        """A (R, K) in fp32, with orthonormal rows."""
        return self.directions[:, :rank].T.float().contiguous()

    def up(self, rank: int) -> Tensor:
        return torch.zeros(self.right.shape[0], rank)


def to_state(branches: Mapping[str, Branches]) -> dict[str, Tensor]:
    """The layers of one X as tensors to keep on disk; the factors in fp32, the directions once."""
    leader = next(iter(branches))
    state = {f"{leader}/directions": branches[leader].directions.float().cpu()}
    for name, layer in branches.items():
        state[f"{name}/right"] = layer.right.float().cpu()
        state[f"{name}/singular"] = layer.singular.cpu()
        state[f"{name}/sums"] = torch.tensor([layer.lost, layer.energy, layer.rows], dtype=torch.float64)
    return state


def from_state(
    names: Sequence[str], state: Mapping[str, Tensor], kind: type[Branches] = Branches
) -> dict[str, Branches]:
    """The layers of one X, the leader first, from what `to_state` made of branches of this kind."""
    directions = state[f"{names[0]}/directions"]
    found = {}
    for name in names:
        lost, energy, rows = state[f"{name}/sums"].tolist()
        right, singular = state[f"{name}/right"], state[f"{name}/singular"]
        found[name] = kind(directions, right, singular, lost, energy, int(rows))
    return found


def lora_branches(
    moments: Moments,
    shift: Tensor | None,
    weights: Mapping[str, Tensor],
    max_rank: int,
    ridge: float = RIDGE,
) -> dict[str, Branches]:
    """The branches of ranks 0 … max_rank of the layers with these weights (N, K), which read one X.

    ridge: added to G's diagonal, relative to it; errors are those with its penalty in them, a little above
    those on the tokens seen. Raises ValueError when no tokens were seen or the statistics are not finite.
    """
    _check(moments, next(iter(weights)))
    gram, cross, error = moments.gram.double(), moments.cross.double(), moments.error.double()
    lower = torch.linalg.cholesky(_ridged(gram, ridge))
    pruned_outputs, sums = {}, {}  # P (K, N) and (‖E‖², ‖XWᵀ‖²) of each layer
    for name, weight in weights.items():
        w = weight.detach().double()
        pruned_outputs[name] = torch.linalg.solve_triangular(lower, cross @ w.T, upper=False)
        sums[name] = float(((w @ error) * w).sum()), _energy(moments, shift, w)
    scaled = [p * sums[name][1] ** -0.5 if sums[name][1] > 0 else p for name, p in pruned_outputs.items()]
    together = torch.cat(scaled, 1) if len(scaled) > 1 else scaled[0]
    left = _leading(together, min(max_rank, *together.shape))
    directions = torch.linalg.solve_triangular(lower.T, left, upper=True)
    branches = {}
    for name, p in pruned_outputs.items():
        right = p.T @ left
        singular = right.norm(dim=0)
        unit = right / singular.clamp_min(torch.finfo(right.dtype).tiny)
        branches[name] = Branches(directions, unit, singular, *sums[name], moments.rows)
    return branches


def deflations(
    moments: Moments, shift: Tensor | None, weights: Mapping[str, Tensor], max_rank: int
) -> dict[str, Branches]:
    """The deflations of ranks 0 … max_rank of the layers with these weights (N, K), which read one X.

    Raises ValueError when no tokens were seen or the statistics are not finite.
    """
    _check(moments, next(iter(weights)))
    values, vectors = torch.linalg.eigh(moments.gram.double())
    rank = min(max_rank, len(values))
    energies = values.flip(-1).clamp_min(0)
    directions = vectors.flip(-1)[:, :rank]
    error = moments.error.double()
    found: dict[str, Branches] = {}
    for name, weight in weights.items():
        w = weight.detach().double()
        lost = float(((w @ error) * w).sum())
        singular = (lost * energies[:rank] / energies.sum().clamp_min(1e-300)).sqrt()
        energy = _energy(moments, shift, w)
        found[name] = Deflation(directions, w[:, :0], singular, lost, energy, moments.rows)
    return found


def _check(moments: Moments, name: str) -> None:
    if moments.rows == 0:
        raise ValueError(f"{name} saw no tokens; run at least one batch through it")
    if not bool(torch.isfinite(moments.gram).all() and torch.isfinite(moments.cross).all()):
        raise ValueError(
            f"the inputs of {name} hold NaN or Inf; calibrate in bf16 or fp32, or leave the layer dense"
        )


def _ridged(gram: Tensor, ridge: float) -> Tensor:
    """G + ridge · diag(G): rounding in Σ z_i·z_j is relative to the two channels' norms."""
    energy = gram.diagonal()
    return gram + torch.diag(ridge * energy + 1e-12 * energy.mean() + torch.finfo(gram.dtype).tiny)


def _leading(p: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of P (K, N), U (K, R), from its smaller Gram matrix."""
    wide = p.shape[0] > p.shape[1]
    values, vectors = torch.linalg.eigh(p.T @ p if wide else p @ p.T)
    vectors = vectors.flip(-1)[:, :rank]
    if not wide:
        return vectors
    singular = values.flip(-1)[:rank].clamp_min(0).sqrt()
    # A direction of no energy has no partner; dividing by its σ would make one out of rounding noise.
    inverse = torch.where(
        singular > singular[:1] * 1e-7, 1 / singular.clamp_min(1e-300), torch.zeros_like(singular)
    )
    return (p @ vectors) * inverse


def _energy(moments: Moments, shift: Tensor | None, w: Tensor) -> float:
    """‖XWᵀ‖² over the tokens seen, from the moments of z = X − μ."""
    second = moments.gram.double()
    if shift is not None:
        mu = shift.double()
        cross = torch.outer(moments.total, mu)
        second = second + cross + cross.T + moments.rows * torch.outer(mu, mu)
    return float(((w @ second) * w).sum())


def allocate_ranks(
    groups: Mapping[str, Mapping[str, Branches]],
    weights: Mapping[str, float],
    total: int,
    multiple: int = 16,
) -> dict[str, int]:
    """A rank for each group of layers that share A; over all layers they sum to at most `total`.

    Ranks are multiples of `multiple`. The error of a layer is its relative squared output error times
    `weights[name]` (its end-to-end sensitivity; 1 where unknown). Each further step of a group's rank takes
    off a known amount at a cost of one step for each of its layers; the largest for its cost goes first.
    """
    ranks = dict.fromkeys(groups, 0)
    heap: list[tuple[float, str]] = []

    def push(leader: str) -> None:
        rank, group = ranks[leader], groups[leader]
        if rank + multiple > next(iter(group.values())).singular.numel():
            return
        gain = sum(
            float(layer.singular[rank : rank + multiple].square().sum())
            / layer.energy
            * weights.get(name, 1.0)
            for name, layer in group.items()
            if layer.energy > 0
        )
        if gain > 0:
            heapq.heappush(heap, (-gain / len(group), leader))

    for leader in groups:
        push(leader)
    left = total
    while heap:
        _, leader = heapq.heappop(heap)
        if (cost := multiple * len(groups[leader])) <= left:
            ranks[leader] += multiple
            left -= cost
            push(leader)
    return ranks
