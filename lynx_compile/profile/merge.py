"""Compare two profiles of one model, and join two calibrations of it into one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .branch import Branch
from .errors import ProfileError
from .format import Layer, Profile
from .io import JSON
from .steps import dense_ends


@dataclass(frozen=True)
class Difference:
    """One layer of two profiles: decisions, ranks, local errors, and how far apart the branches are.

    branch: ‖B₁A₁ − B₂A₂‖ over the larger norm or, where that is larger, the same of the deflations AᵀA; 1
    where only one deflates.
    """

    name: str
    decisions: tuple[str, str]
    ranks: tuple[int, int]
    errors: tuple[float | None, float | None]
    branch: float

    @property
    def changed(self) -> bool:
        return self.decisions[0] != self.decisions[1] or self.ranks[0] != self.ranks[1] or self.branch > 1e-6


def diff(first: Profile, second: Profile) -> list[Difference]:
    """Every layer of two profiles of one model. Raises ProfileError for different models."""
    _same_model(first, second)
    rows = []
    for name, a in first.layers.items():
        b = second.layers[name]
        rows.append(
            Difference(
                name,
                (a.decision or "default", b.decision or "default"),
                (a.branch.rank, b.branch.rank),
                (a.error_after, b.error_after),
                _branch_distance(a.branch, b.branch),
            )
        )
    return rows


def merge(first: Profile, second: Profile) -> Profile:
    """One profile from two calibrations of one model on different prompts.

    Each counts by the tokens it saw (`provenance.tokens`). Shifts, scores, errors and sensitivities are
    averaged; LoRA branches are averaged as products B·A and cut back to the larger rank by SVD; deflations as
    projections AᵀA, cut back likewise, with B carried over to the new A. A layer is sparse where both say so;
    where only one has chosen, it is as that one says. Of dense steps at each end the larger number counts, of
    as many steps as the first has. Raises ProfileError for different models or compensations.
    """
    _same_model(first, second)
    if first.compensation != second.compensation:
        raise ProfileError(
            JSON,
            "compensation",
            f"is {first.compensation!r} in one and {second.compensation!r} in the other",
            "calibrate both with the same compensation",
        )
    tokens = [max(int(p.provenance.get("tokens", 1)), 1) for p in (first, second)]
    weight = tokens[0] / sum(tokens)
    scaled = dense_ends(second.dense_steps, second.dense_last_steps, second.steps, first.steps)
    ends = [*map(max, (first.dense_steps, first.dense_last_steps), scaled)]
    made = {"merged": [first.provenance, second.provenance], "tokens": sum(tokens)}
    if component := first.provenance.get("component"):  # one model, so one transformer of its pipeline
        made["component"] = component
    return Profile(
        first.model,
        {
            name: _merge_layer(name, layer, second.layers[name], weight)
            for name, layer in first.layers.items()
        },
        first.compensation,
        dense_steps=ends[0],
        dense_last_steps=ends[1],
        steps=first.steps,
        provenance=made,
    )


def _merge_layer(name: str, a: Layer, b: Layer, weight: float) -> Layer:
    deflate = a.branch.deflate and b.branch.deflate
    factors = _merge_deflations if deflate else _merge_factors
    down, up = factors(a.branch, b.branch, weight)
    shared = a.sensitivity.keys() & b.sensitivity.keys()
    return Layer(
        a.shape,
        a.sparse and b.sparse,
        b.reason if a.sparse and (not b.sparse or a.decision is None) else a.reason,
        replace(
            a.branch,
            down=down,
            up=up,
            shift=_average(a.branch.shift, b.branch.shift, weight, 0.0),
            score=_average(a.branch.score, b.branch.score, weight, 1.0),
            dense_tokens=_merge_tokens(name, a.branch.dense_tokens, b.branch.dense_tokens),
        ),
        a.tokens,
        _average_number(a.error_before, b.error_before, weight),
        _average_number(a.error_after, b.error_after, weight),
        {key: weight * a.sensitivity[key] + (1 - weight) * b.sensitivity[key] for key in sorted(shared)},
    )


def _merge_tokens(name: str, a: int, b: int) -> int:
    """The more of the two, at the end of the sequence that both mean."""
    if a * b < 0:
        raise ProfileError(
            JSON,
            f"layers.{name}.dense_tokens",
            f"is {a} in one and {b} in the other: the first and the last tokens of a sample",
            "calibrate both with the same text rows",
        )
    return max(a, b, key=abs)


def _merge_factors(a: Branch, b: Branch, weight: float) -> tuple[Tensor | None, Tensor | None]:
    parts = [
        (w, p.down.double(), p.up.double())
        for w, p in ((weight, a), (1 - weight, b))
        if p.down is not None and p.up is not None
    ]
    if not parts:
        return None, None
    rank = max(a.rank, b.rank)
    down = torch.cat([d for _, d, _ in parts])  # (R₁ + R₂, K)
    up = torch.cat([w * u for w, _, u in parts], dim=1)  # (N, R₁ + R₂)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    left, singular, right = torch.linalg.svd(r_up @ r_down.T)
    root = singular[:rank].sqrt()
    return (root[:, None] * (right[:rank] @ q_down.T)).float(), ((q_up @ left[:, :rank]) * root).float()


def _merge_deflations(a: Branch, b: Branch, weight: float) -> tuple[Tensor | None, Tensor | None]:
    assert a.down is not None
    assert b.down is not None
    assert a.up is not None
    assert b.up is not None
    stacked = torch.cat([weight**0.5 * a.down.double(), (1 - weight) ** 0.5 * b.down.double()])
    down = torch.linalg.svd(stacked, full_matrices=False)[2][: max(a.rank, b.rank)]
    up = weight * a.up.double() @ (a.down.double() @ down.T)
    up = up + (1 - weight) * b.up.double() @ (b.down.double() @ down.T)
    return down.float().contiguous(), up.float()


def _average(a: Tensor | None, b: Tensor | None, weight: float, absent: float) -> Tensor | None:
    if a is None and b is None:
        return None
    present = a if a is not None else b
    assert present is not None
    a, b = (torch.full_like(present, absent) if v is None else v for v in (a, b))
    return weight * a + (1 - weight) * b


def _average_number(a: float | None, b: float | None, weight: float) -> float | None:
    return None if a is None or b is None else weight * a + (1 - weight) * b


def _branch_distance(a: Branch, b: Branch) -> float:
    if a.deflate != b.deflate:
        return 1.0
    apart = _distance(
        *(None if p.down is None or p.up is None else p.up.float() @ p.down.float() for p in (a, b))
    )
    if a.deflate and a.down is not None and b.down is not None:
        first, second = a.down.float(), b.down.float()
        # ‖A₁ᵀA₁ − A₂ᵀA₂‖² from the small products: K×K may be large
        norms = [float((down @ down.T).square().sum()) for down in (first, second)]
        both = float((first @ second.T).square().sum())
        apart = max(apart, (max(norms[0] + norms[1] - 2 * both, 0.0) / max(*norms, 1e-30)) ** 0.5)
    return apart


def _distance(a: Tensor | None, b: Tensor | None) -> float:
    norms = [0.0 if t is None else float(t.norm()) for t in (a, b)]
    if max(norms) == 0:
        return 0.0
    return 1.0 if a is None or b is None else float((a - b).norm()) / max(norms)


def _same_model(first: Profile, second: Profile) -> None:
    if first.model != second.model or first.layers.keys() != second.layers.keys():
        raise ProfileError(
            JSON,
            "model",
            f"the profiles are of different models or weights ({first.model.model}, {second.model.model})",
            "compare and merge profiles of one model only",
        )
    for name, layer in first.layers.items():
        if layer.shape != second.layers[name].shape:
            raise ProfileError(
                JSON, f"layers.{name}.shape", "differs between the profiles", "calibrate both again"
            )
