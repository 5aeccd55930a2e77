"""Result files: what was measured, on what, by which command, at which commit."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .files import write_whole


def write_results(path: str | Path, rows: Sequence[Mapping[str, Any]], **details: Any) -> dict[str, Any]:
    """Write {device, command, commit, …details, rows} as JSON; returns it.

    The folder is made if needed; an earlier file stays until this one is complete.
    details: what else describes the run (power, prompts, steps).
    """
    result = {
        "device": device_name(),
        "command": command(),
        "commit": commit(),
        **details,
        "rows": list(rows),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
    return result


def device_name() -> str:
    """The current CUDA device as CUDA names it, else the processor's architecture."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"


def command() -> str:
    """The command line as a user would type it: the program's name without its folder."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def commit() -> str:
    """The commit of the checkout this package runs from ("+" when files differ); the version otherwise."""
    from importlib.metadata import PackageNotFoundError, version

    root = Path(__file__).resolve().parent.parent
    try:
        if (root / ".git").exists():
            found = subprocess.run(
                ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
                capture_output=True, text=True, check=True, timeout=10,
            )  # fmt: skip
            return found.stdout.strip()
        return version("lynx-compile")
    except (OSError, subprocess.SubprocessError, PackageNotFoundError):
        return "unknown"
