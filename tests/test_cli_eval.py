"""`rt-lynx eval` on a pipeline in miniature: result file, sheet, profile, what is left out and why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lynx_compile.cli import eval as command
from lynx_compile.evaluation import emoji
from lynx_compile.profile import load_profile
from tests.test_evaluation import SmallPipe

FIELDS = {"method", "sparse_flops_share", "psnr_db", "ssim", "latent_rel_err", "latent_rel_err_ci", "kid"}
FIELDS |= {"kid_ci", "calibration_s"}


class Loaded(SmallPipe):
    def to(self, device: str) -> None:
        assert device == "cpu"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(emoji, "load_emoji_pipeline", lambda *_, **__: Loaded())
    monkeypatch.setattr(emoji, "EXAMPLE", tmp_path)  # no pictures there
    pictures = lambda s: s.reshape(-1, 1, 24, 64).expand(-1, 3, -1, -1).sigmoid()  # noqa: E731
    monkeypatch.setattr(emoji, "to_pictures", pictures)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(*arguments: str) -> Result:
    sizes: dict[str, Any] = {"prompts": 4, "steps": 3, "calibration-prompts": 8, "validation-prompts": 4}
    sizes |= {"distill-prompts": 8, "recipe-steps": 4, "joint-steps": 2, "batch-size": 4, "ranks": "8,16"}
    flat = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    return CliRunner().invoke(command.app, [*flat, "--device", "cpu", *arguments], env={"COLUMNS": "200"})


def test_writes_rows_sheet_and_profile(folder: Path) -> None:
    result = evaluate("--only", "ladder,chosen", "--pictures", "sheet.png", "--profile", "made")
    assert result.exit_code == 0, result.output
    assert "KID is left out" in result.output
    data = json.loads((folder / "docs" / "results" / "quality_emoji.json").read_text())
    assert {"device", "command", "commit", "prompts", "steps", "rows", "details", "studies"} == data.keys()
    assert (data["prompts"], data["steps"]) == (4, 3)
    assert all(row.keys() == FIELDS for row in data["rows"])
    assert [row["method"] for row in data["rows"]][:3] == ["dense", "dense, another seed", "SA-native"]
    assert (folder / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    said = " ".join(result.output.split())
    assert "92% sparse is out of reach: all that may be sparse is 85.7%" in said
    assert load_profile(folder / "made").sparse_layers()
    assert (folder / "made" / "plots" / "front.png").is_file()


def test_choices_of_an_earlier_run_are_taken_over(folder: Path) -> None:
    assert evaluate("--only", "chosen", "--shares", "0.85,0.5", "--out", "first.json").exit_code == 0
    again = evaluate("--only", "chosen", "--shares", "0.5", "--choices", "first.json", "--out", "again.json")
    assert again.exit_code == 0, again.output
    assert "sensitivity of" not in again.output
    rows = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("first", "again")}
    method = "shift + deflation r16 + SL end to end, 50%"
    assert (
        rows["again"]["details"][method]["dense_layers"] == rows["first"]["details"][method]["dense_layers"]
    )
    errors = [next(r for r in rows[n]["rows"] if r["method"] == method)["latent_rel_err"] for n in rows]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)
    (folder / "none.json").write_text("{}")
    assert "holds no choice" in evaluate("--choices", "none.json").output


def test_missing_metrics_are_named_and_the_table_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    result = evaluate("--only", "ladder", "--metrics", "clip-score,image-reward")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "left out: clip-score needs a package: pip install transformers" in said
    assert "left out: image-reward needs a package: pip install image-reward" in said
    assert (folder / "docs" / "results" / "quality_emoji.json").is_file()


def test_an_interruption_keeps_what_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lynx_compile.evaluation import run

    def interrupted(_ground: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(run.STAGES, "weights", interrupted)
    result = evaluate("--only", "chosen,weights", "--pictures", "sheet.png", "--profile", "made")
    assert result.exit_code != 0
    data = json.loads((folder / "docs" / "results" / "quality_emoji.json").read_text())
    assert len(data["rows"]) > 4
    assert (folder / "sheet.png").is_file()
    assert load_profile(folder / "made").sparse_layers()


def test_an_interruption_before_the_first_row_leaves_an_earlier_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lynx_compile.evaluation.run import Study

    def interrupted(_study: Study) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "run", interrupted)
    (folder / "old.json").write_text("{}")
    assert evaluate("--out", "old.json").exit_code != 0
    assert (folder / "old.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "laddr"), "stage 'laddr' is unknown; stages are ladder"),
        (("--metrics", "fidd"), "metric 'fidd' is unknown; metrics are fid"),
        (("--shares", "85"), "is no list of shares between 0 and 1"),
        (("--ranks", "16,x"), "is no list of ranks, as 16,64"),
        (("--ranks", "²"), "is no list of ranks, as 16,64"),
        (("--real", "none.zip"), "--real none.zip: is no file; leave it out to go without KID"),
        (("--feature-net", "none.onnx"), "--feature-net none.onnx: is no file"),
        (("--device", "tpu"), "--device tpu: this runs on cpu, cuda or one GPU"),
        (("--out", "."), "--out .: is a folder; give a file"),
        (("--choices", "missing.json"), "missing.json"),
        (("--real", __file__), "is no archive; examples/emoji_flux/prepare.py makes one"),
    ],
)
def test_says_what_is_wrong(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    result = evaluate(*arguments)
    assert result.exit_code == 2
    assert message in re.sub(r"[\s│]+", " ", result.output)
