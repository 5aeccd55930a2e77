"""The method in plain PyTorch: the one definition every kernel, op and pass is tested against.

Notation, used everywhere in this project:

    X   (M, K)  activations: M tokens, K input channels
    W   (N, K)  weight, row-major as in `torch.nn.Linear`
    A   (R, K)  LoRA down-projection,   B (N, R) LoRA up-projection

    z    = x − μ                       μ: shift (default 0), per channel or per sample and channel; the caller
                                       folds W·μ into b
    q    = |z| · c                     c: per-channel score (default 1)
    keep = top-2 of q in each group of 4 neighbours along K; ties go to the lower index
    z̃    = z where kept, else 0
    s    = sqrt(Σ z² / (Σ z̃² + 1e-8))  one per row   (compensation "norm"; 1 for "native")
    y    = s · (z̃ · Wᵀ) + t · Bᵀ + b   b: bias per channel, or per sample and channel

What may hold one row a sample (μ, b, adaLN's mult and add, the gate) comes in any shape of S·K or S·N
elements; row i of M belongs to sample i // (M / S).

Deflation (D > 0) takes X's leading directions out before pruning: they cross the layer densely through the
branch, and only what is left of X is pruned. It needs no further product: t is the branch's anyway.

Arithmetic is fp32 for bf16, fp16 and fp32 inputs and fp64 for fp64 inputs; x₀, z, z̃, t and y are rounded to
X's dtype once each. A NaN or Inf in row i may poison row i, never another row: a NaN score counts as +Inf, so
the non-finite value is kept and reaches the output. An all-zero row gives exactly t · Bᵀ + b.

Source: RT-Lynx (arXiv 2605.26632): 2:4 activation sparsity, norm compensation and the LoRA branch. Shift and
deflation are ours; a dense low-rank branch that takes load off a coarse one is SVDQuant's idea (2411.05007).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 4
KEPT = 2
NORM_EPS = 1e-8
COMPENSATIONS = ("norm", "native")

ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": lambda x: F.gelu(x, approximate="none"),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}

# What may stand in front of `sparsify`, with the tensors each takes (a trailing "?" may be None).
PRODUCERS: dict[str, tuple[str, ...]] = {
    "identity": ("x",),
    **{act: ("x",) for act in ACTIVATIONS if act != "none"},
    **{f"{act}_mul": ("gate", "up") for act in ACTIVATIONS if act != "none"},
    "layer_norm": ("x", "weight?", "bias?", "mult?", "add?"),
    "rms_norm": ("x", "weight?", "bias?", "mult?", "add?"),
    "cat": ("first", "second"),
    **{f"cat_{act}": ("first", "second") for act in ACTIVATIONS if act != "none"},
}


class Sparsified(NamedTuple):
    """Result of `sparsify`, before compression.

    pruned: (M, K) in X's dtype, z̃.   keep: (M, K) bool.   scale: (M,) fp32 (fp64 for fp64 X).
    t: (M, R) in X's dtype; R = 0 without a LoRA branch.
    """

    pruned: Tensor
    keep: Tensor
    scale: Tensor
    t: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype arithmetic runs in: fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def produce(
    producer: str, inputs: Sequence[Tensor | None], eps: float = 0.0, mult_offset: float = 0.0
) -> Tensor:
    """X, (M, K): the tensor in front of the linear layer, computed in fp32 and rounded to its dtype once.

    Inputs are N-D with channels last and are flattened to rows. `mult` and `add` (adaLN modulation) hold one
    row per sample, S·K elements.

        identity            x
        <act>               act(x)
        <act>_mul           act(gate) · up
        layer_norm          (LN(x) · weight + bias) · (mult + mult_offset) + add
        rms_norm            (RMS(x) · weight + bias) · (mult + mult_offset) + add
        cat, cat_<act>      [first, act(second)] along K
    """
    x = inputs[0]
    assert x is not None, "a producer's first input is a tensor"
    acc = compute_dtype(x.dtype)
    rows = [None if t is None else t.reshape(-1, t.shape[-1]).to(acc) for t in inputs]
    first = rows[0]
    assert first is not None
    if producer == "identity":
        out = first
    elif producer in ACTIVATIONS:
        out = ACTIVATIONS[producer](first)
    elif producer.endswith("_mul"):
        assert rows[1] is not None
        out = ACTIVATIONS[producer.removesuffix("_mul")](first) * rows[1]
    elif producer.startswith("cat"):
        assert rows[1] is not None
        activation = ACTIVATIONS[producer.removeprefix("cat").removeprefix("_") or "none"]
        out = torch.cat([first, activation(rows[1])], -1)
    elif producer in ("layer_norm", "rms_norm"):
        out = _normalized(producer, rows, eps, mult_offset)
    else:
        raise ValueError(f"unknown producer {producer!r}; one of {', '.join(PRODUCERS)}")
    return out.to(x.dtype)


def _normalized(producer: str, rows: Sequence[Tensor | None], eps: float, mult_offset: float) -> Tensor:
    x, weight, bias, mult, add = rows
    assert x is not None
    if producer == "layer_norm":
        centred = x - x.mean(-1, keepdim=True)
        out = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    else:
        out = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight.reshape(-1)
    if bias is not None:
        out = out + bias.reshape(-1)
    if mult is not None:
        out = out * (_per_row(mult, out) + mult_offset)
    if add is not None:
        out = out + _per_row(add, out)
    return out


def _per_row(per_sample: Tensor, rows: Tensor) -> Tensor:
    """S rows of channels, one a sample, each repeated for its M / S consecutive rows of `rows` (M, C).

    Returns (M, C), or (1, C) for one sample. Raises ValueError when the samples do not share M evenly.
    """
    m, channels = rows.shape
    samples = per_sample.reshape(-1, channels)
    count = samples.shape[0]
    if count == 1 or count == m:
        return samples
    if count == 0 or m % count:
        raise ValueError(
            f"{count} samples cannot share M = {m} rows evenly; give one row of channels a sample"
        )
    return samples.repeat_interleave(m // count, 0)


def keep_mask(q: Tensor) -> Tensor:
    """Top-2 of q in each group of 4 along the last axis; ties to the lower index; NaN counts as +Inf.

    q: (..., K), K a multiple of 4. Returns a bool tensor of q's shape with two True a group.
    """
    a, b, c, d = torch.where(q.isnan(), torch.inf, q).unflatten(-1, (-1, GROUP)).unbind(-1)
    # Kept is what beats two of the other three; six comparisons are far cheaper than a sort of four.
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    keep = [_two_of(ab, ac, ad), _two_of(~ab, bc, bd), _two_of(~ac, ~bc, cd), _two_of(~ad, ~bd, ~cd)]
    return torch.stack(keep, dim=-1).flatten(-2)


def _two_of(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return (x & y) | (z & (x | y))


def sparsify(
    x: Tensor,
    *,
    shift: Tensor | None = None,
    score: Tensor | None = None,
    lora_down: Tensor | None = None,
    compensation: str = "norm",
    deflated: int = 0,
) -> Sparsified:
    """Prune X (M, K) to 2:4 and compute what restores it.

    shift: S·K elements, one row a sample; row i of X belongs to sample i // (M / S). score: (K,).
    lora_down: A, (R, K). compensation: "norm" or "native".
    Raises ValueError when K is not a multiple of 4 or the compensation is unknown.
    """
    if x.shape[-1] % GROUP:
        raise ValueError(f"2:4 sparsity needs K to be a multiple of {GROUP}, got K = {x.shape[-1]}")
    if compensation not in COMPENSATIONS:
        raise ValueError(f"unknown compensation {compensation!r}; one of {', '.join(COMPENSATIONS)}")
    rank = 0 if lora_down is None else lora_down.shape[0]
    if not 0 <= deflated <= rank:
        raise ValueError(f"deflated={deflated} counts leading rows of lora_down, which has {rank}")
    acc = compute_dtype(x.dtype)
    z = x if shift is None else (x.to(acc) - _per_row(shift.to(acc), x)).to(x.dtype)
    t = x.new_empty(x.shape[0], 0) if lora_down is None else (z.to(acc) @ lora_down.to(acc).T).to(x.dtype)
    if lora_down is not None and deflated:
        z = (z.to(acc) - t[:, :deflated].to(acc) @ lora_down[:deflated].to(acc)).to(x.dtype)
    q = z.to(acc).abs() if score is None else z.to(acc).abs() * score.to(acc)
    keep = keep_mask(q)
    pruned = torch.where(keep, z, torch.zeros((), dtype=z.dtype, device=z.device))
    if compensation == "norm":
        scale = (z.to(acc).square().sum(-1) / (pruned.to(acc).square().sum(-1) + NORM_EPS)).sqrt()
    else:
        scale = torch.ones(x.shape[0], dtype=acc, device=x.device)
    return Sparsified(pruned, keep, scale, t)


def split_tokens(x: Tensor, dense_tokens: int) -> tuple[Tensor, Tensor]:
    """x (S, L, …) as the tokens that stay dense and the others.

    dense_tokens: that many leading tokens of each sample are dense; below 0, that many of its last.
    """
    if dense_tokens < 0:
        return x[:, dense_tokens:], x[:, :dense_tokens]
    return x[:, :dense_tokens], x[:, dense_tokens:]


def join_tokens(dense: Tensor, others: Tensor, dense_tokens: int) -> Tensor:
    """What `split_tokens` split, in its order."""
    return torch.cat([others, dense] if dense_tokens < 0 else [dense, others], 1)


def with_dense_tokens(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dense_tokens: int) -> Tensor:
    """y (S, L, N) of a sparse layer on x (S, L, K), its dense tokens as the dense layer makes them."""
    dense, _ = split_tokens(x, dense_tokens)
    _, others = split_tokens(y, dense_tokens)
    return join_tokens(F.linear(dense, weight, bias), others, dense_tokens)


def sparse_linear(
    pruned: Tensor,
    scale: Tensor,
    t: Tensor,
    weight: Tensor,
    *,
    lora_up: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y (M, N) = residual + gate · act(s · (z̃ · Wᵀ) + t · Bᵀ + b), rounded once.

    pruned: (M, K). scale: (M,). t: (M, R). weight: (N, K). lora_up: (N, R).
    bias, gate: S·N elements, one row a sample. residual: M·N elements. Absent terms are left out.
    """
    acc = compute_dtype(pruned.dtype)
    y = scale.to(acc)[:, None] * (pruned.to(acc) @ weight.to(acc).T)
    if lora_up is not None:
        y = y + t.to(acc) @ lora_up.to(acc).T
    if bias is not None:
        y = y + _per_row(bias.to(acc), y)
    y = ACTIVATIONS[activation](y)
    if gate is not None:
        y = y * _per_row(gate.to(acc), y)
    if residual is not None:
        y = y + residual.reshape(y.shape).to(acc)
    return y.to(pruned.dtype)
