"""Safe choices for users without a profile: what stays dense in well-known models.

    torch.compile(pipe.transformer, backend="rt_lynx", options=rules.options("flux.1-dev"))

Two sources agree on them: the layers RT-Lynx (arXiv 2605.26632) leaves dense by hand, and the end-to-end
sensitivity of a small FLUX (docs/quality.md), in which the text stream and the attention output of
dual-stream blocks hold few FLOPs and much of the damage. `dense_steps` are not part of an option: they need a
profile.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rules:
    """skip: globs of layers that stay dense.  why: a sentence for each group of them."""

    model: str
    skip: tuple[str, ...]
    why: str


_TEXT_STREAM = ("*.add_q_proj", "*.add_k_proj", "*.add_v_proj", "*.to_add_out")

RULES = {
    "flux.1-dev": Rules(
        "FluxTransformer2DModel",
        (*_TEXT_STREAM, "*.ff_context.*", "*.to_out.0", "single_transformer_blocks.*.proj_out"),
        "text stream and attention outputs; proj_out of a single block is one of these too",
    ),
    "qwen-image": Rules(
        "QwenImageTransformer2DModel",
        (*_TEXT_STREAM, "*.txt_mlp.*", "*.to_out.0"),
        "text stream and attention outputs",
    ),
    "z-image": Rules(
        "ZImageTransformer2DModel",
        ("*.attention.to_out.0", "*.feed_forward.w1", "*.feed_forward.w3", "context_refiner.*"),
        "attention outputs and MLP up, which the paper leaves dense, and the blocks that see text alone",
    ),
}


def options(model: str, **more: Any) -> dict[str, Any]:
    """Options of the backend for a known model; `more` are further ones, a `skip` among them is added.

    Raises ValueError for an unknown model, naming the nearest known one.
    """
    key = model.lower().rsplit("/", 1)[-1]
    if key not in RULES:
        near = difflib.get_close_matches(key, RULES, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no rules for {model!r}; {hint}Known are {', '.join(sorted(RULES))}")
    skip = more.pop("skip", ())
    return {**more, "skip": [*RULES[key].skip, *((skip,) if isinstance(skip, str) else skip)]}
