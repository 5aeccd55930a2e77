"""`rt_lynx::residual_norm`: a normalised, gated output of attention or MLP onto the residual, in one pass.

    y = residual + RMS(x) · weight · (mult + mult_offset)          weight (C,), mult one row of C a sample

x and residual are (…, C), of one shape and dtype; weight and mult may be None. Arithmetic is fp32 (fp64 for
fp64), rounded to x's dtype once. As with the ops of `ops.py`, the implementation here runs anywhere and
`kernels` has the one for GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import semantics
from .ops import NAMESPACE, VERSION

CHANNELS = range(8, 6144 + 1, 8)  # of a row, that kernels take: 8 a thread at a time, a row a block

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(
    "residual_norm(Tensor x, Tensor? weight, Tensor? mult, Tensor residual, float eps, "
    f"float mult_offset=0.0, int version={VERSION}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def _residual_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    mult: Tensor | None,
    residual: Tensor,
    eps: float,
    mult_offset: float = 0.0,
    version: int = VERSION,
) -> Tensor:
    acc = semantics.compute_dtype(x.dtype)
    inputs = [None if t is None else t.to(acc) for t in (x, weight, None, mult, None)]
    normed = semantics.produce("rms_norm", inputs, eps, mult_offset)
    return (residual.to(acc) + normed.reshape(residual.shape)).to(x.dtype).contiguous()


def _residual_norm_fake(
    x: Tensor,
    weight: Tensor | None,
    mult: Tensor | None,
    residual: Tensor,
    eps: float,
    mult_offset: float = 0.0,
    version: int = VERSION,
) -> Tensor:
    return residual.new_empty(residual.shape)


_library.impl("residual_norm", _residual_norm_reference, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::residual_norm", _residual_norm_fake, lib=_library)

residual_norm = torch.ops.rt_lynx.residual_norm.default
