"""Which layers read a joint sequence that begins with text, and how many rows of it are text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from .sensitivity import Sensitivity

# Transformers of diffusers that join [text, image] in their single-stream blocks, in this order.
_TEXT_FIRST = {
    "FluxTransformer2DModel": "single_transformer_blocks.*",
    "Flux2Transformer2DModel": "single_transformer_blocks.*",
    "ChromaTransformer2DModel": "single_transformer_blocks.*",
    "BriaTransformer2DModel": "single_transformer_blocks.*",
    "LongCatImageTransformer2DModel": "single_transformer_blocks.*",
    "OvisImageTransformer2DModel": "single_transformer_blocks.*",
}


def text_first_layers(model: nn.Module) -> str | None:
    """A glob on the names of the layers that read text in front of the image; None where none is known."""
    return _TEXT_FIRST.get(type(model).__name__)


def joint_text_rows(
    study: Sensitivity, names: Iterable[str], given: Mapping[str, int] | None = None
) -> dict[str, int]:
    """layer → leading rows of each sample that are text, for layers whose rows are text and image.

    given: glob on layer names → rows, for models that are not known here. Known ones are asked for the text
    length of the study's own prompts; empty for a model that is neither. Raises ValueError for a glob that
    matches none of the names.
    """
    if given:
        names = list(names)
        for wanted in given:
            if not any(fnmatchcase(name, wanted) for name in names):
                raise ValueError(f"text rows of {wanted!r}: no layer that may be sparse has such a name")
        return {name: rows for name in names for glob, rows in given.items() if fnmatchcase(name, glob)}
    glob = text_first_layers(study.workload.model)
    if glob is None:
        return {}
    _, keywords = study.first_call()
    text = keywords.get("encoder_hidden_states")
    return {} if text is None else {name: text.shape[1] for name in names if fnmatchcase(name, glob)}
