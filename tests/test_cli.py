"""The `rt-lynx` script itself: packages that are missing, and what it imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lynx_compile.cli import profile as profile_command
from lynx_compile.profile import Fingerprint, Profile, load_profile, save_profile

MISSING = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
sys.argv = ["rt-lynx", *{arguments!r}]
from lynx_compile.cli import main
main()
"""


def without(names, *arguments):
    script = MISSING.format(names=names, arguments=arguments)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)


@pytest.mark.parametrize(
    "arguments", [("explain", "flux"), ("demo",), ("calibrate", "emoji", "--out", "made")]
)
def test_a_package_that_is_missing_comes_with_the_command_that_installs_it(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    run = without(["diffusers"], *arguments)
    assert run.returncode == 1
    said = "this command needs it: python -m pip install 'lynx-compile[demo]'"
    assert run.stderr.splitlines()[-1] == f"error: No module named 'diffusers'; {said}"


def test_help_needs_no_torch():
    for arguments in ((), ("bench", "gemm"), ("eval",), ("profile",)):
        run = without(["torch", "diffusers", "matplotlib"], *arguments, "--help")
        assert run.returncode == 0, run.stderr
        assert "Usage: rt-lynx" in run.stdout


def test_a_terminal_that_knows_no_dots_gets_question_marks(tmp_path):
    save_profile(Profile(Fingerprint("FluxTransformer2DModel", "", ""), {}), tmp_path)
    command = [sys.executable, "-c", "from lynx_compile.cli import main; main()", "profile", "show", tmp_path]
    run = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0, run.stderr.decode()
    assert b"FluxTransformer2DModel ? 0 of 0 layers sparse" in run.stdout


def test_a_profile_is_shown_with_whole_names():
    folder = Path(__file__).parent.parent / "examples" / "emoji_flux" / "profile"
    shown = CliRunner().invoke(profile_command.app, ["show", str(folder)])
    assert shown.exit_code == 0, shown.output
    assert [name for name in load_profile(folder).layers if f" {name} " not in shown.output] == []
