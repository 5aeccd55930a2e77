"""Ways to prune and to make up for it that the product does not have: what they gain does not pay for them.

Each was measured beside the others (`levers`): weight-norm scores, second-order pruning inside a group of
four (optimal brain surgeon), a permutation of the channels, a calibrated scale, corrections folded into W.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from ..calibration.joint import prune_rows
from ..calibration.statistics import Moments
from ..runtime import semantics

LOW_RANK = 32


def column_norms(weight: Tensor) -> Tensor:
    """(K,) the norm of each column of W (N, K), with mean 1: how much an error in this channel costs."""
    norms = weight.float().norm(dim=0)
    return norms / norms.mean()


def scored(score: Tensor) -> Callable[[Tensor], Tensor]:
    """Norm compensation, ranked by |z|·c."""
    return lambda z: prune_rows(z, score, "norm")[0]


def permuted(energy: Tensor) -> Callable[[Tensor], Tensor]:
    """Norm compensation in groups of two strong and two weak channels. energy: (K,) of each channel.

    An upper bound for a permutation that neighbouring weights take up, which all readers of X would share.
    """
    order = energy.argsort(descending=True)
    half = len(order) // 2
    strong, weak = order[:half], order[half:].flip(0)
    groups = torch.stack([strong[::2], strong[1::2], weak[::2], weak[1::2]], 1).reshape(-1)
    back = groups.argsort()
    return lambda z: prune_rows(z[:, groups].contiguous(), None, "norm")[0][:, back]


def one_mask(z: Tensor) -> Tensor:
    """Norm compensation, with one mask for each row of the first half and its partner in the second (M even).

    A guided batch holds the negative half first; what one mask takes from both, guidance does not amplify.
    """
    halves = z.float().chunk(2)
    keep = semantics.keep_mask(halves[0].square() + halves[-1].square()).repeat(len(halves), 1)
    kept = torch.where(keep, z.float(), 0)
    scale = (z.float().square().sum(-1) / (kept.square().sum(-1) + semantics.NORM_EPS)).sqrt()
    return (scale[:, None] * kept).to(z.dtype)


def second_order(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """In each group the pattern of least output error by WᵀW's 4×4 block, the kept two updated to match."""
    k = weight.shape[1]
    blocks = weight.double().reshape(-1, k // 4, 4).transpose(0, 1)
    gram = blocks.transpose(1, 2) @ blocks
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(-1)
    gram = gram + ridge[:, None, None] * torch.eye(4, device=weight.device)
    patterns = []
    for kept in combinations(range(4), 2):
        keep, drop = list(kept), [i for i in range(4) if i not in kept]
        cross = gram[:, keep][:, :, drop]
        update = torch.linalg.solve(
            gram[:, keep][:, :, keep], cross
        )  # what the kept take over of the dropped
        cost = gram[:, drop][:, :, drop] - cross.transpose(1, 2) @ update
        patterns.append((keep, drop, update.float(), cost.float()))

    def restore(z: Tensor) -> Tensor:
        groups = z.float().unflatten(-1, (-1, 4))
        best = torch.full(groups.shape[:-1], torch.inf, device=z.device)
        chosen = torch.zeros_like(groups)
        for keep, drop, update, cost in patterns:
            lost = groups[..., drop]
            error = torch.einsum("mgi,gij,mgj->mg", lost, cost, lost)
            candidate = torch.zeros_like(groups)
            candidate[..., keep] = groups[..., keep] + torch.einsum("gij,mgj->mgi", update, lost)
            chosen = torch.where((error < best)[..., None], candidate, chosen)
            best = torch.minimum(error, best)
        return chosen.flatten(-2).to(z.dtype)

    return restore


def calibrated(moments: Moments, weight: Tensor) -> Tensor:
    """W times ⟨Y, Ŷ⟩ / ‖Ŷ‖²: the scale of least output error, one a layer."""
    kept, both = _kept(moments)
    w = weight.double()
    return (((w @ both) * w).sum() / ((w @ kept) * w).sum()).float() * weight


def folded_diagonal(moments: Moments, weight: Tensor) -> Tensor:
    """W with each column scaled so that z̃ stands in for z best in its own channel."""
    kept, both = _kept(moments)
    return weight * (both.diagonal() / kept.diagonal().clamp_min(1e-12)).float()


def folded(moments: Moments, weight: Tensor) -> Tensor:
    """W·Pᵀ with z ≈ z̃·P: every channel predicted from all that were kept."""
    kept, both = _kept(moments)
    ridge = torch.diag(1e-4 * kept.diagonal() + 1e-12 * kept.diagonal().mean())
    return (weight.double() @ torch.linalg.solve(kept + ridge, both).T).float()


def folded_low_rank(moments: Moments, weight: Tensor) -> Tensor:
    """W plus the part of `folded`'s change of this rank that changes the output most."""
    kept, _ = _kept(moments)
    ridge = torch.diag(1e-4 * kept.diagonal() + 1e-12 * kept.diagonal().mean())
    lower = torch.linalg.cholesky(kept + ridge)
    change = (folded(moments, weight) - weight).double() @ lower
    left, singular, right = torch.linalg.svd(change, full_matrices=False)
    part = (left[:, :LOW_RANK] * singular[:LOW_RANK]) @ right[:LOW_RANK]
    return weight + torch.linalg.solve_triangular(lower, part, upper=False, left=False).float()


FOLDS: dict[str, Callable[[Moments, Tensor], Tensor]] = {
    "diagonal": folded_diagonal,
    f"rank {LOW_RANK}": folded_low_rank,
    "everything": folded,
}


def _kept(moments: Moments) -> tuple[Tensor, Tensor]:
    """Σẑᵀẑ and Σẑᵀz in fp64, ẑ = z − e being what stands in for z."""
    gram, cross, error = (m.double() for m in (moments.gram, moments.cross, moments.error))
    return gram - cross - cross.T + error, gram - cross.T
