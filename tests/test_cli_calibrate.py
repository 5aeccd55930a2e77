"""`rt-lynx calibrate` and `rt-lynx profile` from prompts to a profile folder, on a pipeline in miniature."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
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
    assert "6 layers; safe defaults decide" in " ".join(result.output.split())
    profile = load_profile(prompts.parent / "profile")
    assert profile.provenance["prompts"] == 8
    assert profile.steps == 3
    assert not (prompts.parent / "profile" / "plots").exists()


@pytest.mark.parametrize("aim", [("--max-error", "0.02"), ("--speed", "1.25")])
def test_chooses_and_draws(prompts: Path, aim: tuple[str, str]) -> None:
    result = calibrate(prompts, *aim, "--costs", "flops", "--text-rows", "blocks.1.*=6")
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
    shown = CliRunner().invoke(profile_command.app, ["show", str(folder)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert f"first {profile.dense_steps} of 3 steps dense" in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-error", "0.1", "--speed", "1.2"), "not both"),
        (("--count", "20"), "has 12 prompts, 24 are needed"),
        (("--text-rows", "blocks.1"), "is not GLOB=N"),
        (("--text-rows", "blocks.1.*=6"), "--text-rows is for the choice"),
        (
            ("--speed", "1.2", "--costs", "flops", "--text-rows", "block.1.*=6"),
            "text rows of 'block.1.*': no layer that may be sparse has such a name",
        ),
        (
            ("--speed", "9", "--costs", "flops"),
            "--speed 9.0 is out of reach: with all that may be sparse it is 1.7",
        ),
        (("--speed", "1.2"), "no layer of this model is faster sparse by the table 'h200'"),
        (("--speed", "1.2", "--costs", "h2000"), "no cost table for device 'h2000'"),
    ],
)
def test_says_what_is_wrong(prompts: Path, arguments: tuple[str, ...], message: str) -> None:
    result = calibrate(prompts, *arguments)
    assert result.exit_code == 2
    assert message in re.sub(r"[\s│]+", " ", result.output)


def test_state_makes_a_second_run_short(prompts: Path) -> None:
    state = prompts.parent / "state"
    first = calibrate(prompts, "--state", str(state))
    assert first.exit_code == 0
    json_of = {
        name: (prompts.parent / "profile" / name).read_bytes() for name in ("adapter_model.safetensors",)
    }
    kept = sorted(path.name for path in state.iterdir())
    assert kept == ["inputs.safetensors", "part-1.safetensors"]
    again = calibrate(prompts, "--state", str(state))
    assert again.exit_code == 0
    for name, content in json_of.items():
        assert (prompts.parent / "profile" / name).read_bytes() == content
    assert json.loads((prompts.parent / "profile" / "lynx.json").read_text())["schema"] >= 1
