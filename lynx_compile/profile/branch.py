"""What stands beside one sparse linear layer, and the layer's forward with it in plain PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime import kernels, ops, semantics


@dataclass(frozen=True, eq=False)
class Branch:
    """What stands beside one sparse linear layer (N, K); everything absent is left out of the semantics.

    down: A, (R, K).  up: B, (N, R).  shift: μ, (K,).  score: c, (K,).  dense_tokens: how many leading tokens
    of each sample (B, T, K) stay dense, below 0 how many of its last: the text of a joint sequence.
    deflate: all of A is taken out of X before pruning; W·Aᵀ, which carries it, is added to B where the layer
    runs (`carrying`), so that A and B are a LoRA branch beside the dense layer in either case.  Called with
    (module, x), it is the layer's forward as `runtime.semantics` defines it.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    shift: Tensor | None = None
    score: Tensor | None = None
    compensation: str = "norm"
    dense_tokens: int = 0
    deflate: bool = False

    @property
    def rank(self) -> int:
        return 0 if self.down is None else self.down.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Branch:
        """The same on a device and rounded to the dtype it runs in."""
        tensors = {name: getattr(self, name) for name in ("down", "up", "shift", "score")}
        moved: dict[str, Any] = {n: None if t is None else t.to(device, dtype) for n, t in tensors.items()}
        return replace(self, **moved)

    @property
    def deflated(self) -> int:
        """How many rows of A are taken out of X, as the ops ask."""
        return self.rank if self.deflate else 0

    def carrying(self, weight: Tensor) -> Tensor:
        """(N, R) fp32 (fp64 for fp64 weights): B, plus W·Aᵀ under deflation.

        Raises ValueError without a branch.
        """
        if self.down is None or self.up is None:
            raise ValueError("a branch without down and up carries nothing")
        acc = semantics.compute_dtype(weight.dtype)
        up = self.up.to(acc)
        return up + weight.to(acc) @ self.down.to(acc).T if self.deflate else up

    def _up(self, weight: Tensor) -> Tensor | None:
        return None if self.down is None else self.carrying(weight).to(weight.dtype)

    def __call__(self, module: nn.Linear, x: Tensor) -> Tensor:
        y = self._kernels(module, x) if self._has_kernels(x) else self._definition(module, x)
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        if self.dense_tokens and x.dim() == 3:
            y = semantics.with_dense_tokens(y, x, module.weight, module.bias, self.dense_tokens)
        return y

    def _has_kernels(self, x: Tensor) -> bool:
        return not torch.is_grad_enabled() and kernels.unavailable_reason(x.device, x.dtype) is None

    def _kernels(self, module: nn.Linear, x: Tensor) -> Tensor:
        values, metadata, scale, t = ops.sparsify(
            "identity",
            [x],
            shift=self.shift,
            score=self.score,
            lora_down=self.down,
            compensation=self.compensation,
            deflated=self.deflated,
        )
        bias, up = folded_bias(module, self.shift), self._up(module.weight)
        return ops.sparse_linear(values, metadata, scale, t, module.weight, lora_up=up, bias=bias)

    def _definition(self, module: nn.Linear, x: Tensor) -> Tensor:
        with exact_products(x.dtype):
            pruned, _, scale, t = semantics.sparsify(
                x.reshape(-1, x.shape[-1]),
                shift=self.shift,
                score=self.score,
                lora_down=self.down,
                compensation=self.compensation,
                deflated=self.deflated,
            )
            bias = folded_bias(module, self.shift)
            # The root's slope is infinite at an all-zero row, so no gradient goes through the scale.
            scale = scale.detach()
            up = self._up(module.weight)
            return semantics.sparse_linear(pruned, scale, t, module.weight, lora_up=up, bias=bias)


def folded_bias(module: nn.Linear, shift: Tensor | None) -> Tensor | None:
    """b + W·μ, (N,), rounded once: the bias of a layer that reads x − μ."""
    if shift is None:
        return module.bias
    acc = semantics.compute_dtype(module.weight.dtype)
    moved = module.weight.to(acc) @ shift.to(acc)
    return (moved if module.bias is None else moved + module.bias.to(acc)).to(module.weight.dtype)


@contextlib.contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """On a GPU, fp32 products of 16-bit numbers are exact in TF32, which is fast there: allow it."""
    if dtype not in (torch.bfloat16, torch.float16) or not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
