"""The quality table: every method against the dense model at the same seeds, on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.emulation import Forward, emulate
from ..calibration.workload import Workload
from ..profile.steps import StepSwitch
from .features import Kid, kid
from .methods import Method
from .metrics import Distance, distance
from .perceptual import Scorer

GAP = 4  # pixels between the pictures of a sheet
ToPictures = Callable[[Tensor], Tensor]
Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One line of `quality_*.json`. calibration_s: wall time to make the method's data.

    scores: of the metrics asked for besides, by name.  details: what else is known of the method, written
    beside the rows.
    """

    method: str
    sparse_flops_share: float
    psnr_db: float
    ssim: float
    latent_rel_err: float
    latent_rel_err_ci: tuple[float, float]
    kid: float | None
    kid_ci: tuple[float, float] | None
    calibration_s: float
    scores: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The line without its details; tuples as lists, scores as "clip_score" and the like."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("details", "scores")}
        plain |= {name.replace("-", "_"): score for name, score in self.scores.items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


@dataclass
class Table:
    """Runs methods over a held-out workload and compares with the dense model at the same seeds.

    tokens, shapes: of every linear layer that runs, for the share of FLOPs.  steps: of one run.  to_pictures:
    final samples → (B, 3, H, W) in [0, 1].  features, real: for KID; without either it is left out.  scorers:
    further metrics of pictures and their prompts.
    """

    workload: Workload
    tokens: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]
    steps: int
    to_pictures: ToPictures
    features: Features | None = None
    real: Tensor | None = None
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    prompts: Sequence[str] = ()
    rows: list[Row] = field(default_factory=list)
    pictures: dict[str, Tensor] = field(default_factory=dict)
    keep: int = 12  # pictures of each method to show
    note: Callable[[Row], None] = lambda _: None

    def __post_init__(self) -> None:
        self.dense = self.sample(Method("dense", {}))
        self.dense_pictures = self.to_pictures(self.dense)
        self.real_features = None if self.features is None or self.real is None else self._features(self.real)
        self._record(Method("dense", {}), self.dense)

    def add(self, method: Method) -> Row:
        """Measure one method."""
        return self._record(method, self.sample(method))

    def add_samples(self, name: str, samples: Tensor) -> Row:
        """Measure given samples, such as the dense model's from other seeds."""
        return self._record(Method(name, {}), samples)

    def sample(self, method: Method) -> Tensor:
        """The method's final samples, (P, ...), fp32."""
        model = self.workload.model
        switch, call, calls = StepSwitch(), [0], self._calls_per_run()

        def before(_module: Any, _args: Any) -> None:
            step = call[0] * self.steps // calls
            switch.dense = not method.dense_steps <= step < self.steps - method.dense_last_steps
            call[0] += 1

        handle = model.register_forward_pre_hook(before)
        out = []
        try:
            with emulate(model, method.layers, switch):
                for batch in range(len(self.workload)):
                    call[0] = 0
                    out.append(self.workload.run(batch).float())
        finally:
            handle.remove()
        return torch.cat(out)

    @staticmethod
    def samples_of(workload: Workload) -> Tensor:
        """The dense model's final samples of a workload, (P, ...), fp32."""
        return torch.cat([workload.run(batch).float() for batch in range(len(workload))])

    def share(self, layers: Mapping[str, Forward], dense_steps: int) -> float:
        """Of all linear FLOPs × steps, those in rows of sparse layers that are sparse.

        dense_steps: at both ends together.
        """
        flops = {
            name: self.tokens[name] * self.shapes[name][0] * self.shapes[name][1] for name in self.tokens
        }
        sparse = 0.0
        for name, forward in layers.items():
            dense_rows = min(abs(getattr(forward, "dense_tokens", 0)), self.tokens[name])
            sparse += flops[name] * (1 - dense_rows / self.tokens[name])
        return sparse / sum(flops.values()) * (self.steps - dense_steps) / self.steps

    def branch_share(self, layers: Mapping[str, Forward], dense_steps: int) -> float:
        """FLOPs of the branches over all linear FLOPs × steps; a shared down-projection counts once."""
        total = sum(self.tokens[name] * n * k for name, (n, k) in self.shapes.items() if name in self.tokens)
        added, seen = 0.0, set()
        for name, forward in layers.items():
            down = getattr(forward, "down", None)
            if down is None:
                continue
            rows, (n, k) = self.tokens[name] - abs(getattr(forward, "dense_tokens", 0)), self.shapes[name]
            added += rows * down.shape[0] * (n if id(down) in seen else n + k)
            seen.add(id(down))
        return added / total * (self.steps - dense_steps) / self.steps

    def _calls_per_run(self) -> int:
        if not hasattr(self, "_calls"):
            count = [0]

            def counted(*_: Any) -> None:
                count[0] += 1

            handle = self.workload.model.register_forward_pre_hook(counted)
            self.workload.run(len(self.workload) - 1)
            handle.remove()
            self._calls = count[0]
        return self._calls

    def _record(self, method: Method, samples: Tensor) -> Row:
        pictures = self.to_pictures(samples)
        apart: Distance = distance(samples, self.dense, pictures, self.dense_pictures)
        quality: Kid | None = None
        if self.real_features is not None:
            quality = kid(self._features(pictures), self.real_features)
        ends = method.dense_steps + method.dense_last_steps
        details: dict[str, Any] = {"psnr_db_ci": [apart.psnr.low, apart.psnr.high], **method.details}
        if method.rank:
            widths = sorted({self.shapes[name][1] for name in method.layers})
            details |= {"rank": method.rank, "rank_share_of_k": [method.rank / k for k in widths]}
            if added := self.branch_share(method.layers, ends):
                details["branch_flops_share"] = added
        for end in ("dense_steps", "dense_last_steps"):
            if steps := getattr(method, end):
                details[end] = steps
        row = Row(
            method.name,
            self.share(method.layers, ends),
            apart.psnr.value,
            apart.ssim.value,
            apart.error.value,
            (apart.error.low, apart.error.high),
            None if quality is None else quality.value,
            None if quality is None else (quality.low, quality.high),
            round(method.calibration_s, 2),
            {name: score(pictures, self.prompts) for name, score in self.scorers.items()},
            details,
        )
        self.rows.append(row)
        if method.shown:
            self.pictures[method.name] = pictures[: self.keep].cpu()
        self.note(row)
        return row

    def _features(self, pictures: Tensor) -> Tensor:
        assert self.features is not None
        return torch.cat([self.features(part) for part in pictures.split(256)])


def draw_pictures(path: str | Path, pictures: Mapping[str, Tensor], rows: list[Row]) -> None:
    """One line of pictures a method at their own size, the same prompts in each column; 256 colours."""
    from PIL import Image, ImageDraw, ImageFont

    by_name = {row.method: row for row in rows}
    first = next(iter(pictures.values()))
    columns, side = len(first), first.shape[-1]
    label_width, line = 5 * side, side + GAP
    sheet = Image.new("RGB", (label_width + columns * (side + GAP), line * len(pictures)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(max(side // 6, 8))
    for number, (name, images) in enumerate(pictures.items()):
        row, y = by_name[name], number * line
        far = f"{row.sparse_flops_share:.0%} sparse, {row.psnr_db:.1f} dB" if row.latent_rel_err else ""
        draw.multiline_text((4, y + side // 4), f"{name}\n{far}".strip(), fill="black", font=font)
        pixels = (images.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        for column, picture in enumerate(pixels):
            sheet.paste(Image.fromarray(picture), (label_width + column * (side + GAP), y))
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
