"""RMS norm and rotation of queries and keys in front of attention, in one pass over them.

    n = rms_norm(q, weight, eps)                                r = rotary([q], [weight], [eps], [cos], [sin])
    r = n.float() * cos + quarter_turn(n).float() * sin    →
    r = r.to(q.dtype)

    text, image = rms_norm(t, …), rms_norm(i, …)           →    r = rotary([t, i], …)
    r = rotation of cat([text, image], 1), or cat of both rotations

Channels 2i and 2i + 1 turn together. Both spellings are known: real, with cos and sin for each channel, and
complex, view_as_real(view_as_complex(n) * freqs). Tensors are (B, T, H, D). Neither spelling fuses well
elsewhere: the complex product leaves the compiler, and the real one reads every other element of what a
reduction yields.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..runtime import kernels
from ..runtime.rotary import CHANNELS, rotary
from ..runtime.semantics import compute_dtype
from .graph import (
    arg,
    expression,
    insert,
    interior,
    is_one,
    kind,
    operands,
    replace,
    same_shape,
    same_size,
    skip_casts,
    tensor,
)
from .mutation import Mutations, remove_dead
from .norm import match_norm
from .producer import recognise, skip_cast_of_result

_Tables = dict[tuple[Any, ...], list[fx.Node]]
_COMPLEX = {torch.complex64: torch.float32, torch.complex128: torch.float64}
_TOKENS = 1  # dimension of the tokens


class _Rotation(NamedTuple):
    """x (B, T, H, D) and the angles: (cos, sin), each (B or 1, T, 1, D), or (freqs,), complex, of D/2."""

    x: fx.Node
    angles: tuple[fx.Node, ...]


class _Part(NamedTuple):
    """A part of the sequence: what its norm reads, that norm's weight and eps; eps < 0 stands for no norm."""

    x: fx.Node
    weight: fx.Node | None
    eps: float


def fold_rotations(graph: fx.Graph) -> int:
    """Run the pass; returns the number of rotations and concatenations folded."""
    mutations = Mutations(graph)
    tables: _Tables = {}
    count = 0
    for node in list(graph.nodes):
        rotation = match_rotation(node)
        if rotation is not None:
            count += _rewrite(node, rotation, tables, mutations)
        elif kind(node) == "cat":
            count += _join(node, mutations)
    if count:
        remove_dead(graph)
    return count


def match_rotation(node: fx.Node) -> _Rotation | None:
    """The rotation whose result, in x's dtype, `node` is."""
    core, out = skip_cast_of_result(node), tensor(node)
    if out is None or out.dim() != 4 or not any(same_size(out.shape[-1], size) for size in CHANNELS):
        return None  # a symbolic width, as of a picture (B, C, H, W), must not get a guard
    if out.device.type == "cuda" and out.dtype not in kernels.DTYPES:
        return None
    found = _in_real_numbers(core) if kind(core) == "add" else _in_complex_numbers(core)
    x = None if found is None else tensor(found.x)
    if found is None or x is None or x.dtype != out.dtype or not same_shape(x.shape, out.shape):
        return None
    return found if all(_fits(table, x) for table in found.angles) else None


def _in_real_numbers(core: fx.Node) -> _Rotation | None:
    """x · cos + quarter_turn(x) · sin."""
    if arg(core, "alpha", 1) != 1:
        return None
    for straight, turned in operands(core):
        if kind(straight) != "mul" or kind(turned) != "mul":
            continue
        for across, sin in operands(turned):
            x = _before_quarter_turn(skip_casts(across)) if isinstance(across, fx.Node) else None
            if x is None:
                continue
            for along, cos in operands(straight):
                if isinstance(along, fx.Node) and skip_casts(along) is x and isinstance(cos, fx.Node):
                    return _Rotation(x, (cos, sin)) if isinstance(sin, fx.Node) else None
    return None


def _before_quarter_turn(node: fx.Node) -> fx.Node | None:
    """x of (−x_1, x_0, −x_3, x_2, …)."""
    pairs = _flattened_pairs(node)
    if pairs is None or kind(pairs) != "stack" or arg(pairs, "dim", 0) not in (-1, 4):
        return None
    halves = arg(pairs, "tensors")
    if len(halves) != 2 or kind(halves[0]) != "neg":
        return None
    odd, even = arg(halves[0], "input"), halves[1]
    sources = [_of_pairs(half, index) for half, index in ((even, 0), (odd, 1))]
    return sources[0] if sources[0] is sources[1] else None


def _of_pairs(half: Any, index: int) -> fx.Node | None:
    """x of x.unflatten(-1, (-1, 2)).unbind(-1)[index]."""
    if kind(half) != "getitem" or arg(half, "index") != index:
        return None
    unbound = arg(half, "input")
    if kind(unbound) != "unbind" or arg(unbound, "dim", 0) not in (-1, 4):
        return None
    return _before_pairs(arg(unbound, "input"))


def _in_complex_numbers(core: fx.Node) -> _Rotation | None:
    """view_as_real(view_as_complex(x in pairs) · freqs) flattened."""
    real = _flattened_pairs(core)
    product = arg(real, "input") if real is not None and kind(real) == "view_as_real" else None
    if product is None or kind(product) != "mul":
        return None
    for number, freqs in operands(product):
        if kind(number) == "view_as_complex" and isinstance(freqs, fx.Node):
            x = _before_pairs(arg(number, "input"))
            return None if x is None else _Rotation(x, (freqs,))
    return None


def _before_pairs(node: Any) -> fx.Node | None:
    """x (B, T, H, D), behind casts, of its view as (B, T, H, D/2, 2)."""
    if kind(node) not in ("reshape", "view", "unflatten"):
        return None
    source = arg(node, "input")
    before, after = tensor(source), tensor(node)
    if before is None or after is None or before.dim() != 4 or after.dim() != 5:
        return None
    pairs = same_shape(after.shape[:3], before.shape[:3]) and same_size(after.shape[-1], 2)
    return skip_casts(source) if pairs else None


def _flattened_pairs(node: fx.Node) -> fx.Node | None:
    """The (B, T, H, D/2, 2) of which `node` is (B, T, H, D)."""
    if kind(node) not in ("flatten", "reshape", "view"):
        return None
    source = arg(node, "input")
    before, after = tensor(source), tensor(node)
    if before is None or after is None or before.dim() != 5 or after.dim() != 4:
        return None
    pairs = same_shape(before.shape[:3], after.shape[:3]) and same_size(before.shape[-1], 2)
    return source if pairs else None


def _fits(table: fx.Node, x: Tensor) -> bool:
    """Whether a table of angles has a row a token for all heads: (…, T, 1, D), or (…, T, 1, D/2) complex."""
    angles = tensor(table)
    if angles is None or angles.dim() not in (3, 4) or angles.device != x.device or angles.is_conj():
        return False  # what is conjugated lazily cannot be viewed as real
    numbers = x.shape[-1] // 2 if angles.dtype in _COMPLEX else x.shape[-1]
    if _COMPLEX.get(angles.dtype, angles.dtype) != compute_dtype(x.dtype):
        return False
    fits = same_size(angles.shape[-3], x.shape[_TOKENS]) and same_size(angles.shape[-1], numbers)
    samples = angles.dim() == 3 or is_one(angles.shape[0]) or same_size(angles.shape[0], x.shape[0])
    return fits and is_one(angles.shape[-2]) and samples


def _rewrite(node: fx.Node, rotation: _Rotation, tables: _Tables, mutations: Mutations) -> int:
    for parts in (_normalized_parts(rotation.x), [_Part(rotation.x, None, -1.0)]):
        reads = [
            *rotation.angles,
            *(part.x for part in parts),
            *(p.weight for p in parts if p.weight is not None),
        ]
        inside = interior(node, reads)
        if not parts or not _closed(inside, node) or _outdated(mutations, inside, reads, node):
            continue
        cos, sin = _tables(rotation.angles, tables, node)
        if len(parts) > 1:
            cos, sin = (_split(table, parts, node) for table in (cos[0], sin[0]))
        new = insert(
            node,
            rotary,
            ([p.x for p in parts], [p.weight for p in parts], [p.eps for p in parts], cos, sin),
            node,
        )
        mutations.stand_in(new, node)
        replace(node, new)
        return 1
    return 0


def _normalized_parts(x: fx.Node) -> list[_Part]:
    """The norms in front of x, which may be the concatenation of two of them; empty where there is none."""
    joined = kind(x) == "cat" and arg(x, "dim", 0) == _TOKENS and len(arg(x, "tensors")) == 2
    parts = [_normalized(part) for part in (arg(x, "tensors") if joined else [x])]
    return [part for part in parts if part is not None] if all(parts) else []


def _normalized(x: fx.Node) -> _Part | None:
    producer = recognise(x, match_norm)
    if producer is None or producer.name != "rms_norm" or any(i is not None for i in producer.inputs[2:]):
        return None
    if not isinstance(producer.eps, fx.Node) and producer.eps < 0:  # which says "no norm" to the op
        return None
    source, weight = producer.inputs[:2]
    assert source is not None
    example = tensor(weight)
    vector = weight is None or (example is not None and example.dim() == 1)
    return _Part(source, weight, producer.eps) if vector else None


def _closed(inside: list[fx.Node], result: fx.Node) -> bool:
    """Whether nothing but `result` is read from outside; a size is asked of another tensor as well."""
    members = set(inside)
    return all(
        user in members or kind(user) == "size"
        for node in inside
        if node is not result
        for user in node.users
    )


def _outdated(mutations: Mutations, inside: list[fx.Node], reads: list[fx.Node], node: fx.Node) -> bool:
    return mutations.reach(inside, node) or any(mutations.between(read, read, node) for read in reads)


def _tables(
    angles: tuple[fx.Node, ...], tables: _Tables, before: fx.Node
) -> tuple[list[fx.Node], list[fx.Node]]:
    """cos and sin, (B or 1, T, D/2, 1 or 2): views of the model's tables, made once for what shares these."""
    key = tuple(map(_identity, angles))
    if key not in tables:
        found = []
        for table in angles:
            example = tensor(table)
            assert example is not None
            rows = insert(before, torch.squeeze, (table, -2), before)
            if example.dim() == 3:
                rows = insert(before, torch.unsqueeze, (rows, 0), before)
            if example.dtype in _COMPLEX:
                numbers = insert(before, torch.view_as_real, (rows,), before)
                found = [insert(before, torch.narrow, (numbers, -1, i, 1), before) for i in range(2)]
            else:
                found.append(insert(before, torch.unflatten, (rows, -1, (-1, 2)), before))
        tables[key] = found
    cos, sin = tables[key]
    return [cos], [sin]


def _identity(table: fx.Node) -> tuple[Any, ...]:
    """Equal for queries and keys, which each add the dimension of heads to one table at the same place."""
    example = tensor(table)
    assert example is not None
    samples = (1,) * (4 - example.dim())
    shape = (*samples, *map(expression, example.shape))
    while kind(table) == "unsqueeze" or (
        kind(table) == "getitem"
        and isinstance(index := arg(table, "index"), tuple)
        and all(part is None or part == slice(None) for part in index)
    ):
        table = arg(table, "input")
    return table, shape


def _split(table: fx.Node, parts: list[_Part], before: fx.Node) -> list[fx.Node]:
    """The table's rows for each of two parts."""
    example = tensor(parts[0].x)
    assert example is not None
    length: Any = example.shape[_TOKENS]
    if not isinstance(length, int):
        length = insert(before, torch.ops.aten.sym_size.int, (parts[0].x, _TOKENS), before)
    index = slice(None)
    return [
        insert(before, operator.getitem, (table, (index, slice(begin, end))), before)
        for begin, end in ((None, length), (length, None))
    ]


def _join(cat: fx.Node, mutations: Mutations) -> int:
    """The concatenation along the tokens of rotated parts, done by the rotation itself."""
    parts = arg(cat, "tensors")
    rotated = isinstance(parts, (list, tuple)) and all(
        isinstance(part, fx.Node) and part.target is rotary and list(part.users) == [cat] for part in parts
    )
    if not rotated or arg(cat, "dim", 0) not in (_TOKENS, _TOKENS - 4):
        return 0
    if any(mutations.between(read, part, cat) for part in parts for read in part.all_input_nodes):
        return 0
    lists = ([node for part in parts for node in part.args[i]] for i in range(5))
    new = insert(cat, rotary, tuple(lists), cat)
    mutations.stand_in(new, cat)
    replace(cat, new)
    return 1
