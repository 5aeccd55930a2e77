"""Run chosen linear layers of a model as `runtime.semantics` defines them, in plain eager PyTorch.

Calibration, sensitivity runs and quality studies use this instead of the compiled path: nothing is compiled,
any device does, and the numbers are those of `torch.compile(..., options={"emulate": True})` within rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from ..profile.fingerprint import linear_layers
from ..profile.steps import StepSwitch

Forward = Callable[[nn.Linear, Tensor], Tensor]


@contextlib.contextmanager
def emulate(
    model: nn.Module, layers: Mapping[str, Forward], steps: StepSwitch | None = None
) -> Iterator[None]:
    """Inside, the named linear layers of `model` compute `layers[name](module, x)`.

    While `steps.dense` is set they are the plain layers. Raises KeyError for a name that is no linear layer
    of `model`. The model is as before afterwards, also after an error.
    """
    linears = linear_layers(model)
    unknown = [name for name in layers if name not in linears]
    if unknown:
        raise KeyError(f"{type(model).__name__} has no linear layer {unknown[0]!r}")
    chosen = [linears[name] for name in layers]
    before = [vars(module).get("forward") for module in chosen]  # what offloading put there
    try:
        for module, forward in zip(chosen, layers.values(), strict=True):
            module.forward = _switched(module, forward, steps or StepSwitch())  # type: ignore[method-assign,assignment]
        yield
    finally:
        for module, replaced in zip(chosen, before, strict=True):
            vars(module).pop("forward", None)
            if replaced is not None:
                vars(module)["forward"] = replaced


def _switched(module: nn.Linear, forward: Forward, steps: StepSwitch) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        return F.linear(x, module.weight, module.bias) if steps.dense else forward(module, x)

    return run
