"""How wrong each linear layer becomes when its input is pruned, on the inputs of a real run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime import semantics

ROWS = 256  # tokens of one call that are looked at, spread evenly over the batch


class LayerErrors:
    """Relative error ‖ŷ − y‖ / ‖y‖ of every linear layer's product y = x · Wᵀ, over all observed calls.

    The model computes the dense layer throughout, so an error here is the layer's own and not what earlier
    layers passed on.
    """

    def __init__(self) -> None:
        self._wrong: dict[str, dict[str, float]] = {}
        self._total: dict[str, float] = {}

    @contextmanager
    def observing(self, model: nn.Module) -> Iterator[None]:
        """Observe an uncompiled model's calls inside the block."""
        hooks = [
            module.register_forward_pre_hook(self._reader(name))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.in_features % semantics.GROUP == 0
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def relative(self) -> dict[str, dict[str, float]]:
        """{layer: {compensation: ‖ŷ − y‖ / ‖y‖}} of the layers whose product was not zero throughout."""
        return {
            name: {key: (wrong / total) ** 0.5 for key, wrong in self._wrong[name].items()}
            for name, total in self._total.items()
            if total > 0
        }

    def _reader(self, name: str) -> Any:
        def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(module, nn.Linear)
            self._add(name, args[0], module.weight)

        return read

    @torch.no_grad()
    def _add(self, name: str, x: Tensor, weight: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        rows = rows[:: max(len(rows) // ROWS, 1)].contiguous()
        exact = rows.float() @ weight.float().T
        self._total[name] = self._total.get(name, 0.0) + exact.square().sum().item()
        wrong = self._wrong.setdefault(name, dict.fromkeys(semantics.COMPENSATIONS, 0.0))
        for compensation in semantics.COMPENSATIONS:
            pruned, _, scale, t = semantics.sparsify(rows, compensation=compensation)
            got = semantics.sparse_linear(pruned, scale, t, weight)
            wrong[compensation] += (got.float() - exact).square().sum().item()
