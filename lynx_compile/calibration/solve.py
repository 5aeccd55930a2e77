"""Closed forms: the best LoRA branch of a layer from its input's moments, and how to spend a total of ranks.

The residual of a sparse layer is E = e·Wᵀ with e = z − s·z̃. The branch that minimises ‖E − z·Aᵀ·Bᵀ‖² over
all tokens is reduced-rank regression: with G = Σzᵀz = L·Lᵀ and D = Σzᵀe, the full-rank answer is G⁻¹·D·Wᵀ,
and the best rank-R one is the truncated SVD of P = L⁻¹·D·Wᵀ mapped back through L⁻ᵀ. Its error is ‖E‖² minus
the squares of the R singular values kept, so every rank's error is known from one factorisation.

Source: reduced-rank regression (Izenman 1975) applied to the branch of RT-Lynx (arXiv 2605.26632).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .statistics import Moments

RIDGE = 1e-4  # relative to each channel's own energy: well above what fp32 sums leave of rounding


@dataclass(frozen=True, eq=False)
class Branches:
    """Every rank's branch of one layer, and its errors.

    directions: (K, R_max), columns of L⁻ᵀ·U.  right: (N, R_max).  singular: (R_max,), descending.
    lost: ‖E‖².  energy: ‖XWᵀ‖².  rows: tokens seen.
    """

    directions: Tensor
    right: Tensor
    singular: Tensor
    lost: float
    energy: float
    rows: int

    def state(self, name: str) -> dict[str, Tensor]:
        """As tensors to keep on disk, under the layer's name; the factors in fp32."""
        return {
            f"{name}/directions": self.directions.float().cpu(),
            f"{name}/right": self.right.float().cpu(),
            f"{name}/singular": self.singular.cpu(),
            f"{name}/sums": torch.tensor([self.lost, self.energy, self.rows], dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, name: str, state: Mapping[str, Tensor]) -> Branches:
        lost, energy, rows = state[f"{name}/sums"].tolist()
        directions, right, singular = (state[f"{name}/{key}"] for key in ("directions", "right", "singular"))
        return cls(directions, right, singular, lost, energy, int(rows))

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(A (R, K), B (N, R)) in fp32, scaled so that the columns of t = z·Aᵀ have unit mean square."""
        root = max(self.rows, 1) ** 0.5
        down = self.directions[:, :rank].T * root
        up = self.right[:, :rank] * (self.singular[:rank] / root)
        return down.float().contiguous(), up.float().contiguous()

    def error(self, rank: int) -> float:
        """Relative output error ‖Y − Ŷ‖ / ‖Y‖ with a branch of this rank, over the tokens seen."""
        left = self.lost - float(self.singular[:rank].square().sum())
        return (max(left, 0.0) / self.energy) ** 0.5 if self.energy > 0 else 0.0


def lora_branches(moments: Moments, shift: Tensor | None, weight: Tensor, max_rank: int) -> Branches:
    """The branches of ranks 0 … max_rank of the layer with this weight (N, K).

    Raises ValueError when no tokens were seen or the statistics are not finite.
    """
    if moments.rows == 0:
        raise ValueError("the layer saw no tokens; run at least one batch through it")
    w = weight.detach().double()
    gram, cross, error = moments.gram.double(), moments.cross.double(), moments.error.double()
    if not bool(torch.isfinite(gram).all() and torch.isfinite(cross).all()):
        raise ValueError(
            "the layer's inputs hold NaN or Inf; calibrate in bf16 or fp32, or leave the layer dense"
        )
    lower = torch.linalg.cholesky(_ridged(gram))
    pruned_output = torch.linalg.solve_triangular(lower, cross @ w.T, upper=False)  # P, (K, N)
    left, singular, right = _leading(pruned_output, min(max_rank, *w.shape))
    directions = torch.linalg.solve_triangular(lower.T, left, upper=True)
    lost = float(((w @ error) * w).sum())
    return Branches(directions, right, singular, lost, _energy(moments, shift, w), moments.rows)


def _ridged(gram: Tensor) -> Tensor:
    """G + ridge · diag(G): rounding in Σ z_i·z_j is relative to the two channels' norms."""
    energy = gram.diagonal()
    return gram + torch.diag(RIDGE * energy + 1e-12 * energy.mean() + torch.finfo(gram.dtype).tiny)


def _leading(p: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of P (K, N) from its smaller Gram matrix: U (K, R), σ (R,), V (N, R)."""
    wide = p.shape[0] > p.shape[1]
    small = p.T @ p if wide else p @ p.T
    values, vectors = torch.linalg.eigh(small)
    vectors = vectors.flip(-1)[:, :rank]
    singular = values.flip(-1)[:rank].clamp_min(0).sqrt()
    # A direction of no energy has no partner; dividing by its σ would make one out of rounding noise.
    inverse = torch.where(
        singular > singular[:1] * 1e-7, 1 / singular.clamp_min(1e-300), torch.zeros_like(singular)
    )
    if wide:
        return (p @ vectors) * inverse, singular, vectors
    return vectors, singular, (p.T @ vectors) * inverse


def _energy(moments: Moments, shift: Tensor | None, w: Tensor) -> float:
    """‖XWᵀ‖² over the tokens seen, from the moments of z = X − μ."""
    second = moments.gram.double()
    if shift is not None:
        mu = shift.double()
        cross = torch.outer(moments.total, mu)
        second = second + cross + cross.T + moments.rows * torch.outer(mu, mu)
    return float(((w @ second) * w).sum())


def allocate_ranks(
    branches: Mapping[str, Branches], weights: Mapping[str, float], total: int, multiple: int = 16
) -> dict[str, int]:
    """Ranks that sum to at most `total`, in multiples of `multiple`, with the least weighted error.

    The error of a layer is its relative squared output error times `weights[name]` (its end-to-end
    sensitivity; 1 where unknown). Each further step of rank takes off a known, ever smaller amount, so taking
    the largest first is optimal.
    """
    ranks = dict.fromkeys(branches, 0)
    heap: list[tuple[float, str]] = []

    def push(name: str) -> None:
        layer, rank = branches[name], ranks[name]
        gain = float(layer.singular[rank : rank + multiple].square().sum())
        if rank + multiple <= layer.singular.numel() and gain > 0 and layer.energy > 0:
            heapq.heappush(heap, (-gain / layer.energy * weights.get(name, 1.0), name))

    for name in branches:
        push(name)
    left = total
    while heap and left >= multiple:
        _, name = heapq.heappop(heap)
        ranks[name] += multiple
        left -= multiple
        push(name)
    return ranks
