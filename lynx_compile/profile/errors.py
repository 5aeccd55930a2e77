"""The one exception of this package."""

from __future__ import annotations

from pathlib import Path


class ProfileError(ValueError):
    """A profile that cannot be used. The message names the file, the field and the remedy."""

    def __init__(self, file: str | Path, field: str, problem: str, remedy: str) -> None:
        where = f"{file}: {field}" if field else str(file)
        super().__init__(f"{where}: {problem}; {remedy}")
        self.file, self.field, self.problem, self.remedy = str(file), field, problem, remedy
