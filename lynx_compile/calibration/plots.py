"""Pictures of a profile: sensitivity by layer, error over dense first steps, the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..profile.format import Profile
from .front import Choice
from .sensitivity import block_of, class_of

SHOWN = 30  # bars of the ranking


def draw(profile: Profile, folder: str | Path, points: Sequence[Choice] = ()) -> list[Path]:
    """Write what the profile has data for: heat_map, ranking, local_error, dense_steps, front (.png)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    effects = {
        n: layer.sensitivity["sample"] for n, layer in profile.layers.items() if "sample" in layer.sensitivity
    }
    made = []
    if effects:
        made += [
            _heat_map(effects, folder / "heat_map.png"),
            _ranking(profile, effects, folder / "ranking.png"),
            _against_local_error(profile, effects, folder / "local_error.png"),
        ]
    if "dense_first_steps" in profile.studies:
        made.append(_steps(profile.studies["dense_first_steps"], folder / "dense_steps.png"))
    if points:
        made.append(_front(points, folder / "front.png"))
    return made


def _heat_map(effects: dict[str, float], path: Path) -> Path:
    blocks = list(dict.fromkeys(block_of(name) for name in effects))
    kinds = list(dict.fromkeys(name.removeprefix(block_of(name)).lstrip(".") for name in effects))
    grid = [[effects.get(f"{block}.{kind}", float("nan")) for block in blocks] for kind in kinds]
    plot = _pyplot()
    figure, axis = plot.subplots(figsize=(2 + 0.5 * len(blocks), 1.5 + 0.35 * len(kinds)))
    image = axis.imshow(grid, aspect="auto", cmap="viridis")
    axis.set_xticks(range(len(blocks)), blocks, rotation=90, fontsize=7)
    axis.set_yticks(range(len(kinds)), kinds, fontsize=7)
    figure.colorbar(image, label="error of the final sample, this layer alone sparse")
    return _save(plot, figure, path)


def _ranking(profile: Profile, effects: dict[str, float], path: Path) -> Path:
    worst = sorted(effects, key=lambda name: effects[name])[-SHOWN:]
    plot = _pyplot()
    figure, axis = plot.subplots(figsize=(8, 0.6 + 0.25 * len(worst)))
    axis.barh(worst, [effects[name] for name in worst], label="final sample")
    axis.plot([profile.layers[n].error_after or 0.0 for n in worst], worst, "k|", label="layer's own output")
    axis.set_xlabel("relative error, this layer alone sparse")
    axis.tick_params(labelsize=7)
    axis.legend()
    return _save(plot, figure, path)


def _against_local_error(profile: Profile, effects: dict[str, float], path: Path) -> Path:
    """A point a layer: were local error any guide, they would lie along a line."""
    plot = _pyplot()
    figure, axis = plot.subplots(figsize=(6, 4))
    classes = {name: class_of(name) for name in effects}
    for label in dict.fromkeys(classes.values()):
        names = [name for name in effects if classes[name] == label]
        local = [profile.layers[name].error_after or 0.0 for name in names]
        axis.plot(local, [effects[name] for name in names], "o", label=label)
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("error of the layer's own output")
    axis.set_ylabel("error of the final sample")
    axis.legend(fontsize=8)
    return _save(plot, figure, path)


def _steps(measured: dict[str, list[float]], path: Path) -> Path:
    counts = sorted(measured, key=int)
    plot = _pyplot()
    figure, axis = plot.subplots(figsize=(6, 4))
    axis.plot([int(n) for n in counts], [measured[n][0] for n in counts], "o-", label="first n steps dense")
    axis.plot(
        [int(n) for n in counts], [measured[n][1] for n in counts], "o-", label="only the first n sparse"
    )
    axis.set_xlabel("n")
    axis.set_ylabel("error of the final sample")
    axis.legend()
    return _save(plot, figure, path)


def _front(points: Sequence[Choice], path: Path) -> Path:
    plot = _pyplot()
    figure, axis = plot.subplots(figsize=(6, 4))
    measured = [c for c in points if c.measured is not None]
    expected = [c for c in points if c.measured is None]
    axis.plot([c.speed for c in expected], [c.error for c in expected], ".-", label="expected")
    if measured:
        axis.plot([c.speed for c in measured], [c.measured for c in measured], "x", label="measured")
    axis.set_xlabel("predicted speed of the linear layers")
    axis.set_ylabel("error of the final sample")
    axis.legend()
    return _save(plot, figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plot

    return plot


def _save(plot: Any, figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plot.close(figure)
    return path
