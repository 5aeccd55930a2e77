"""The `rt_lynx::` operators: what rewritten graphs call.

    sparsify       producer(inputs) → compressed values, metadata, row scale, LoRA down-projection t
    sparse_linear  those + W, B, b → y, with activation, gate and residual, and a given part on one side of y
    sparse_linears the layers of one `sparsify` that run one behind the other, in one call
    linears        both for all layers of one X, or the dense layers, as the number of tokens says
    linear         a dense linear layer that carries the data to become sparse; anything but the rt_lynx
                   backend sees an ordinary `aten.linear`

One `sparsify` feeds every linear layer that reads the same X. The definition is `semantics.py`, the
compressed layout `layout.py`; both are covered by `VERSION`, which is an argument of each op so that a change
of meaning misses every compile cache. The implementation here runs anywhere torch does and is the emulation;
`kernels` overrides it on devices it has kernels for.

Registration goes through `Library.impl`, which costs a microsecond or two a call where a Python `custom_op`
costs nine. What compiled graphs pass comes first and by position: a keyword costs half a microsecond.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dense, layout, semantics

VERSION = 4
SIDES = ("left", "top", "bottom")  # where `sparse_linear` may have something beside y
NAMESPACE = "rt_lynx"

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(
    "sparsify(str producer, Tensor?[] inputs, Tensor? lora_down=None, float eps=0.0, float mult_offset=0.0, "
    "Tensor? shift=None, Tensor? score=None, str compensation='norm', int deflated=0, "
    f"int version={VERSION}) -> (Tensor values, Tensor metadata, Tensor scale, Tensor t)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_library.define(
    "sparse_linear(Tensor values, Tensor metadata, Tensor scale, Tensor t, Tensor weight, "
    "Tensor? lora_up=None, Tensor? bias=None, str activation='none', Tensor? gate=None, "
    "Tensor? residual=None, Tensor? left=None, Tensor? top=None, Tensor? bottom=None, "
    f"int version={VERSION}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_library.define(
    "sparse_linears(Tensor values, Tensor metadata, Tensor scale, Tensor[] ts, Tensor[] weights, "
    "Tensor?[] lora_ups, Tensor?[] biases, str[] activations, Tensor?[] gates, Tensor?[] residuals, "
    f"Tensor?[] besides, str[] sides, int version={VERSION}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_library.define(
    "linears(str producer, Tensor?[] inputs, Tensor[] weights, int min_tokens, Tensor?[] biases, "
    "Tensor?[] dense_biases, Tensor?[] lora_ups, int[] columns, str[] activations, Tensor?[] gates, "
    "Tensor?[] residuals, Tensor?[] besides, str[] sides, Tensor? lora_down=None, float eps=0.0, "
    "float mult_offset=0.0, Tensor? shift=None, Tensor? score=None, str compensation='norm', "
    f"int deflated=0, int version={VERSION}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_library.define(
    "linear(Tensor input, Tensor weight, Tensor? bias, Tensor? lora_down, Tensor? lora_up, Tensor? shift, "
    "Tensor? score, Tensor? folded_bias, str decision, int dense_tokens=0, int deflated=0, "
    f"int version={VERSION}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check_version(version: int) -> None:
    if version != VERSION:
        raise ValueError(
            f"this graph was compiled for version {version} of the rt_lynx ops, but {VERSION} is loaded; "
            "call torch.compiler.reset() and compile again"
        )


def producer_shape(producer: str, inputs: Sequence[Tensor | None]) -> tuple[int, int]:
    """(M, K) of the producer's output, by arithmetic on (symbolic) sizes alone."""
    if producer not in semantics.PRODUCERS:
        raise ValueError(f"unknown producer {producer!r}; one of {', '.join(semantics.PRODUCERS)}")
    first = inputs[0]
    assert first is not None
    k = first.shape[-1]
    m = 1
    for size in first.shape[:-1]:
        m = m * size
    if producer.startswith("cat"):
        assert inputs[1] is not None
        k = k + inputs[1].shape[-1]
    return m, k


def _sparsify_reference(
    producer: str,
    inputs: Sequence[Tensor | None],
    lora_down: Tensor | None = None,
    eps: float = 0.0,
    mult_offset: float = 0.0,
    shift: Tensor | None = None,
    score: Tensor | None = None,
    compensation: str = "norm",
    deflated: int = 0,
    version: int = VERSION,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_version(version)
    x = semantics.produce(producer, inputs, eps, mult_offset)
    if x.shape[-1] % layout.BLOCK_COLUMNS:
        raise ValueError(
            f"sparsify needs K % {layout.BLOCK_COLUMNS} == 0, got K = {x.shape[-1]}; run it dense"
        )
    pruned, keep, scale, t = semantics.sparsify(
        x, shift=shift, score=score, lora_down=lora_down, compensation=compensation, deflated=deflated
    )
    values, metadata = layout.pack(pruned, keep)
    return values, metadata, scale, t


def _sparsify_fake(
    producer: str,
    inputs: Sequence[Tensor | None],
    lora_down: Tensor | None = None,
    eps: float = 0.0,
    mult_offset: float = 0.0,
    shift: Tensor | None = None,
    score: Tensor | None = None,
    compensation: str = "norm",
    deflated: int = 0,
    version: int = VERSION,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_version(version)
    x = inputs[0]
    assert x is not None
    m, k = producer_shape(producer, inputs)
    return (
        x.new_empty((m, k // 2)),
        x.new_empty(layout.metadata_shape(m, k), dtype=torch.int32),
        x.new_empty((m,), dtype=semantics.compute_dtype(x.dtype)),
        x.new_empty((m, 0 if lora_down is None else lora_down.shape[0])),
    )


def _sparse_linear_reference(
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    t: Tensor,
    weight: Tensor,
    lora_up: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    left: Tensor | None = None,
    top: Tensor | None = None,
    bottom: Tensor | None = None,
    version: int = VERSION,
) -> Tensor:
    """y (M, N) of `semantics.sparse_linear`, as part of a wider or longer matrix.

    left (M, L): columns in front of y's, (M, L + N).  top, bottom (S, T, N): rows in front of those of each
    of the S samples, or behind them, (S·T + M, N). At most one of them, in values' dtype, on their device.
    """
    _check_version(version)
    check_beside(values, weight.shape[0], left, top, bottom)
    y = semantics.sparse_linear(
        layout.unpack(values, metadata),
        scale,
        t,
        weight,
        lora_up=lora_up,
        bias=bias,
        activation=activation,
        gate=gate,
        residual=residual,
    )
    return placed(y, left, top, bottom)


def check_beside(
    values: Tensor,
    n: int,
    left: Tensor | None,
    top: Tensor | None,
    bottom: Tensor | None,
    op: str = "sparse_linear",
) -> None:
    """Raises TypeError and ValueError for what cannot stand beside, above or below y (M, n).

    values: of M rows, in y's dtype and on its device.
    """
    given = {name: t for name, t in (("left", left), ("top", top), ("bottom", bottom)) if t is not None}
    if len(given) > 1:
        raise ValueError(f"{op}: {' and '.join(given)} are both given; give one, and join the other with cat")
    for name, part in given.items():
        if part.dtype is not values.dtype:
            raise TypeError(f"{op}: {name} is {part.dtype}, expected {values.dtype}; cast it")
        if part.device != values.device:
            raise ValueError(f"{op}: {name} is on {part.device}, expected {values.device}; move it")
        m = values.shape[0]
        if name == "left":
            if part.numel() != m * part.shape[-1]:
                raise ValueError(f"{op}: left has shape {tuple(part.shape)}; expected M = {m} rows")
        elif part.dim() != 3 or part.shape[2] != n or (m % part.shape[0] if part.shape[0] else m):
            raise ValueError(
                f"{op}: {name} has shape {tuple(part.shape)}; expected (S, T, N = {n}) with M = {m} "
                "a multiple of S"
            )


def placed(y: Tensor, left: Tensor | None, top: Tensor | None, bottom: Tensor | None) -> Tensor:
    """y beside `left`, or each sample's rows of it below those of `top` or above those of `bottom`."""
    if left is not None:
        return torch.cat([left.reshape(y.shape[0], left.shape[-1]), y], 1)
    other = top if bottom is None else bottom
    if other is None:
        return y
    samples, n = other.shape[0], y.shape[1]
    own = y.reshape(samples, y.shape[0] // max(samples, 1), n)
    return torch.cat([other, own] if bottom is None else [own, other], 1).flatten(0, 1)


def check_sides(op: str, layers: int, besides: Sequence[Tensor | None], sides: Sequence[str]) -> None:
    """Raises ValueError for lists that `parts` cannot read."""
    if not len(besides) == len(sides) or (sides and len(sides) != layers):
        raise ValueError(
            f"{op}: {len(besides)} besides and {len(sides)} sides for {layers} layers; give one of each for "
            "every layer, or none at all"
        )
    for i, (beside, side) in enumerate(zip(besides, sides, strict=True)):
        if side not in ("", *SIDES) or (beside is None) != (side == ""):
            given = "nothing" if beside is None else "a tensor"
            raise ValueError(
                f"{op}: layer {i} has {given} on side {side!r}; give a tensor on one of {', '.join(SIDES)}, "
                "or None on ''"
            )


def parts(
    besides: Sequence[Tensor | None], sides: Sequence[str], layer: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`left`, `top` and `bottom` of a layer among several.

    besides, sides: what stands beside each layer, and on which of SIDES ("" for none); both empty where
    nothing stands beside any. `check_sides` refuses others.
    """
    left, top, bottom = (besides[layer] if sides and sides[layer] == side else None for side in SIDES)
    return left, top, bottom


def _placed_shape(
    m: int, n: int, left: Tensor | None, top: Tensor | None, bottom: Tensor | None
) -> tuple[int, int]:
    """The shape of `placed`, by arithmetic on (symbolic) sizes alone."""
    if left is not None:
        n = n + left.shape[-1]
    for rows in (top, bottom):
        if rows is not None:
            m = m + rows.shape[0] * rows.shape[1]
    return m, n


def _sparse_linear_fake(
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    t: Tensor,
    weight: Tensor,
    lora_up: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    left: Tensor | None = None,
    top: Tensor | None = None,
    bottom: Tensor | None = None,
    version: int = VERSION,
) -> Tensor:
    _check_version(version)
    return values.new_empty(_placed_shape(values.shape[0], weight.shape[0], left, top, bottom))


def _sparse_linears(
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    ts: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_ups: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    gates: Sequence[Tensor | None],
    residuals: Sequence[Tensor | None],
    besides: Sequence[Tensor | None],
    sides: Sequence[str],
    version: int = VERSION,
) -> list[Tensor]:
    """`sparse_linear` of each layer. besides, sides: as `parts` takes them."""
    _check_version(version)
    check_sides("sparse_linears", len(weights), besides, sides)
    layers = zip(ts, weights, lora_ups, biases, activations, gates, residuals, strict=True)
    return [
        sparse_linear(values, metadata, scale, *layer, *(parts(besides, sides, i) if sides else ()))
        for i, layer in enumerate(layers)
    ]


def _sparse_linears_fake(
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    ts: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_ups: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    gates: Sequence[Tensor | None],
    residuals: Sequence[Tensor | None],
    besides: Sequence[Tensor | None],
    sides: Sequence[str],
    version: int = VERSION,
) -> list[Tensor]:
    _check_version(version)
    check_sides("sparse_linears", len(weights), besides, sides)
    return [
        values.new_empty(_placed_shape(values.shape[0], weight.shape[0], *parts(besides, sides, i)))
        for i, weight in enumerate(weights)
    ]


def _linears(
    producer: str,
    inputs: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    min_tokens: int,
    biases: Sequence[Tensor | None],
    dense_biases: Sequence[Tensor | None],
    lora_ups: Sequence[Tensor | None],
    columns: Sequence[int],
    activations: Sequence[str],
    gates: Sequence[Tensor | None],
    residuals: Sequence[Tensor | None],
    besides: Sequence[Tensor | None],
    sides: Sequence[str],
    lora_down: Tensor | None = None,
    eps: float = 0.0,
    mult_offset: float = 0.0,
    shift: Tensor | None = None,
    score: Tensor | None = None,
    compensation: str = "norm",
    deflated: int = 0,
    version: int = VERSION,
) -> list[Tensor]:
    """Every layer of one X: sparse from `min_tokens` rows on, dense below.

    columns: for each LoRA branch four numbers, its layer, its first row of `lora_down`, its rank, and whether
    it compensates pruning (1), so that the dense layer has it not, or is the user's (0). The branches of a
    layer follow each other as in the columns of its `lora_up`. besides, sides: as `parts` takes them.
    """
    _check_version(version)
    branches = [columns[i : i + 4] for i in range(0, len(columns), 4)]
    m, _ = producer_shape(producer, inputs)
    if m < min_tokens:
        check_sides("linears", len(weights), besides, sides)  # else `sparse_linears` does, once a call
        x = dense.produce(producer, inputs, eps, mult_offset)
        ys = [
            dense.linear(
                x,
                weight,
                branches=[
                    (lora_down[start : start + rank], up)
                    for up, start, rank in _user_branches(branches, i, lora_ups[i])
                    if lora_down is not None
                ],
                bias=dense_biases[i],
                activation=activations[i],
                gate=gates[i],
                residual=residuals[i],
            )
            for i, weight in enumerate(weights)
        ]
        for i, y in enumerate(ys if sides else ()):
            beside = parts(besides, sides, i)
            check_beside(y, y.shape[1], *beside, op="linears")
            ys[i] = placed(y, *beside)
        return ys
    values, metadata, scale, t = sparsify(
        producer, inputs, lora_down, eps, mult_offset, shift, score, compensation, deflated
    )
    ts = []
    for i in range(len(weights)):
        ranges = [(start, start + rank) for layer, start, rank, _ in branches if layer == i]
        if not ranges or ranges == [(0, t.shape[1])]:
            ts.append(t)
        else:
            slices = [t[:, start:end] for start, end in ranges]
            ts.append(slices[0] if len(slices) == 1 else torch.cat(slices, 1))
    lists = ts, weights, lora_ups, biases, activations, gates, residuals
    return sparse_linears(values, metadata, scale, *lists, besides, sides)


def _user_branches(
    branches: Sequence[Sequence[int]], layer: int, up: Tensor | None
) -> list[tuple[Tensor, int, int]]:
    """(columns of lora_up, first row of lora_down, rank) of the user's adapters of one layer."""
    found, column = [], 0
    for owner, start, rank, own in branches:
        if owner == layer and up is not None:
            if not own:
                found.append((up[:, column : column + rank], start, rank))
            column += rank
    return found


def _linears_fake(
    producer: str,
    inputs: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    min_tokens: int,
    biases: Sequence[Tensor | None],
    dense_biases: Sequence[Tensor | None],
    lora_ups: Sequence[Tensor | None],
    columns: Sequence[int],
    activations: Sequence[str],
    gates: Sequence[Tensor | None],
    residuals: Sequence[Tensor | None],
    besides: Sequence[Tensor | None],
    sides: Sequence[str],
    lora_down: Tensor | None = None,
    eps: float = 0.0,
    mult_offset: float = 0.0,
    shift: Tensor | None = None,
    score: Tensor | None = None,
    compensation: str = "norm",
    deflated: int = 0,
    version: int = VERSION,
) -> list[Tensor]:
    _check_version(version)
    check_sides("linears", len(weights), besides, sides)
    x = inputs[0]
    assert x is not None
    m, _ = producer_shape(producer, inputs)
    return [
        x.new_empty(_placed_shape(m, weight.shape[0], *parts(besides, sides, i)))
        for i, weight in enumerate(weights)
    ]


def _linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_down: Tensor | None,
    lora_up: Tensor | None,
    shift: Tensor | None,
    score: Tensor | None,
    folded_bias: Tensor | None,
    decision: str,
    dense_tokens: int = 0,
    deflated: int = 0,
    version: int = VERSION,
) -> Tensor:
    _check_version(version)
    return torch.nn.functional.linear(input, weight, bias)


_library.impl("sparsify", _sparsify_reference, "CompositeExplicitAutograd")
_library.impl("sparse_linear", _sparse_linear_reference, "CompositeExplicitAutograd")
_library.impl("sparse_linears", _sparse_linears, "CompositeExplicitAutograd")
_library.impl("linears", _linears, "CompositeExplicitAutograd")
_library.impl("linear", _linear, "CompositeImplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::linears", _linears_fake, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::sparsify", _sparsify_fake, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::sparse_linear", _sparse_linear_fake, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::sparse_linears", _sparse_linears_fake, lib=_library)

sparsify = torch.ops.rt_lynx.sparsify.default
sparse_linear = torch.ops.rt_lynx.sparse_linear.default
sparse_linears = torch.ops.rt_lynx.sparse_linears.default
linears = torch.ops.rt_lynx.linears.default
linear = torch.ops.rt_lynx.linear.default
