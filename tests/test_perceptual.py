"""FID, CLIP score, CLIP-IQA, ImageReward: driven where their weights are, named where they are missing."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lynx_compile.evaluation import perceptual
from lynx_compile.evaluation.perceptual import METRICS, Unavailable, load_scorer, load_scorers
from tests.test_evaluation import small_study

PICTURES = torch.linspace(0, 1, 5 * 3 * 16).reshape(5, 3, 4, 4)
PROMPTS = [f"prompt {i}" for i in range(5)]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every metric's package were there; their classes are replaced below."""
    found = importlib.util.find_spec
    modules = {source.module for source in METRICS.values()}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: object() if name in modules else found(name, *rest)
    )
    monkeypatch.setattr(perceptual, "BATCH", 2)


class Recorder:
    """A torchmetrics metric that keeps what it is told; its figure is the mean of the pictures."""

    def __init__(self, **options: Any) -> None:
        self.options, self.calls = options, []

    def to(self, device: torch.device) -> Recorder:
        return self

    def reset(self) -> None:
        self.calls = [call for call in self.calls if call[2].get("real")]

    def update(self, pictures: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        self.calls.append((pictures, args, kwargs))

    def compute(self) -> torch.Tensor:
        return torch.cat(
            [pictures.double() for pictures, _, kwargs in self.calls if not kwargs.get("real")]
        ).mean()


def test_fid_sees_all_pictures_in_batches(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchmetrics.image.fid as module

    made: list[Recorder] = []
    monkeypatch.setattr(
        module, "FrechetInceptionDistance", lambda **options: made.append(Recorder(**options)) or made[-1]
    )
    score = load_scorer("fid", "cpu", real=PICTURES[:3])
    assert made[0].options["normalize"] is True  # pictures are floats in [0, 1]
    for _ in range(2):  # the real pictures stay, the generated ones are those of this call
        assert score(PICTURES, PROMPTS) == pytest.approx(0.5)
        assert [len(pictures) for pictures, _, _ in made[0].calls] == [2, 1, 2, 2, 1]
    with pytest.raises(Unavailable, match="none: give --real"):
        load_scorer("fid", "cpu")


def test_clip_metrics_get_bytes_and_prompts(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchmetrics.multimodal as module

    made: list[Recorder] = []
    build = lambda **options: made.append(Recorder(**options)) or made[-1]  # noqa: E731
    monkeypatch.setattr(module, "CLIPScore", build, raising=False)
    monkeypatch.setattr(module, "CLIPImageQualityAssessment", build, raising=False)
    assert load_scorer("clip-score", "cpu")(PICTURES, PROMPTS) == pytest.approx(127.5, abs=0.5)
    assert {pictures.dtype for pictures, _, _ in made[0].calls} == {torch.uint8}
    assert [args[0] for _, args, _ in made[0].calls] == [PROMPTS[:2], PROMPTS[2:4], PROMPTS[4:]]
    assert load_scorer("clip-iqa", "cpu")(PICTURES, PROMPTS) == pytest.approx(0.5)
    assert made[1].options["data_range"] == 1.0


def test_image_reward_is_a_mean_over_pairs(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Reward:
        def score(self, prompt: str, picture: Any) -> float:
            seen.append((prompt, picture.size))
            return float(prompt[-1])

    package: Any = types.ModuleType("ImageReward")
    package.load = lambda name, device: Reward()
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    assert load_scorer("image-reward", "cpu")(PICTURES, PROMPTS) == 2.0
    assert seen == [(prompt, (4, 4)) for prompt in PROMPTS]


@pytest.mark.parametrize("name", METRICS)
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    missing = METRICS[name].module
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *rest: None if module == missing else found(module, *rest)
    )
    with pytest.raises(Unavailable, match=f"{name} needs a package: pip install {METRICS[name].package}"):
        load_scorer(name, "cpu", PICTURES)


def unreachable(*_: object, **__: object) -> Callable[..., Any]:
    raise OSError("We couldn't connect to the hub\nsecond line")


def test_missing_weights_are_named_and_the_rest_runs(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchmetrics.multimodal as module

    monkeypatch.setattr(module, "CLIPScore", unreachable, raising=False)
    monkeypatch.setattr(module, "CLIPImageQualityAssessment", Recorder, raising=False)
    told: list[str] = []
    scorers = load_scorers(["clip-score", "clip-iqa"], "cpu", None, told.append)
    assert list(scorers) == ["clip-iqa"]
    assert told == [
        "clip-score: its weights are missing (openai/clip-vit-base-patch16) and could not be fetched: "
        "OSError: We couldn't connect to the hub. Run once where they can be, and keep the cache"
    ]
    with pytest.raises(ValueError, match="metric 'clip' is unknown; metrics are fid, clip-score"):
        load_scorers(["clip"], "cpu", None, told.append)


def test_scores_stand_in_the_rows() -> None:
    asked: list[int] = []

    def brightness(pictures: torch.Tensor, prompts: list[str]) -> float:
        asked.append(len(prompts))
        assert len(pictures) == len(prompts)
        return float(pictures.mean())

    study = small_study(stages=["ladder"], scorers={"clip-score": brightness})
    rows = [row.to_json() for row in study.run().rows]
    assert all(0 < row["clip_score"] < 1 for row in rows)
    assert asked == [6] * len(rows)
