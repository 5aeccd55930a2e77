"""What commands are given, checked before the work that it would spoil.

Errors name the option, the value and the remedy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch


def device_of(given: str | None) -> torch.device:
    """The torch device of `--device`, by default the GPU if there is one; RuntimeError where none is."""
    if given is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(given)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda") or (chosen.type == "cpu" and chosen.index):
        raise RuntimeError(f"--device {given}: this runs on cpu, cuda or one GPU by number, as cuda:0")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"--device {given}: torch {torch.__version__} sees no NVIDIA GPU; use --device cpu"
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise RuntimeError(f"--device {given}: the GPUs here are cuda:0 to cuda:{last}")
    return chosen


def make_folder(folder: Path, option: str = "--out") -> None:
    """Make the folder an option names; OSError where it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{option} {folder}: {error.strerror}; give a folder that can be written") from error


def check_file(file: Path | None, option: str, kinds: Sequence[str] = ()) -> None:
    """Make the folder of the file an option names; OSError where it could not be written.

    kinds: suffixes that it may have, any by default.
    """
    if file is None:
        return
    if file.is_dir():
        raise OSError(f"{option} {file}: is a folder; give a file")
    if kinds and file.suffix not in kinds:
        raise OSError(f"{option} {file}: cannot be drawn; give a name that ends in {' or '.join(kinds)}")
    make_folder(file.parent, f"{option} {file}: its folder")


def lines_of(file: Path, option: str) -> list[str]:
    """The lines of a text file that say something; ValueError for a file that cannot be read."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {file}: is no text in UTF-8; save it as such") from error
    except OSError as error:
        raise ValueError(f"{option} {file}: {error.strerror}; give a text file") from error
