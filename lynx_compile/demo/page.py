"""The grid of pictures and the self-contained HTML page."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from importlib import metadata, resources
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..report import Report, Row
from .generation import Demo, Outcome

SCALE = 2  # pixels of the grid for one of the model
LABEL_WIDTH, CAPTION_HEIGHT, GAP = 120, 34, 8
TEMPLATE = "demo.html.j2"


def picture_grid(demo: Demo) -> Image.Image:
    """One row a variant, one column a prompt."""
    height, width = (SCALE * side for side in demo.outcomes[0].pictures.shape[-2:])
    columns, rows = len(demo.prompts), len(demo.outcomes)
    grid = Image.new(
        "RGB",
        (LABEL_WIDTH + columns * (width + GAP), CAPTION_HEIGHT + rows * (height + GAP)),
        "white",
    )
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(12)
    for column, prompt in enumerate(demo.prompts):
        draw.multiline_text((LABEL_WIDTH + column * (width + GAP), 4), _wrap(prompt), fill="#333", font=font)
    for row, outcome in enumerate(demo.outcomes):
        y = CAPTION_HEIGHT + row * (height + GAP)
        draw.multiline_text((8, y + height // 2 - 16), _label(outcome), fill="#111", font=font)
        for column, picture in enumerate(outcome.pictures):
            shown = _image(picture).resize((width, height), Image.Resampling.LANCZOS)
            grid.paste(shown, (LABEL_WIDTH + column * (width + GAP), y))
    return grid


def render(demo: Demo) -> str:
    """The page as one HTML text: pictures inlined, nothing fetched."""
    text = (resources.files("lynx_compile") / "templates" / TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    report = next((outcome.report for outcome in demo.outcomes if outcome.report), None)
    return environment.from_string(text).render(
        demo=demo,
        rows=[(outcome, [_data_uri(picture) for picture in outcome.pictures]) for outcome in demo.outcomes],
        errors=_bars(demo.layer_errors),
        coverage=_coverage(report) if report else [],
        totals=report.totals() if report else {},
        on_gpu=demo.device.startswith("cuda"),
        versions={name: metadata.version(name) for name in ("lynx-compile", "torch", "diffusers")},
        device=torch.cuda.get_device_name(demo.device) if demo.device.startswith("cuda") else "CPU",
    )


def _image(picture: Tensor) -> Image.Image:
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy())


def _data_uri(picture: Tensor) -> str:
    buffer = io.BytesIO()
    _image(picture).save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _label(outcome: Outcome) -> str:
    title = outcome.variant.title.replace(", ", ",\n")
    return title if outcome.distance is None else f"{title}\n{outcome.distance.psnr.value:.1f} dB"


def _wrap(prompt: str, width: int = 20) -> str:
    first, _, rest = prompt.partition(", ")
    lines = [first if len(first) <= width else first[: width - 1] + "…"]
    return "\n".join([*lines, rest[:width]] if rest else lines)


def _bars(errors: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Per layer the errors and their widths in percent of the largest."""
    most = max((value for layer in errors.values() for value in layer.values()), default=1.0) or 1.0
    return [
        {
            "name": name,
            "bars": [(key, value, round(100 * value / most, 1)) for key, value in sorted(layer.items())],
        }
        for name, layer in errors.items()
    ]


def _coverage(report: Report) -> list[tuple[Row, str, int, float]]:
    """(first row, name, layers, share of the FLOPs) of layers that differ only in their block's number."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in report.rows:
        name = re.sub(r"\.\d+\.", ".*.", row.name, count=1)
        groups.setdefault((name, row.m, row.n, row.k, row.decision, row.reason), []).append(row)
    return [
        (rows[0], key[0] if len(rows) > 1 else rows[0].name, len(rows), _share(rows, report.flops))
        for key, rows in groups.items()
    ]


def _share(rows: Sequence[Row], total: int) -> float:
    return sum(row.flops for row in rows) / total if total else 0.0
