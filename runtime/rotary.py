"""`rt_lynx::rotary`: what stands between the projections of Q and K and attention, in one pass over each.

Each part x of a joint sequence is (B, T, H, D), D channels of H heads. The op normalises the heads, rotates
neighbouring channels by the token's angles, and joins the parts along the tokens:

    n      = x · rsqrt(mean(x², -1) + eps) · weight            eps < 0: no norm;  weight (D,) or None: 1
    y_2i   = n_2i · cos_i,0 − n_2i+1 · sin_i,0                 cos, sin: (B or 1, T, D/2, 1 or 2);
    y_2i+1 = n_2i+1 · cos_i,1 + n_2i · sin_i,1                 a last size of 1 serves both channels
    out    = concatenation of the parts' y, (B, ΣT, H, D)

Arithmetic is fp32 (fp64 for fp64), rounded to x's dtype once. As with the ops of `ops.py`, the implementation
here runs anywhere and `kernels` has the one for GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import semantics
from .ops import NAMESPACE, VERSION

CHANNELS = (16, 32, 64, 128, 256)  # of a head, that kernels take: 8 a lane, whole heads a warp

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(
    "rotary(Tensor[] parts, Tensor?[] weights, float[] eps, Tensor[] cos, Tensor[] sin, "
    f"int version={VERSION}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def rotated(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """y of one part, (B, T, H, D) in x's dtype."""
    acc = semantics.compute_dtype(x.dtype)
    n = x.to(acc)
    if eps >= 0:
        n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        n = n * weight.to(acc)
    even, odd = n.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.to(acc)[:, :, None], sin.to(acc)[:, :, None]
    turned = even * cos[..., 0] - odd * sin[..., 0], odd * cos[..., -1] + even * sin[..., -1]
    return torch.stack(turned, -1).flatten(-2).to(x.dtype)


def _rotary_reference(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    eps: Sequence[float],
    cos: Sequence[Tensor],
    sin: Sequence[Tensor],
    version: int = VERSION,
) -> Tensor:
    return torch.cat([rotated(*part) for part in zip(parts, weights, eps, cos, sin, strict=True)], 1)


def _rotary_fake(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    eps: Sequence[float],
    cos: Sequence[Tensor],
    sin: Sequence[Tensor],
    version: int = VERSION,
) -> Tensor:
    samples, tokens, heads, channels = parts[0].shape
    for part in parts[1:]:
        tokens = tokens + part.shape[1]
    return parts[0].new_empty((samples, tokens, heads, channels))


_library.impl("rotary", _rotary_reference, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::rotary", _rotary_fake, lib=_library)

rotary = torch.ops.rt_lynx.rotary.default
