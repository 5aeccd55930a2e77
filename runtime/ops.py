"""The `rt_lynx::` operators: what rewritten graphs call.

    sparsify       producer(inputs) → compressed values, metadata, row scale, LoRA down-projection t
    sparse_linear  those + W, B, b → y, with activation, gate and residual behind
    linear         a dense linear layer that carries the data to become sparse; anything but the rt_lynx
                   backend sees an ordinary `aten.linear`

One `sparsify` feeds every linear layer that reads the same X. The definition is `semantics.py`, the
compressed layout `layout.py`; both are covered by `VERSION`, which is an argument of each op so that a change
of meaning misses every compile cache. The implementation here runs anywhere torch does and is the emulation;
`kernels` overrides it on devices it has kernels for.

Registration goes through `Library.impl`, which costs a microsecond or two a call where a Python `custom_op`
costs nine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import layout, semantics

VERSION = 1
NAMESPACE = "rt_lynx"

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(
    "sparsify(str producer, Tensor?[] inputs, *, float eps=0.0, float mult_offset=0.0, Tensor? shift=None, "
    f"Tensor? score=None, Tensor? lora_down=None, str compensation='norm', int version={VERSION}) "
    "-> (Tensor values, Tensor metadata, Tensor scale, Tensor t)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_library.define(
    "sparse_linear(Tensor values, Tensor metadata, Tensor scale, Tensor t, Tensor weight, *, "
    "Tensor? lora_up=None, Tensor? bias=None, str activation='none', Tensor? gate=None, "
    f"Tensor? residual=None, int version={VERSION}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_library.define(
    "linear(Tensor input, Tensor weight, Tensor? bias, Tensor? lora_down, Tensor? lora_up, Tensor? shift, "
    "Tensor? score, Tensor? folded_bias, str decision, int dense_tokens=0, "
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
    *,
    eps: float = 0.0,
    mult_offset: float = 0.0,
    shift: Tensor | None = None,
    score: Tensor | None = None,
    lora_down: Tensor | None = None,
    compensation: str = "norm",
    version: int = VERSION,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_version(version)
    x = semantics.produce(producer, inputs, eps, mult_offset)
    if x.shape[-1] % layout.BLOCK_COLUMNS:
        raise ValueError(
            f"sparsify needs K % {layout.BLOCK_COLUMNS} == 0, got K = {x.shape[-1]}; run it dense"
        )
    pruned, keep, scale, t = semantics.sparsify(
        x, shift=shift, score=score, lora_down=lora_down, compensation=compensation
    )
    values, metadata = layout.pack(pruned, keep)
    return values, metadata, scale, t


def _sparsify_fake(
    producer: str,
    inputs: Sequence[Tensor | None],
    *,
    eps: float = 0.0,
    mult_offset: float = 0.0,
    shift: Tensor | None = None,
    score: Tensor | None = None,
    lora_down: Tensor | None = None,
    compensation: str = "norm",
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
    *,
    lora_up: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    version: int = VERSION,
) -> Tensor:
    _check_version(version)
    return semantics.sparse_linear(
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


def _sparse_linear_fake(
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    t: Tensor,
    weight: Tensor,
    *,
    lora_up: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    version: int = VERSION,
) -> Tensor:
    _check_version(version)
    return values.new_empty((values.shape[0], weight.shape[0]))


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
    version: int = VERSION,
) -> Tensor:
    _check_version(version)
    return torch.nn.functional.linear(input, weight, bias)


_library.impl("sparsify", _sparsify_reference, "CompositeExplicitAutograd")
_library.impl("sparse_linear", _sparse_linear_reference, "CompositeExplicitAutograd")
_library.impl("linear", _linear, "CompositeImplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::sparsify", _sparsify_fake, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::sparse_linear", _sparse_linear_fake, lib=_library)

sparsify = torch.ops.rt_lynx.sparsify.default
sparse_linear = torch.ops.rt_lynx.sparse_linear.default
linear = torch.ops.rt_lynx.linear.default
