"""Which layers read text and image as one sequence, and how many rows of it are text."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

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
# [image, text]: behind the refiners of each alone, the captions of a batch of any lengths.
_TEXT_LAST = {"ZImageTransformer2DModel": "layers.*"}
_CAPTION_MULTIPLE = 32  # to which that model pads each caption


def text_rows_of(
    model: nn.Module, args: Iterable[Any], keywords: Mapping[str, Any]
) -> tuple[str, int] | None:
    """A glob on the names of the layers that read text beside the image, and how many rows of text.

    args, keywords: of a call of the model. Rows are the first of each sample, below 0 the last. None for a
    model that is not known, or a call without text.
    """
    name = type(model).__name__
    if name not in _TEXT_FIRST and name not in _TEXT_LAST:
        return None
    given = inspect.signature(type(model).forward).bind_partial(model, *args, **keywords).arguments
    if name in _TEXT_FIRST:
        text = given.get("encoder_hidden_states")
        return None if text is None else (_TEXT_FIRST[name], text.shape[1])
    captions = given.get("cap_feats")
    # a call that edits pictures has captions for each part and puts them in front
    if not captions or not all(isinstance(one, Tensor) for one in captions):
        return None
    return _TEXT_LAST[name], -max(-(-len(one) // _CAPTION_MULTIPLE) for one in captions) * _CAPTION_MULTIPLE


def joint_text_rows(
    study: Sensitivity, names: Iterable[str], given: Mapping[str, int] | None = None
) -> dict[str, int]:
    """layer → rows of each sample that are text (the first, below 0 the last), where rows are text and image.

    given: glob on layer names → rows, for models that are not known here. Known ones are asked for the
    longest text of the study's own prompts; empty for a model that is neither. Raises ValueError for a glob
    that matches none of the names.
    """
    names = list(names)
    if given:
        for wanted in given:
            if not any(fnmatchcase(name, wanted) for name in names):
                raise ValueError(f"text rows of {wanted!r}: no layer that may be sparse has such a name")
        return {name: rows for name in names for glob, rows in given.items() if fnmatchcase(name, glob)}
    found = [text_rows_of(study.workload.model, *call) for call in study.first_calls()]
    known = [one for one in found if one is not None]
    if not known:
        return {}
    glob, rows = max(known, key=lambda one: abs(one[1]))
    return {name: rows for name in names if fnmatchcase(name, glob)}
