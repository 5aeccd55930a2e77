"""A sparse layer inside a graph: `sparsify` → `sparse_linear` → reshape, and how passes change it.

s = sparsify(…, lora_down=[A₁; A₂; A₃])
y₁ = sparse_linear(*s[:3], t[:, columns of A₁], W₁, lora_up=B₁)
y₂ = sparse_linear(*s[:3], t[:, columns of A₂ and A₃], W₂, lora_up=[B₂ B₃])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..runtime import ops
from .graph import insert, replace, tensor
from .mutation import Mutations

META = "rt_lynx"  # key of node.meta: Note of a sparse_linear; {down: (start, rank)} of a sparsify
_PREPARED = "rt_lynx_downs"  # key of a sparsify's meta: {down-projection: it in the layer's dtype, padded}
_SHAPE = "shape"  # what META holds for the reshape behind a sparse_linear
RANK_MULTIPLE = 16  # the LoRA branch runs in steps of 16 on tensor cores


@dataclass(frozen=True)
class Branch:
    """One LoRA branch: t · upᵀ with t = z · downᵀ. own: it makes up for pruning, so no dense layer has it."""

    down: fx.Node
    up: fx.Node
    own: bool


@dataclass
class Note:
    """What a later pass must know of a `sparse_linear` beyond its arguments.

    min_tokens: 0 unless it is for the run time to choose. folded: the bias holds W·μ, and that of the dense
    layer is `dense_bias`; otherwise they are the same.
    """

    name: str
    min_tokens: int = 0
    branches: list[Branch] = field(default_factory=list)
    folded: bool = False
    dense_bias: fx.Node | None = None


@dataclass
class Site:
    """One sparse layer. y: the `sparse_linear`.  out: y in the shape of the layer's output."""

    sparsify: fx.Node
    y: fx.Node
    out: fx.Node
    note: Note

    @property
    def side(self) -> str:
        """On which of `ops.SIDES` the output holds more than what the layer computes; "" if on none."""
        return next((side for side in ops.SIDES if side in self.y.kwargs), "")

    def absorb(
        self, consumed: fx.Node, mutations: Mutations, shape: Sequence[Any] | None = None, **epilogue: Any
    ) -> bool:
        """Compute the layer where `consumed` is, with further arguments, in its place.

        shape: of the result, where that is another than the layer's. False, and nothing done, if an operand
        may be written to in between, or if the output holds more than what the layer computes.
        """
        if self.side:
            return False
        if any(mutations.between(read, self.y, consumed) for read in self.y.all_input_nodes):
            return False
        # where dense or sparse is chosen at run time, X is read where the layer is computed
        if some_choose(self) and any(
            mutations.between(read, self.sparsify, consumed) for read in self.sparsify.all_input_nodes
        ):
            return False
        y = insert(consumed, ops.sparse_linear, self.y.args, self.y, **{**self.y.kwargs, **epilogue})
        y.meta[META] = self.note
        out = y
        if self.out is not self.y:
            out = shaped(y, self.out.args[1] if shape is None else list(shape), consumed)
        for new in dict.fromkeys((y, out)):
            mutations.stand_in(new, consumed)
        replace(consumed, out)
        for old in dict.fromkeys((self.out, self.y)):
            if not old.users:
                old.graph.erase_node(old)
        self.y, self.out = y, out
        return True


def shaped(y: fx.Node, shape: Any, before: fx.Node) -> fx.Node:
    """y (M, N) in the shape of a layer's output."""
    out = insert(before, torch.reshape, (y, shape), y)
    out.meta[META] = _SHAPE
    return out


def sites(graph: fx.Graph) -> Iterator[Site]:
    """Every sparse layer whose output one reshape (or none) stands between it and its readers."""
    for node in list(graph.nodes):
        if node.target is ops.sparsify:
            yield from sites_of(node)


def sites_of(sparsify: fx.Node) -> list[Site]:
    """The layers that read one `sparsify`, in the order they joined."""
    values = next((user for user in sparsify.users if user.args[1] == 0), None)
    found = []
    for y in [] if values is None else list(values.users):
        if y.target is not ops.sparse_linear:
            continue
        readers = list(y.users)
        reshaped = len(readers) == 1 and readers[0].meta.get(META) is _SHAPE  # ours, not one of the model
        found.append(Site(sparsify, y, readers[0] if reshaped else y, y.meta.get(META, Note(y.name))))
    return found


def some_choose(site: Site) -> bool:
    """Whether a layer of this X runs dense or sparse as the number of tokens turns out."""
    return any(layer.note.min_tokens > 1 for layer in sites_of(site.sparsify))


def besides_of(layers: Sequence[Site]) -> tuple[list[Any], list[str]]:
    """`besides` and `sides` of an op for several layers; both empty where none has anything beside it."""
    sides = [site.side for site in layers]
    if not any(sides):
        return [], []
    return [site.y.kwargs.get(side) for site, side in zip(layers, sides, strict=True)], sides


def runs_together(sparsify: fx.Node) -> bool:
    """Whether layers that read a `sparsify` are one call already."""
    return any(user.target is ops.sparse_linears for part in sparsify.users for user in part.users)


def padded_branch(
    down: fx.Node, up: fx.Node, at_sparsify: fx.Node, at_layer: fx.Node, dtype: torch.dtype, *, own: bool
) -> Branch:
    """A branch in the layer's dtype, its rank padded with zeros to a whole number of tensor-core steps.

    Layers with one down-projection get one node for it, so that its columns of t are computed once.
    """
    known = at_sparsify.meta.setdefault(_PREPARED, {})
    up = cast(up, dtype, at_layer)
    missing = -rank_of(down) % RANK_MULTIPLE
    if missing:
        up = insert(at_layer, F.pad, (up, (0, missing)), up)
    if down not in known:
        known[down] = _prepared(down, missing, dtype, at_sparsify)
    return Branch(known[down], up, own)


def _prepared(down: fx.Node, missing: int, dtype: torch.dtype, before: fx.Node) -> fx.Node:
    rank, down = rank_of(down), cast(down, dtype, before)
    if missing:
        down = insert(before, F.pad, (down, (0, 0, 0, missing)), down)
        down.meta["example_value"] = torch.empty(rank + missing, 0, dtype=dtype, device="meta")
    return down


def cast(node: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
    """The node in `dtype`; itself where it has that dtype already."""
    example = tensor(node)
    if example is not None and example.dtype == dtype:
        return node
    new = insert(before, torch.ops.aten._to_copy.default, (node,), before, dtype=dtype)
    if example is not None:
        new.meta["example_value"] = torch.empty_like(example, dtype=dtype, device="meta")
    return new


def rank_of(down: fx.Node | None) -> int:
    """R of a LoRA down-projection (R, K); 0 without one."""
    example = tensor(down)
    return 0 if example is None else int(example.shape[0])


def arrange_branches(sparsify: fx.Node) -> None:
    """Stack the down-projections of all layers of one `sparsify` and give each layer its columns of t."""
    layers = [site.y for site in sites_of(sparsify)]
    columns: dict[fx.Node, tuple[int, int]] = {}
    total = 0
    for y in layers:
        for branch in y.meta[META].branches:
            if branch.down not in columns:
                columns[branch.down] = (total, rank_of(branch.down))
                total += rank_of(branch.down)
    if not columns:
        return
    sparsify.meta[META] = columns
    down = _cat(list(columns), 0, sparsify)
    sparsify.kwargs = {**sparsify.kwargs, "lora_down": down}
    t = next(user for user in sparsify.users if user.args[1] == 3)
    for y in layers:
        branches = y.meta[META].branches
        if not branches:
            continue
        parts = _merge([columns[branch.down] for branch in branches])
        pieces = [
            t if length == total else insert(y, torch.narrow, (t, 1, start, length), y)
            for start, length in parts
        ]
        values, metadata, scale, _, weight = y.args
        y.args = (values, metadata, scale, _cat(pieces, 1, y), weight)
        y.kwargs = {**y.kwargs, "lora_up": _cat([branch.up for branch in branches], 1, y)}


def _merge(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring (start, length) ranges joined."""
    merged: list[tuple[int, int]] = []
    for start, length in ranges:
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((start, length))
    return merged


def _cat(nodes: Sequence[fx.Node], dim: int, before: fx.Node) -> fx.Node:
    return nodes[0] if len(nodes) == 1 else insert(before, torch.cat, (list(nodes), dim), nodes[0])
