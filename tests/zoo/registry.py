"""Where the tiny models are registered, and the inputs they share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers.models.transformers
import torch
from torch import Tensor, nn

Entry = tuple[dict[str, Any], dict[str, Any]]
ZOO: dict[str, Callable[[], Entry]] = {}


def transformer_classes() -> dict[str, type[nn.Module]]:
    """Every model that diffusers.models.transformers exports."""
    exported = sorted(vars(diffusers.models.transformers).items())
    return {name: cls for name, cls in exported if inspect.isclass(cls) and issubclass(cls, nn.Module)}


def build(
    name: str, dtype: torch.dtype = torch.float32, **overrides: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """The tiny model in eval mode and its keyword inputs, both from a fixed seed.

    overrides: of the config, as num_layers=1.
    Parameters that start at zero (gates, final projections) get noise: a block whose output is multiplied by
    zero would pass every comparison.
    """
    torch.manual_seed(0)
    config, inputs = ZOO[name]()
    model = transformer_classes()[name](**{**config, **overrides}).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    # diffusers' own `to` keeps some modules in fp32 and warns
    return nn.Module.to(model, dtype), {key: _cast(value, dtype) for key, value in inputs.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, dtype) for item in value)
    return {key: _cast(item, dtype) for key, item in value.items()} if isinstance(value, dict) else value


def entry(*names: str) -> Callable[[Callable[[str], Entry]], Callable[[str], Entry]]:
    """Registers one builder for classes that share an interface; it is called with the class's name."""

    def register(builder: Callable[[str], Entry]) -> Callable[[str], Entry]:
        for name in names:
            ZOO[name] = lambda name=name: builder(name)
        return builder

    return register


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape)


def steps(batch: int = 1) -> Tensor:
    return torch.randint(0, 1000, (batch,))


def grid_ids(height: int, width: int, axes: int = 3) -> Tensor:
    """(height · width, axes) position ids, the last two image axes counting rows and columns."""
    ids = torch.zeros(height, width, axes)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return ids.flatten(0, 1)
