"""Every transformer class of the installed diffusers, built tiny with inputs it accepts.

Widths are multiples of 64 wherever the class allows it, so that its linear layers can be sparse; two blocks
of each kind, so that compiling by blocks shares a graph; a batch of one or two and a few dozen tokens. `ZOO`
maps the class name to a builder of (config, inputs); `build` makes the module and the tensors from one seed.
"""

from . import images, others, tokens, videos
from .registry import ZOO, build, transformer_classes

__all__ = ["ZOO", "build", "images", "others", "tokens", "transformer_classes", "videos"]
