"""What `rt-lynx demo` does: the same seeds dense and sparse, how far apart, and a page."""

from .generation import (
    ERROR_TITLE,
    VARIANTS,
    Demo,
    Outcome,
    Variant,
    error_steps,
    run,
    variants_with,
    warm_up_steps,
)
from .page import picture_grid, render

__all__ = [
    "ERROR_TITLE",
    "VARIANTS",
    "Demo",
    "Outcome",
    "Variant",
    "error_steps",
    "picture_grid",
    "render",
    "run",
    "variants_with",
    "warm_up_steps",
]
