"""Concatenation in front of a linear layer (FLUX's single-stream blocks), folded into `sparsify`.

    h = cat([attention, gelu(mlp)], -1)                 s = sparsify("cat_gelu", [attention, mlp])
    s = sparsify("identity", [h])              →        y = sparse_linear(*s, …)
    y = sparse_linear(*s, …)

The concatenated tensor, the widest of the block, is never written.
"""

from __future__ import annotations

from torch import fx

from ..runtime import layout
from .graph import arg, kind, same_shape, same_size, skip_casts, tensor
from .producer import Producer, activation_of, fold, skip_cast_of_result


def fold_concatenations(graph: fx.Graph) -> int:
    """Run the pass; returns the number of concatenations folded."""
    return fold(graph, match_concatenation)


def match_concatenation(x: fx.Node) -> Producer | None:
    """cat([first, act(second)] or [first, second]) along the channels, the first a whole number of blocks."""
    core, out = skip_cast_of_result(x), tensor(x)
    if kind(core) != "cat" or out is None or arg(core, "dim", 0) not in (-1, out.dim() - 1):
        return None
    parts = arg(core, "tensors")
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return None
    first, second = parts
    found = activation_of(second)
    name, second = found if found is not None else ("", skip_casts(second))
    first = skip_casts(first)
    a, b = tensor(first), tensor(second)
    if a is None or b is None or a.dtype != out.dtype or b.dtype != out.dtype or a.dim() != b.dim():
        return None
    width = a.shape[-1]
    if (
        not isinstance(width, int)
        or not width
        or same_size(b.shape[-1], 0)
        or width % layout.BLOCK_COLUMNS
        or not same_shape(a.shape[:-1], b.shape[:-1])
    ):
        return None
    return Producer(f"cat_{name}" if name else "cat", (first, second))
