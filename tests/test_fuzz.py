"""`make fuzz` in small: seeds with the passes in their own and in random order, and its command line."""

import subprocess
import sys
from pathlib import Path

import pytest

from .fuzz import check_seed


@pytest.mark.parametrize("seed", range(10_000, 10_150))
def test_seed(seed):
    check_seed(seed)


def test_command_line_counts_graphs():
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", "60", "--count", "3", "--workers", "1"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.startswith("3 graphs checked in ")
    assert "0 failures" in done.stdout
