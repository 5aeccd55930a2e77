"""`rt-lynx eval`: the quality table, method by method, against the dense model at the same seeds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as RichTable

if TYPE_CHECKING:
    import torch

    from ..evaluation.run import Study
    from ..evaluation.table import Row

app = typer.Typer()
console = Console()


@app.command("eval")
def evaluate(
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("docs/results/quality_emoji.json"),
    pictures: Annotated[Path | None, typer.Option(help="Where the picture grid goes.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Folder for the profile of the chosen row, and its plots.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Another folder of the emoji model.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    ranks: Annotated[
        str, typer.Option(help="Of the branches, by commas; layers are chosen for the last.")
    ] = "16,64,128",
    calibration_prompts: Annotated[int, typer.Option(min=1, help="For the closed form.")] = 256,
    calibration_steps: Annotated[int, typer.Option(min=1, help="Of each of its runs.")] = 5,
    distill_prompts: Annotated[int, typer.Option(min=1, help="For both kinds of training.")] = 256,
    validation_prompts: Annotated[
        int, typer.Option(min=1, help="To choose dense layers and stop training.")
    ] = 64,
    recipe_steps: Annotated[int, typer.Option(min=1, help="Of the paper's training recipe.")] = 2000,
    joint_steps: Annotated[int, typer.Option(min=1, help="Of joint distillation at most.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 256,
    only: Annotated[
        str, typer.Option(help="Stages, by commas: ladder, chosen, recipe, weights, …; all by default.")
    ] = "",
    shares: Annotated[
        str, typer.Option(help="Of FLOPs × steps sparse, by commas, for the rows with layers left dense.")
    ] = "0.92,0.85,0.75",
    choices: Annotated[
        Path | None, typer.Option(help="Result file whose chosen layers are taken instead of measured.")
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="Further metrics, by commas: fid, clip-score, clip-iqa, image-reward.")
    ] = "",
    limit: Annotated[
        float, typer.Option(min=0, help="Seconds after which no further method is begun.")
    ] = math.inf,
    real: Annotated[
        Path | None, typer.Option(help="Archive of real pictures for KID (prepare.py makes it).")
    ] = None,
    feature_net: Annotated[Path | None, typer.Option(help="ONNX file of the feature net.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; the GPU if there is one.")] = None,
) -> None:
    """Every method on the emoji model: 2:4 weights, sparse activations down the ladder, layers left dense."""
    import torch

    from ..evaluation import emoji
    from ..evaluation.perceptual import load_scorers
    from ..evaluation.run import STAGES, Settings, Study
    from ..inputs import check_file, device_of, make_folder
    from ..models import read_object
    from ..results import write_results

    numbers, parts = _numbers(ranks), _shares(shares)
    try:
        check_file(out, "--out")
        check_file(pictures, "--pictures")
        if profile is not None:
            make_folder(profile, "--profile")
        chosen = None if choices is None else read_object(choices)
        where = device_of(device)
        dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
        pipe = emoji.load_emoji_pipeline(model, dtype=dtype)
        pipe.to(str(where))
        net, photos = _reality(real, feature_net, where)
        scorers = load_scorers(
            _listed(metrics),
            str(where),
            photos,
            lambda why: console.print(f"left out: {why}", style="yellow", markup=False),
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error
    pipe.transformer.eval().requires_grad_(False)
    settings = Settings(
        prompts=prompts,
        steps=steps,
        ranks=numbers,
        shares=parts,
        calibration_prompts=calibration_prompts,
        calibration_steps=calibration_steps,
        distill_prompts=distill_prompts,
        validation_prompts=validation_prompts,
        recipe_steps=recipe_steps,
        joint_steps=joint_steps,
        batch_size=batch_size,
    )
    rows: list[Row] = []
    stages = _listed(only) or tuple(STAGES)

    def note(row: Row) -> None:
        rows.append(row)
        write()  # what is measured stays, also when a later row fails
        console.print(_line(row), markup=False)

    def write() -> None:
        details = {row.method: row.details for row in rows}
        found = [row.to_json() for row in rows]
        write_results(out, found, prompts=prompts, steps=steps, details=details, studies=study.ground.studies)

    try:
        study = Study(
            pipe,
            emoji.prompts,
            settings,
            emoji.to_pictures,
            net,
            photos,
            note,
            lambda text: console.print(text, markup=False),
            stages,
            scorers,
            limit,
        )
        if chosen is not None:
            study.ground.take_choices(chosen)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        study.run()
    finally:  # also when it is interrupted or a stage fails
        if rows:
            write()
            console.print(_rich(rows))
            _keep(study, rows, pictures, profile)


def _reality(real: Path | None, feature_net: Path | None, device: torch.device) -> tuple[Any, Any]:
    """(feature net, real pictures) for KID; (None, None) where something is missing, and says what.

    Raises ValueError for an archive or a net that was named and is not there.
    """
    from zipfile import BadZipFile

    from ..evaluation import emoji, features

    for option, named in (("--real", real), ("--feature-net", feature_net)):
        if named is not None and not named.is_file():
            raise ValueError(f"{option} {named}: is no file; leave it out to go without KID")
    archive = real or emoji.EXAMPLE / "data" / "emoji.zip"
    if not archive.is_file():
        console.print(
            f"KID is left out: {archive} is missing (examples/emoji_flux/prepare.py makes it)", style="yellow"
        )
        return None, None
    try:
        photos = emoji.real_pictures(archive, 1024).to(device)
    except BadZipFile as error:
        raise ValueError(
            f"--real {archive}: is no archive; examples/emoji_flux/prepare.py makes one"
        ) from error
    try:
        return features.FeatureNet(feature_net, str(device)), photos
    except ImportError as error:
        console.print(f"KID is left out: {error}", style="yellow")
        return None, photos


def _keep(study: Study, rows: list[Row], pictures: Path | None, folder: Path | None) -> None:
    """The sheet of pictures and the chosen profile with its plots, as far as the study got."""
    from ..calibration.plots import draw
    from ..evaluation.table import draw_pictures
    from ..profile import save_profile

    if pictures is not None and study.table is not None:
        pictures.parent.mkdir(parents=True, exist_ok=True)
        draw_pictures(pictures, study.table.pictures, rows)
    if folder is not None and (made := study.profile()) is not None:
        save_profile(made, folder)
        measured = study.ground.measured
        draw(made, folder / "plots", [*study.ground.chooser.points(), *measured] if measured else ())


def _listed(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",") if name.strip())


def _shares(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(share) for share in _listed(text))
    except ValueError:
        found = ()
    if not found or not all(0 < share < 1 for share in found):
        raise typer.BadParameter(f"--shares {text!r} is no list of shares between 0 and 1, as 0.85,0.75")
    return found


def _numbers(text: str) -> tuple[int, ...]:
    found = _listed(text)
    if not found or not all(number.isdecimal() and int(number) > 0 for number in found):
        raise typer.BadParameter(f"--ranks {text!r} is no list of ranks, as 16,64")
    return tuple(map(int, found))


def _line(row: Row) -> str:
    kid = "" if row.kid is None else f", KID {row.kid:.5f}"
    kid += "".join(f", {name} {score:.4f}" for name, score in row.scores.items())
    return (
        f"{row.method}: {row.sparse_flops_share:.1%} sparse, {row.psnr_db:.2f} dB, SSIM {row.ssim:.3f}, "
        f"error {row.latent_rel_err:.4f}{kid}, {row.calibration_s:.1f} s"
    )


def _rich(rows: list[Row]) -> RichTable:
    table = RichTable(title="Against the dense model at the same seeds")
    for column in (
        "method",
        "sparse FLOPs",
        "PSNR dB",
        "SSIM",
        "error",
        "95%",
        "KID",
        "95%",
        "calibration s",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(
            row.method,
            f"{row.sparse_flops_share:.1%}",
            f"{row.psnr_db:.2f}",
            f"{row.ssim:.3f}",
            f"{row.latent_rel_err:.4f}",
            f"{row.latent_rel_err_ci[0]:.4f}–{row.latent_rel_err_ci[1]:.4f}",
            "–" if row.kid is None else f"{row.kid:.5f}",
            "–" if row.kid_ci is None else f"{row.kid_ci[0]:.5f}–{row.kid_ci[1]:.5f}",
            f"{row.calibration_s:.1f}",
        )
    return table
