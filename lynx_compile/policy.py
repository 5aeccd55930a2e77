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
from itertools import islice, takewhile

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
    is_one,
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
            r"(^|\.)(distilled_guidance_layer|\w*modulations?(_\w+)?|\w*_mod(_proj)?|mod|ada[lL][nN]\w*|\w*[fF]i[lL][mM]\w*)"
            r"(\.|$)|(^|\.)\w*norm\w*(\.\d+)?(\.(linear|lin|proj|emb|fc|linear_1|linear_2|\w*embedder))*$",
        ),
        (
            "embedder",
            r"^(\w+_in|global_proj|cross_attention_proj)(\.|$)|(^|\.)(\w*embed\w*|patchify\w*|caption_projection"
            r"|text_proj\w*|time_proj\w*|\w*cond(ition)?_proj\w*|image_proj\w*|t_block)(\.|$)",
        ),
        (
            "text stream of a dual-stream block",
            r"(^|\.)(add_[qkv]_proj|to_add_out|add_qkv_proj|to_added_qkv|ff_context|norm1_context|txt_\w+|"
            r"\w+_context|context_\w+|(\w+_)?text_\w+|encoder(_\w+)?_proj|caption_\w+|to_[qkv]_t|to_out_t|ff_t)"
            r"(\.|$)",
        ),
        (
            _ATTENTION_OUTPUT,
            r"(^|\.)(to_out|out_proj|o_proj|attn_out|attention_out|wo|\w*attn_proj)(\.\d+)?$"
            r"|(^|\.)\w*att\w*\.(proj|o|out|out_layer)$",
        ),
    )
)
_CROSS_ATTENTION_TEXT = re.compile(
    r"(^|\.)(attn2|cross_?att\w*)\.(to_k|to_v|to_key|to_value|k|v|k_linear|v_linear|\w*kv\w*)$"
)
_FINAL = re.compile(
    r"^(\w*proj_out\w*|(all_)?final_\w+(\..+)?|head(\..+)?|out|(\w+_)?out_layer(\..+)?|spec_out|norm_out(\..+)?"
    r"|output_proj\w*)$"
)
REPEATED = re.compile(r"\.\d+\.")
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
    whole_model = any(REPEATED.search(linear.name) for linear in linears)
    around = _Surroundings(
        tokens_first=any(_rank(linear.x) > 2 for linear in linears),
        whole_model=whole_model,
        most_rows=max((hint(linear.m) for linear in linears), default=0),
        wrapper=_wrapper([linear.name for linear in linears if not linear.obstacle]) if whole_model else "",
    )
    return [_decide(linear, options, readers[linear.x], around) for linear in linears]


@dataclass(frozen=True)
class _Surroundings:
    """What the other layers of a graph say about one.

    tokens_first: some see (batch, tokens, channels), so two dimensions mean a condition.  whole_model: some
    are in repeated blocks, so a name without a block is at the model's ends.  most_rows: the largest M.
    wrapper: what stands before the model's own names, where it is a part of another module.
    """

    tokens_first: bool = True
    whole_model: bool = True
    most_rows: int = 0
    wrapper: str = ""


def _wrapper(names: Sequence[str]) -> str:
    """The start that all names share in front of the blocks: "base_model.model." of a model inside PEFT's."""
    split = [name.split(".") for name in names]
    numbers = [i for parts in split for i, part in enumerate(parts) if part.isdigit()]
    kept = min(numbers, default=1) - 1  # the part before a number is the list of blocks
    shared = takewhile(lambda same: len(set(same)) == 1, zip(*split, strict=False))
    return "".join(f"{same[0]}." for same in islice(shared, max(kept, 0)))


def _decide(linear: Linear, options: Options, readers: int, around: _Surroundings) -> Decision:
    if linear.obstacle:
        return Decision(False, linear.obstacle)
    missing = None if options.emulate else kernels.unavailable_reason(linear.device, linear.dtype)
    if missing:
        return Decision(False, missing)
    wished = _wish(linear, options)
    if wished is None and (reason := safe_default(linear, around)):
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


def safe_default(linear: Linear, around: _Surroundings) -> str | None:
    """Which sensitive class a layer belongs to, None for the others: by its name, then by the graph."""
    name, inner = linear.name, linear.name.removeprefix(around.wrapper)
    if _FINAL.match(inner) and (around.whole_model or not _added_to(linear.node)):
        return "final projection"
    for reason, pattern in _NAMED_DEFAULTS:
        named = pattern.search(name) or pattern.search(inner)
        if named and not (reason == _ATTENTION_OUTPUT and _reads_concatenation(linear.x)):
            return reason
    if _CROSS_ATTENTION_TEXT.search(name):
        return "text tokens of a cross-attention"
    if _reads_attention(linear.x):
        return _ATTENTION_OUTPUT
    return "modulation: one row a sample" if _is_condition(linear, around) else None


def _is_condition(linear: Linear, around: _Surroundings) -> bool:
    """Whether a layer sees one row per sample while others see tokens."""
    example = tensor(linear.x)
    if example is None or example.dim() <= 2:
        return hint(linear.m) < (_CONDITIONING_ROWS if around.tokens_first else 2)
    one_each = all(is_one(size) for size in example.shape[1:-1])
    return one_each and hint(linear.m) < around.most_rows


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
