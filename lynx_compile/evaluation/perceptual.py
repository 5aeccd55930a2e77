"""Learned metrics for machines that can fetch their weights: FID, CLIP score, CLIP-IQA and ImageReward.

The first three are torchmetrics' own, the last comes from the package `image-reward`. Each is loaded on
request; one whose package or weights are missing is refused by name, and the others run without it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BATCH = 64
Scorer = Callable[[Tensor, Sequence[str]], float]  # pictures (P, 3, H, W) in [0, 1], their prompts → a figure


class Unavailable(RuntimeError):
    """A metric cannot run here: which, what it misses, and what to do."""


@dataclass(frozen=True)
class _Source:
    """module of package: what `pip install` fetches.  weights: what the metric downloads on first use."""

    module: str
    package: str
    weights: str
    load: Callable[[torch.device, Tensor | None], Scorer]


def load_scorer(name: str, device: torch.device | str, real: Tensor | None = None) -> Scorer:
    """A metric by its name in METRICS. real: (M, 3, H, W) in [0, 1], what FID compares with.

    Raises ValueError for an unknown name, Unavailable when a package, weights or real pictures are missing.
    """
    if name not in METRICS:
        raise ValueError(f"metric {name!r} is unknown; metrics are {', '.join(METRICS)}")
    source = METRICS[name]
    if importlib.util.find_spec(source.module) is None:
        raise Unavailable(f"{name} needs a package: pip install {source.package}")
    try:
        return source.load(torch.device(device), real)
    except Unavailable:
        raise
    except Exception as error:  # whatever a download raises: OSError, URLError, the hub's own errors
        reason = str(error).strip().split("\n")[0]
        raise Unavailable(
            f"{name}: its weights are missing ({source.weights}) and could not be fetched: "
            f"{type(error).__name__}: {reason}. Run once where they can be, and keep the cache"
        ) from error


def load_scorers(
    names: Sequence[str], device: torch.device | str, real: Tensor | None, missing: Callable[[str], None]
) -> dict[str, Scorer]:
    """The metrics that can run; `missing` is told why each of the others cannot."""
    found = {}
    for name in names:
        try:
            found[name] = load_scorer(name, device, real)
        except Unavailable as error:
            missing(str(error))
    return found


def _fid(device: torch.device, real: Tensor | None) -> Scorer:
    from torchmetrics.image.fid import FrechetInceptionDistance

    if real is None:
        raise Unavailable("fid compares with real pictures, and there are none: give --real ARCHIVE")
    metric = FrechetInceptionDistance(normalize=True, reset_real_features=False).to(device)
    for part in real.split(BATCH):
        metric.update(part.to(device), real=True)

    def score(pictures: Tensor, _prompts: Sequence[str]) -> float:
        metric.reset()
        for part in pictures.split(BATCH):
            metric.update(part.to(device), real=False)
        return float(metric.compute())

    return score


def _clip_score(device: torch.device, _real: Tensor | None) -> Scorer:
    from torchmetrics.multimodal import CLIPScore

    metric: Any = CLIPScore(model_name_or_path="openai/clip-vit-base-patch16").to(device)

    def score(pictures: Tensor, prompts: Sequence[str]) -> float:
        metric.reset()
        for start in range(0, len(pictures), BATCH):
            part = pictures[start : start + BATCH].to(device)
            metric.update((part * 255).round().to(torch.uint8), list(prompts[start : start + BATCH]))
        return float(metric.compute())

    return score


def _clip_iqa(device: torch.device, _real: Tensor | None) -> Scorer:
    from torchmetrics.multimodal import CLIPImageQualityAssessment

    metric: Any = CLIPImageQualityAssessment(model_name_or_path="clip_iqa", data_range=1.0).to(device)

    def score(pictures: Tensor, _prompts: Sequence[str]) -> float:
        metric.reset()
        for part in pictures.split(BATCH):
            metric.update(part.to(device).float())
        return float(metric.compute().mean())

    return score


def _image_reward(device: torch.device, _real: Tensor | None) -> Scorer:
    import ImageReward
    from PIL import Image

    model = ImageReward.load("ImageReward-v1.0", device=device)

    def score(pictures: Tensor, prompts: Sequence[str]) -> float:
        pixels = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
        with torch.inference_mode():
            rewards = [
                float(model.score(prompt, Image.fromarray(picture.numpy())))
                for picture, prompt in zip(pixels, prompts, strict=True)
            ]
        return sum(rewards) / max(len(rewards), 1)

    return score


METRICS: Mapping[str, _Source] = {
    "fid": _Source("torch_fidelity", "torch-fidelity", "the Inception-v3 of torch-fidelity", _fid),
    "clip-score": _Source("transformers", "transformers", "openai/clip-vit-base-patch16", _clip_score),
    "clip-iqa": _Source("piq", "piq", "the CLIP of CLIP-IQA, by piq", _clip_iqa),
    "image-reward": _Source("ImageReward", "image-reward", "ImageReward-v1.0", _image_reward),
}
