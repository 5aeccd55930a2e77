"""lynx-compile: `torch.compile(model, backend="rt_lynx")`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .report import clear_report, report

if TYPE_CHECKING:
    from .backend import rewrite, rt_lynx
    from .calibration import calibrate
    from .explanation import explain
    from .layers import LynxLinear, attach, detach
    from .profile import apply_profile
    from .regional import compile_blocks

# public name → module; imported on first use, so that the command line starts without torch
_LAZY = {
    "LynxLinear": "layers",
    "apply_profile": "profile",
    "attach": "layers",
    "calibrate": "calibration",
    "compile_blocks": "regional",
    "detach": "layers",
    "explain": "explanation",
    "rewrite": "backend",
    "rt_lynx": "backend",
}

__all__ = [
    "LynxLinear",
    "apply_profile",
    "attach",
    "calibrate",
    "clear_report",
    "compile_blocks",
    "detach",
    "explain",
    "report",
    "rewrite",
    "rt_lynx",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
