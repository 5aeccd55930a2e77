"""2:4 sparse *weights*, the rivals of sparse activations: one-shot methods from their papers.

Each takes W (N, K) and the input's second moments and returns the pruned weight; 2 of every 4 neighbours
along K are kept by score. SLiM returns a low-rank branch beside it.

    magnitude  |W|
    Wanda      |W_ij| · ‖X_j‖₂                                                          (Sun et al. 2024)
    RIA        (|W_ij| / Σ_i|W_ij| + |W_ij| / Σ_j|W_ij|) · ‖X_j‖₂^½                     (Zhang et al. 2024)
    BaWA       (|W_ij| / ‖W_:j‖₂^α + |W_ij| / ‖W_i:‖₂^β) · ‖X_j‖₂^γ, α, β, γ searched   (Liu et al. 2025)
    SLiM       Wanda, then the branch that minimises ‖diag(x̄)·(ΔW − BA)ᵀ‖_F            (Mozaffari et al.
    2025)

SLiM is taken without its weight quantisation, which has nothing to do with sparsity.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.semantics import keep_mask

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)  # of BaWA's three exponents; 0.5 is RIA's γ, (0, 0, 1) is Wanda


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Of one layer's input X over `rows` tokens. second: Σxᵀx, (K, K).  magnitude: mean |x|, (K,)."""

    second: Tensor
    magnitude: Tensor
    rows: int

    def norms(self) -> Tensor:
        """‖X_j‖₂, (K,) fp32."""
        return self.second.diagonal().clamp_min(0).sqrt().float()


def magnitude(weight: Tensor) -> Tensor:
    """Keep the largest weights."""
    return _pruned(weight, weight.float().abs())


def wanda(weight: Tensor, statistics: InputStatistics) -> Tensor:
    """Keep the largest weights, each counted with the norm of the channel it reads."""
    return _pruned(weight, weight.float().abs() * statistics.norms())


def ria(weight: Tensor, statistics: InputStatistics, power: float = 0.5) -> Tensor:
    """Relative importance: each weight against the sums of its row and of its column."""
    w = weight.float().abs()
    relative = w / w.sum(0, keepdim=True).clamp_min(1e-12) + w / w.sum(1, keepdim=True).clamp_min(1e-12)
    return _pruned(weight, relative * statistics.norms() ** power)


def bawa(weight: Tensor, statistics: InputStatistics) -> Tensor:
    """Balanced weights and activations; of all exponents on `GRID` those of the least output error."""
    w, norms = weight.float().abs(), statistics.norms()
    columns, rows = w.norm(dim=0, keepdim=True).clamp_min(1e-12), w.norm(dim=1, keepdim=True).clamp_min(1e-12)
    best, least = weight, torch.inf
    for alpha, beta, gamma in itertools.product(GRID, repeat=3):
        pruned = _pruned(weight, (w / columns**alpha + w / rows**beta) * norms**gamma)
        error = output_error(weight, pruned, statistics)
        if error < least:
            best, least = pruned, error
    return best


def slim(weight: Tensor, statistics: InputStatistics, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(pruned weight, A (R, K), B (N, R)): Wanda and the branch that repairs the most salient loss.

    The saliency of an element of ΔW is its size times the mean magnitude of the channel it reads, moved away
    from zero so that it can be divided out again.
    """
    pruned = wanda(weight, statistics)
    saliency = statistics.magnitude.float()
    saliency = saliency + saliency[saliency > 0].min() if bool((saliency > 0).any()) else saliency + 1
    left, singular, right = torch.linalg.svd(
        (weight.float() - pruned.float()) * saliency, full_matrices=False
    )
    return pruned, right[:rank] / saliency, left[:, :rank] * singular[:rank]


def output_error(weight: Tensor, pruned: Tensor, statistics: InputStatistics) -> float:
    """‖X·(W − W̃)ᵀ‖² over the tokens seen."""
    difference = (weight.double() - pruned.double()).to(statistics.second.dtype)
    return float(((difference @ statistics.second) * difference).sum())


def _pruned(weight: Tensor, score: Tensor) -> Tensor:
    return torch.where(keep_mask(score), weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
