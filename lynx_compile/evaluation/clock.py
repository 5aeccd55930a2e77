"""Wall time of device work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class Clock:
    """Seconds between entering and leaving `running`, the device's work included."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        _finish()
        start = time.monotonic()
        try:
            yield
        finally:
            _finish()
            self.seconds += time.monotonic() - start


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
