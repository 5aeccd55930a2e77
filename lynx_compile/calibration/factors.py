"""What training changes: A, B and shift of branches as parameters, shared where they were shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..profile.branch import Branch

_NAMES = ("down", "up", "shift")


class Factors:
    """Trainable fp32 copies on `device`. Layers that hold one tensor object train one parameter.

    trained: the branches with the parameters in them.  parameters: all of them, each once.
    """

    def __init__(self, start: Mapping[str, Branch], device: torch.device | str) -> None:
        self._start = start
        tensors = [getattr(branch, name) for branch in start.values() for name in _NAMES]
        given = {id(tensor): tensor for tensor in tensors if tensor is not None}
        self._copies = {
            key: nn.Parameter(t.detach().to(device, torch.float32, copy=True)) for key, t in given.items()
        }
        self.parameters = list(self._copies.values())
        self.trained = self._with(self._copies)

    def branches(self) -> dict[str, Branch]:
        """The branches as they are now, for good."""
        return self._with({key: parameter.detach().clone() for key, parameter in self._copies.items()})

    def _with(self, tensors: Mapping[int, Tensor]) -> dict[str, Branch]:
        changed = {}
        for name, branch in self._start.items():
            own = {key: getattr(branch, key) for key in _NAMES}
            new: dict[str, Any] = {key: tensors[id(t)] for key, t in own.items() if t is not None}
            changed[name] = replace(branch, **new)
        return changed
