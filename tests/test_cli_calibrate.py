"""`rt-lynx calibrate` and `rt-lynx profile` from prompts to a profile folder, on a pipeline in miniature."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner, Result

from lynx_compile.cli import calibrate as command
from lynx_compile.cli import profile as profile_command
from lynx_compile.profile import load_profile
from tests.test_evaluation import SmallPipe


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(command, "_load", lambda model, device: SmallPipe())
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"{i} {'x' * (i % 5)}" for i in range(12)) + "\n\n")
    return file


def calibrate(prompts: Path, *arguments: str) -> Result:
    common = ["small", "--out", str(prompts.parent / "profile"), "--prompts", str(prompts), "--device", "cpu"]
    counts = ["--count", "8", "--held-out", "4", "--batch-size", "4", "--steps", "3", "--rank", "16"]
    return CliRunner().invoke(command.app, [*common, *counts, *arguments])


def test_writes_a_profile(prompts: Path) -> None:
    result = calibrate(prompts)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "6 layers; safe defaults decide which of them run sparse, the last 1 of 3 steps dense" in said
    profile = load_profile(prompts.parent / "profile")
    assert profile.dense_last_steps == 1
    assert profile.provenance["prompts"] == 8
    assert profile.steps == 3
    assert not (prompts.parent / "profile" / "plots").exists()


def test_last_steps_may_be_sparse(prompts: Path) -> None:
    result = calibrate(prompts, "--dense-last", "0")
    assert result.exit_code == 0, result.output
    assert "steps dense" not in result.output
    assert load_profile(prompts.parent / "profile").dense_last_steps == 0


@pytest.mark.parametrize(("aim", "rows"), [(("--max-error", "0.02"), 6), (("--speed", "1.25"), -6)])
def test_chooses_and_draws(prompts: Path, aim: tuple[str, str], rows: int) -> None:
    result = calibrate(prompts, *aim, "--costs", "flops", "--text-rows", f"blocks.1.*={rows}")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "sensitivity of 9 choices: about" in said  # six layers, three of them with text rows
    measured = float(re.search(r"measured ([\d.]+)", said)[1])
    speed = float(re.search(r"speed ([\d.]+)", said)[1])
    assert measured <= 0.02 + 1e-4 if aim[0] == "--max-error" else speed >= 1.25
    folder = prompts.parent / "profile"
    profile = load_profile(folder)
    assert 0 < len(profile.sparse_layers()) < 6 or profile.dense_steps
    assert all("sample" in layer.sensitivity for layer in profile.layers.values())
    assert {path.name for path in (folder / "plots").iterdir()} == {
        "heat_map.png",
        "ranking.png",
        "local_error.png",
        "dense_steps.png",
        "front.png",
    }
    shown = CliRunner().invoke(profile_command.app, ["show", str(folder)])
    assert shown.exit_code == 0, shown.output
    assert profile.dense_last_steps == 1  # unless asked for more or fewer
    assert f"first {profile.dense_steps} and last 1 of 3 steps dense" in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-error", "0.1", "--speed", "1.2"), "not both"),
        (("--count", "20"), "has 12 prompts, 24 are needed"),
        (("--text-rows", "blocks.1"), "is not GLOB=N"),
        (("--text-rows", "blocks.1=²"), "is not GLOB=N"),
        (("--text-rows", "blocks.1=--6"), "is not GLOB=N"),
        (("--rank", "257"), "rank=257: deflation takes at most 256 directions; or give deflate=False (--no-"),
        (("--text-rows", "blocks.1.*=6"), "--text-rows is for the choice"),
        (
            ("--speed", "1.2", "--costs", "flops", "--text-rows", "block.1.*=6"),
            "text rows of 'block.1.*': no layer that may be sparse has such a name",
        ),
        (
            ("--speed", "9", "--costs", "flops"),
            "--speed 9.0 is out of reach: with all that may be sparse it is 1.400",
        ),
        (
            ("--speed", "9", "--costs", "flops", "--dense-last", "0"),
            "--speed 9.0 is out of reach: with all that may be sparse it is 1.750",
        ),
        (("--dense-last", "3"), "--dense-last 3 leaves none of --steps 3 sparse; lower it"),
        (("--speed", "1.2"), "no layer of this model is faster sparse by the table 'h200'"),
        (("--speed", "1.2", "--costs", "h2000"), "no cost table for device 'h2000'"),
        (("--speed", "1.2", "--held-out", "0"), "--held-out 0 leaves no prompts"),
        (("--prompts", "missing.txt"), "--prompts missing.txt: No such file"),
        (("--prompts", "/"), "--prompts /: Is a directory; give a text file"),
        (("--out", __file__), "File exists; give a folder that can be written"),
        (("--state", __file__), "File exists; give a folder that can be written"),
        (("--device", "tpu"), "--device tpu: this runs on cpu, cuda or one GPU by number"),
    ],
)
def test_says_what_is_wrong(prompts: Path, arguments: tuple[str, ...], message: str) -> None:
    result = calibrate(prompts, *arguments)
    assert result.exit_code == 2
    assert message in re.sub(r"[\s│]+", " ", result.output)


def test_a_model_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--count", "1", "--held-out", "1"]
    result = CliRunner().invoke(
        command.app, [str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu", *arguments]
    )
    assert result.exit_code == 2
    assert "is no folder that save_pretrained wrote" in re.sub(r"[\s│]+", " ", result.output)


def test_a_merge_does_not_overwrite_what_it_reads(prompts: Path) -> None:
    assert calibrate(prompts).exit_code == 0
    folder = str(prompts.parent / "profile")
    before = (prompts.parent / "profile" / "lynx.json").read_bytes()
    for out, message in ((folder, "is one of the two that are joined"), (__file__, "File exists; give a")):
        result = CliRunner().invoke(profile_command.app, ["merge", folder, folder, "--out", out])
        assert result.exit_code == 2
        assert message in re.sub(r"[\s│]+", " ", result.output)
    assert (prompts.parent / "profile" / "lynx.json").read_bytes() == before


def test_state_makes_a_second_run_short(prompts: Path) -> None:
    state = prompts.parent / "state"
    first = calibrate(prompts, "--state", str(state))
    assert first.exit_code == 0
    json_of = {
        name: (prompts.parent / "profile" / name).read_bytes() for name in ("adapter_model.safetensors",)
    }
    kept = sorted(path.name for path in state.glob("*.safetensors"))
    assert kept == ["inputs.safetensors", "part-1.safetensors"]
    again = calibrate(prompts, "--state", str(state))
    assert again.exit_code == 0
    for name, content in json_of.items():
        assert (prompts.parent / "profile" / name).read_bytes() == content
    assert json.loads((prompts.parent / "profile" / "lynx.json").read_text())["schema"] >= 1
    with FileLock(state / ".lock"):
        refused = calibrate(prompts, "--state", str(state))
    assert refused.exit_code == 2
    assert "another calibration that still runs; wait" in re.sub(r"[\s│]+", " ", refused.output)
