"""How far two sets of samples of the same seeds are apart: PSNR, SSIM, relative error, with intervals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_PSNR = 100.0  # of identical pictures


@dataclass(frozen=True)
class Mean:
    """A mean over prompts and its 95% confidence interval (normal approximation of the mean's error)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Mean:
        values = values.double().cpu()
        spread = 1.96 * float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
        mean = float(values.mean())
        return cls(mean, mean - spread, mean + spread)


@dataclass(frozen=True)
class Distance:
    """To the dense model's pictures, same seeds. psnr in dB; error: ‖x − x̂‖ / ‖x‖ of final latents."""

    psnr: Mean
    ssim: Mean
    error: Mean


def distance(latents: Tensor, dense_latents: Tensor, pictures: Tensor, dense_pictures: Tensor) -> Distance:
    """latents: (P, ...). pictures: (P, 3, H, W) in [0, 1]; pairs stand at the same index."""
    return Distance(
        Mean.of(psnr(pictures, dense_pictures)),
        Mean.of(ssim(pictures, dense_pictures)),
        Mean.of(relative_error(latents, dense_latents)),
    )


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """(P,) dB for pictures in [0, 1]."""
    mse = (pictures.float() - reference.float()).square().flatten(1).mean(1)
    return (-10 * mse.clamp_min(10 ** (-MAX_PSNR / 10)).log10()).clamp_max(MAX_PSNR)


def ssim(pictures: Tensor, reference: Tensor, batch: int = 256) -> Tensor:
    """(P,) structural similarity, torchmetrics' with its defaults."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = []
    for a, b in zip(pictures.float().split(batch), reference.float().split(batch), strict=True):
        value = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
        assert isinstance(value, Tensor)
        values.append(value.reshape(-1))
    return torch.cat(values)


def relative_error(latents: Tensor, reference: Tensor) -> Tensor:
    """(P,) ‖x̂ − x‖ / ‖x‖."""
    difference = (latents.float() - reference.float()).flatten(1).norm(dim=1)
    return difference / reference.float().flatten(1).norm(dim=1).clamp_min(1e-12)
