"""Recognise a model: its linear layers' names and shapes, and a sample of their weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SAMPLES = 64  # elements of each weight that enter the hash: a 12-billion-parameter model takes a second


@dataclass(frozen=True)
class Fingerprint:
    """model: its class. structure: SHA-256 of names and shapes. weights: of sampled weights in bf16."""

    model: str
    structure: str
    weights: str


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer of the model itself by name, without LoRA adapters injected by PEFT on top of it."""
    layers = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if isinstance(module, nn.Linear) and not any(part.startswith("lora_") for part in parts):
            layers[".".join(part for part in parts if part not in ("base_layer", "_orig_mod"))] = module
    return layers


def fingerprint(model: nn.Module) -> Fingerprint:
    """The same for the same weights in bf16, fp16 or fp32 up to bf16 rounding, on any device."""
    structure, weights = hashlib.sha256(), hashlib.sha256()
    for name, module in sorted(linear_layers(model).items()):
        structure.update(f"{name}:{module.out_features}x{module.in_features}\n".encode())
        weights.update(_sample(module.weight))
    original = getattr(model, "_orig_mod", model)
    return Fingerprint(type(original).__name__, structure.hexdigest(), weights.hexdigest())


def _sample(weight: Tensor) -> bytes:
    flat = weight.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64)
    values = flat[index.long().to(flat.device)]
    return values.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()
