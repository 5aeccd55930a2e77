"""Which linear layers become sparse, and why each of the others does not.

The first rule that speaks decides:

    1. what cannot be                 K % 64, N % 16, quantised weights, … (`Linear.obstacle`); no kernels
    2. the user's globs               skip, then only
    3. the layer's own decision       from a profile or `compile_blocks`
    4. safe defaults                  modulation, embedders, final projection, attention output, text stream
    5. shape                          fewer tokens than min_tokens or the cost model's break-even

The safe defaults hold few FLOPs and most of the damage: text tokens are few and precious, the attention
output enters the residual stream, and modulation sees one row a sample.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import fx

from . import cost
from .options import Options
from .passes import Linear
from .passes.graph import (
    CASTS,
    ROW_MAJOR_VIEWS,
    arg,
    bounds,
    expression,
    hint,
    kind,
    real_users,
    skip_row_views,
    tensor,
)
from .passes.site import rank_of
from .runtime import kernels

NO_KERNELS = "no kernels"  # how every reason of `kernels.unavailable_reason` starts
DEFAULT_MIN_TOKENS = 256  # for devices without a measured table

_ATTENTION_OUTPUT = "attention output"
# Words in a layer's name, one dotted part each, as diffusers and its relatives spell them.
_NAMED_DEFAULTS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (reason, re.compile(pattern))
    for reason, pattern in (
        (
            "modulation",
            r"(^|\.)(distilled_guidance_layer)(\.|$)|"
            r"(^|\.)(\w*norm\w*|\w*modulation\w*|\w*_mod|mod|adaln\w*|adaLN\w*)(\.\d+)?"
            r"(\.(linear|lin|proj|emb|silu|1|fc|linear_1|linear_2|\w*embedder))*$",
        ),
        (
            "embedder",
            r"^(\w+_in)(\.|$)|(^|\.)(\w*embed\w*|patchify\w*|caption_projection|text_proj\w*"
            r"|time_proj\w*|condition_proj\w*|image_proj\w*|t_block)(\.|$)",
        ),
        (
            "text stream of a dual-stream block",
            r"(^|\.)(add_[qkv]_proj|to_add_out|add_qkv_proj|to_added_qkv|ff_context|norm1_context|txt_\w+|"
            r"\w+_context|context_\w+|text_\w+|encoder_\w+_proj|caption_\w+|to_[qkv]_t|to_out_t|ff_t)(\.|$)",
        ),
        (
            _ATTENTION_OUTPUT,
            r"(^|\.)(to_out|out_proj|o_proj|attn_out|attention_out|wo)(\.\d+)?$|(^|\.)\w*att\w*\.(proj|o|out)$",
        ),
    )
)
_CROSS_ATTENTION_TEXT = re.compile(
    r"(^|\.)(attn2|cross_attn\w*|crossattn\w*)\.(to_k|to_v|k|v|kv|to_kv|\w*kv\w*)$"
)
_FINAL = re.compile(
    r"^(proj_out\w*|(all_)?final_layer(\..+)?|head(\..+)?|out|norm_out(\..+)?|output_proj\w*|final_proj\w*)$"
)
_CONDITIONING_ROWS = 64  # a two-dimensional input with fewer rows is one row per sample, not tokens


@dataclass(frozen=True)
class Decision:
    """What becomes of a layer. min_tokens: dense below it, for a symbolic M that may be on either side."""

    sparse: bool
    reason: str
    min_tokens: int = 0


def decide(linears: Sequence[Linear], options: Options) -> list[Decision]:
    """One decision a layer, in order."""
    readers: dict[fx.Node, int] = {}
    for linear in linears:
        readers[linear.x] = readers.get(linear.x, 0) + 1
    tokens_first = any(_rank(linear.x) > 2 for linear in linears)
    return [_decide(linear, options, readers[linear.x], tokens_first) for linear in linears]


def _decide(linear: Linear, options: Options, readers: int, tokens_first: bool) -> Decision:
    if linear.obstacle:
        return Decision(False, linear.obstacle)
    missing = None if options.emulate else kernels.unavailable_reason(linear.device, linear.dtype)
    if missing:
        return Decision(False, missing)
    wished = _wish(linear, options)
    if wished is None and (reason := safe_default(linear, tokens_first)):
        return Decision(False, f"safe default: {reason}")
    if wished is not None and not wished.sparse:
        return wished
    reason = wished.reason if wished else "chosen by default"
    least = _least_tokens(linear, options, readers)
    if least is None:
        return Decision(False, "dense is faster at every token count")
    fewest, most = bounds(linear.m)
    if most < least:
        return Decision(
            False, f"M = {expression(linear.m)} is below the {least} tokens from which on sparse pays"
        )
    if fewest >= least:
        return Decision(True, reason)
    return Decision(True, f"{reason}; dense at run time below {least} tokens", least)


def _wish(linear: Linear, options: Options) -> Decision | None:
    if glob := first_match(linear.name, options.skip):
        return Decision(False, f"skip={glob!r}")
    if options.only:
        glob = first_match(linear.name, options.only)
        return Decision(True, f"only={glob!r}") if glob else Decision(False, "matches no glob of only")
    if linear.wish is not None:
        return Decision(linear.wish == "sparse", "decided for this layer (profile or compile_blocks)")
    return None


def first_match(name: str, globs: Sequence[str]) -> str | None:
    """The first glob that matches a layer's name, or its last parts."""
    return next((g for g in globs if fnmatchcase(name, g) or fnmatchcase(name, f"*.{g}")), None)


def safe_default(linear: Linear, tokens_first: bool = True) -> str | None:
    """Which sensitive class a layer belongs to, None for the others. Order: names, then the graph around it.

    tokens_first: other layers of the graph see (batch, tokens, channels), so two dimensions mean a condition.
    """
    name = linear.name
    if _FINAL.match(name) and not _added_to(linear.node):
        return "final projection"
    for reason, pattern in _NAMED_DEFAULTS:
        if pattern.search(name) and not (reason == _ATTENTION_OUTPUT and _reads_concatenation(linear.x)):
            return reason
    if _CROSS_ATTENTION_TEXT.search(name):
        return "text tokens of a cross-attention"
    if _reads_attention(linear.x):
        return _ATTENTION_OUTPUT
    if _rank(linear.x) <= 2 and hint(linear.m) < (_CONDITIONING_ROWS if tokens_first else 2):
        return "modulation: one row a sample"
    return None


def _rank(node: fx.Node) -> int:
    example = tensor(node)
    return 0 if example is None else example.dim()


def _added_to(node: fx.Node) -> bool:
    """Whether a layer's output joins a residual stream."""
    return any(kind(user) in ("add", "iadd", "mul", "addcmul") for user in real_users(node))


_MOVES = ROW_MAJOR_VIEWS | CASTS | {"transpose", "permute"}


def _reads_attention(node: fx.Node) -> bool:
    while kind(node) in _MOVES:
        node = arg(node, "input")
    return kind(node) == "sdpa"


def _reads_concatenation(node: fx.Node) -> bool:
    """Parallel blocks project attention and MLP by one layer: most of it is the MLP's down projection."""
    node = skip_row_views(node)
    return (
        kind(node) == "cat"
        and len(arg(node, "tensors")) == 2
        and arg(node, "dim", 0) in (-1, _rank(node) - 1)
    )


def _least_tokens(linear: Linear, options: Options, readers: int) -> int | None:
    if options.min_tokens is not None:
        return options.min_tokens
    table = options.cost_table
    if table is None and linear.device.type != "cuda":
        return 1
    if table is None and torch.cuda.is_available():
        table = cost.device_key(torch.cuda.get_device_name(linear.device))
    if table is None:
        return DEFAULT_MIN_TOKENS
    return cost.break_even_tokens(table, linear.n, linear.k, rank_of(linear.down), readers)
