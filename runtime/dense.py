"""What `linears` runs below the break-even: the layers without pruning, as the model has them.

Few tokens take little time on the GPU, so the host's part counts: each step here is one launch of torch's own
in the dtype of X, where the definition (`semantics`) computes in fp32 op by op and takes a dozen. So X is
rounded behind the norm and again behind the modulation, as in a model that runs eager.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .semantics import ACTIVATIONS


def produce(producer: str, inputs: Sequence[Tensor | None], eps: float, mult_offset: float) -> Tensor:
    """X, (M, K), of `semantics.produce`. Raises ValueError for an unknown producer."""
    rows = [None if t is None else t.reshape(-1, t.shape[-1]) for t in inputs]
    first = rows[0]
    assert first is not None, "a producer's first input is a tensor"
    if producer == "identity":
        return first
    if producer in ACTIVATIONS:
        return ACTIVATIONS[producer](first)
    if producer in ("layer_norm", "rms_norm"):
        return _normalized(producer, rows, eps, mult_offset).to(first.dtype)
    second = rows[1]
    assert second is not None, f"{producer!r} takes two tensors"
    if producer.endswith("_mul"):
        return ACTIVATIONS[producer.removesuffix("_mul")](first) * second
    if producer.startswith("cat"):
        activation = ACTIVATIONS[producer.removeprefix("cat").removeprefix("_") or "none"]
        return torch.cat([first, activation(second)], -1)
    raise ValueError(f"unknown producer {producer!r}")


def _normalized(producer: str, rows: Sequence[Tensor | None], eps: float, mult_offset: float) -> Tensor:
    x, weight, bias, mult, add = rows
    assert x is not None
    shape = x.shape[-1:]
    weight, bias = (None if t is None else t.reshape(shape) for t in (weight, bias))
    inside = all(t is None or t.dtype == x.dtype for t in (weight, bias))  # else torch's norms refuse them
    if producer == "layer_norm":
        out = F.layer_norm(x, shape, weight if inside else None, bias if inside else None, eps)
    else:
        out = F.rms_norm(x, shape, weight if inside else None, eps)
    if not inside or producer == "rms_norm":
        out = out if weight is None or inside else out * weight
        out = out if bias is None else out + bias
    if mult is not None and mult_offset:
        mult = mult + mult_offset
    return scaled(out, mult, add)


def scaled(x: Tensor, mult: Tensor | None, add: Tensor | None) -> Tensor:
    """x · mult + add for x (M, C).

    mult, add: S·C elements, one row for the M / S rows of a sample, each with an S of its own. Raises
    ValueError if an S does not divide M.
    """
    m, channels = x.shape
    if not m:
        return x
    both = [t if t is None else t.reshape(-1, 1, channels) for t in (mult, add)]
    counts = {t.shape[0] for t in both if t is not None} - {1}
    if len(counts) > 1:
        return scaled(scaled(x, mult, None), None, add)
    samples = counts.pop() if counts else 1
    if samples == 0 or m % samples:
        raise ValueError(
            f"{samples} samples cannot share M = {m} rows evenly; give one row of channels a sample"
        )
    mult, add = both
    x = x.reshape(samples, m // samples, channels)
    if mult is not None and add is not None:
        x = torch.addcmul(add, x, mult)
    elif mult is not None:
        x = x * mult
    elif add is not None:
        x = x + add
    return x.reshape(m, channels)


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    branches: Sequence[tuple[Tensor, Tensor]] = (),
    bias: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y (M, N) = residual + gate · act(X · Wᵀ + b + Σ X · Aᵀ · Bᵀ).

    x: (M, K). weight: (N, K). branches: (A (R, K), B (N, R)) of the user's adapters. bias: (N,).
    gate: S·N elements, one row a sample. residual: M·N elements. Absent terms are left out.
    """
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    for down, up in branches:
        y = y + F.linear(F.linear(x, down), up)
    y = ACTIVATIONS[activation](y)
    if gate is not None and residual is not None and gate.numel() == gate.shape[-1]:
        y = torch.addcmul(residual.reshape(y.shape), y, gate.reshape(1, -1))
    else:
        y = y if gate is None else scaled(y, gate, None)
        y = y if residual is None else y + residual.reshape(y.shape)
    return y.to(x.dtype)
