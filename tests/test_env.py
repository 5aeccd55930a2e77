"""`rt-lynx env`, result files and what they say about where they come from."""

import errno
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from lynx_compile import cost, results
from lynx_compile.cli import app
from lynx_compile.cli.env import collect


def test_env_names_what_a_bug_report_needs(monkeypatch, tmp_path):
    monkeypatch.setenv("LYNX_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCH_LOGS", "graph_breaks")
    monkeypatch.setenv("MY_SECRET", "hidden")
    answer = CliRunner().invoke(app, ["env"])
    assert answer.exit_code == 0, answer.output
    for said in (
        torch.__version__,
        sys.version.split()[0],
        str(tmp_path),
        "TORCH_LOGS: graph_breaks",
        *cost.devices(),
    ):
        assert said in answer.stdout
    assert "hidden" not in answer.stdout
    document = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
    assert document["backend"]["registered"] is True
    assert document["versions"]["torch"] == torch.__version__


def test_env_survives_a_broken_compiler_and_cache(monkeypatch):
    from lynx_compile.runtime import build

    def broken():
        raise RuntimeError("libnvrtc is missing")

    monkeypatch.setattr(build, "nvrtc_version", broken)
    monkeypatch.setattr(build, "cache_folder", lambda: None)
    compiler = collect()["compiler"]
    assert compiler["NVRTC"] == "unavailable: libnvrtc is missing"
    assert "compiled in every process" in compiler["kernel cache"]


def test_results_say_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/rt-lynx", "explain", "a model"])
    path = tmp_path / "deep" / "rows.json"
    written = results.write_results(path, [{"m": 1}], power_w=700)
    assert json.loads(path.read_text()) == written
    assert written["command"] == "rt-lynx explain 'a model'"
    assert written["rows"] == [{"m": 1}]
    assert written["power_w"] == 700
    assert written["device"] == results.device_name()


def test_results_on_a_full_disk_leave_the_earlier_ones(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    results.write_results(path, [{"m": 1}])
    before = path.read_bytes()

    class Full(io.FileIO):
        def write(self, content):
            super().write(content[:20])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fdopen", lambda descriptor, mode: Full(descriptor, mode))
    with pytest.raises(OSError, match="No space left"):
        results.write_results(path, [{"m": 2}])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_commit_is_that_of_the_checkout():
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=results.__file__.rsplit("/", 1)[0]
    )
    commit = results.commit()
    assert commit != ""
    if head.returncode == 0:
        assert head.stdout.startswith(commit.rstrip("+"))
