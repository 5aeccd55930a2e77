"""The shipped emoji model as a workload: its pipeline, prompts that never repeat, and its real pictures."""

from __future__ import annotations

import importlib.util
import io
import sys
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STYLES = ("noto", "twemoji", "fluent 3d")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "emoji_flux"


def load_emoji_pipeline(path: str | Path | None = None, **kwargs: Any) -> Any:
    """The example's `EmojiFluxPipeline`; kwargs as for its `from_pretrained`.

    path: the example's folder in a checkout of the project, or another model folder in the same layout.
    Raises FileNotFoundError when neither this package runs from a checkout nor path names an example's
    folder: the example is not part of the installed package.
    """
    example = EXAMPLE
    if path is not None and (Path(path) / "pipeline.py").is_file():
        example, path = Path(path), Path(path) / "model"
    file = example / "pipeline.py"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: the emoji model comes with a checkout of the project; "
            "give the path of its folder examples/emoji_flux"
        )
    spec = importlib.util.spec_from_file_location("emoji_flux_pipeline", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.get(spec.name) or importlib.util.module_from_spec(spec)
    if spec.name not in sys.modules:
        sys.modules[spec.name] = module  # diffusers looks the pipeline's module up by name
        spec.loader.exec_module(module)
    pipe = module.EmojiFluxPipeline.from_pretrained(*(() if path is None else (path,)), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def to_pictures(tokens: Tensor) -> Tensor:
    """Final tokens (B, 256, 48) → pictures (B, 3, 64, 64) in [0, 1]."""
    grid = tokens.float().transpose(1, 2).unflatten(2, (16, 16))
    return (torch.nn.functional.pixel_shuffle(grid, 4) / 2 + 0.5).clamp(0, 1)


def prompts(count: int, start: int = 0) -> list[str]:
    """`count` prompts from position `start` of a fixed shuffled list of names, the style changing with each.

    Disjoint ranges share no name as long as they stay within the list (about 1,900); beyond it names come
    back in the next style.
    """
    names = resources.files(__package__).joinpath("emoji_names.txt").read_text().split("\n")[:-1]
    turn = [divmod(i, len(names)) for i in range(start, start + count)]
    return [f"{names[i]}, {STYLES[(i + round_) % len(STYLES)]}" for round_, i in turn]


def real_pictures(archive: str | Path, count: int) -> Tensor:
    """(count, 3, 64, 64) in [0, 1]: every n-th picture of the training archive (`prepare.py` makes it)."""
    import numpy as np
    from PIL import Image

    with zipfile.ZipFile(archive) as folder:
        names = [name for name in folder.namelist() if name.endswith((".webp", ".png"))]
        chosen = names[:: max(len(names) // count, 1)][:count]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(folder.read(n))).convert("RGB")) for n in chosen])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
