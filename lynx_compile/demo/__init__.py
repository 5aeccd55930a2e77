"""What `rt-lynx demo` does: the same seeds dense and sparse, how far apart, and a page."""

from .generation import VARIANTS, Demo, Outcome, Variant, run
from .page import picture_grid, render

__all__ = ["VARIANTS", "Demo", "Outcome", "Variant", "picture_grid", "render", "run"]
