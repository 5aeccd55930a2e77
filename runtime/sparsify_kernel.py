"""`sparsify` on the GPU: checks arguments, chooses a variant and a geometry, launches csrc/sparsify.cu.

One kernel is compiled for each combination of element type, producer, padded LoRA rank and stored vectors
that a model uses; sizes, strides and the split of K over a cluster are arguments. Same contract as
`ops.sparsify`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import layout, semantics
from . import sparsify_geometry as geometry
from .calls import Call, Launch, pointers
from .launch import Kernel, multiprocessors
from .sparsify_geometry import Geometry, Variant, choose, padded_rank

SOURCE = "sparsify.cu"
DTYPES = (torch.bfloat16, torch.float16)
DEVICE_TYPE = "cuda"
OUTPUTS = 6
# SparsifyParams in csrc/sparsify_tile.cuh
PARAMETERS = "P" * 9 + "O" * OUTPUTS + "q" * 7 + "i" * 9 + "f" * 3 + "i" * 3
ALIGNMENT = 16  # bytes of one copy
MAX_RANK = 128  # of one launch, whose accumulators fit in registers; wider LoRA branches take several
MAX_DEFLATED = 256  # directions, whose t fits in registers

# Macro values of csrc/producers.cuh and csrc/activations.cuh.
_PRODUCER_KINDS = {"identity": 0, "act": 1, "act_mul": 2, "layer_norm": 3, "rms_norm": 4, "cat": 5}
_ACTIVATION_KINDS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "relu": 4}
_VECTORS = ("WEIGHT", "BIAS", "MULT", "ADD", "SHIFT", "SCORE")
_PER_SAMPLE = ("MULT", "ADD", "SHIFT")  # hold a row a sample
_ABSENT, _ELEMENT, _FLOAT = 0, 1, 2


class Plan(NamedTuple):
    """A loaded kernel and what every launch of it on one shape has in common."""

    kernel: Kernel
    grid: tuple[int, int, int]
    held_rounds: int
    slot_rounds: int


def sparsify(producer: str, inputs: Sequence[Tensor | None], **options: Any) -> tuple[Tensor, ...]:
    """The operands of `ops.sparse_linear` from producer(inputs): `prepare` and run."""
    return tuple(prepare(producer, inputs, **options).run())


def prepare(
    producer: str,
    inputs: Sequence[Tensor | None],
    *,
    eps: float = 0.0,
    mult_offset: float = 0.0,
    shift: Tensor | None = None,
    score: Tensor | None = None,
    lora_down: Tensor | None = None,
    compensation: str = "norm",
    deflated: int = 0,
) -> Call:
    """The call that makes the operands of `ops.sparse_linear` from producer(inputs).

    They are values (M, K/2), metadata (ceil(M/64), K/64, 128) int32, scale (M,) fp32 and t (M, R).
    Inputs are bf16 or fp16 CUDA tensors with channels last; rows may be any multiple of 8 elements apart, and
    other layouts are copied. Vectors (weight, bias, mult, add, shift, score) are of the same dtype or fp32.
    mult, add and shift hold one row a sample, M / B rows of X each. lora_down: (R, K), R a multiple of 16.
    deflated: at most MAX_DEFLATED; one launch then computes t, and another reads X again, takes t·A off and
    prunes what is left.
    Raises TypeError for a dtype or device and ValueError for a shape or an alignment the kernel does not
    take.
    """
    x = inputs[0]
    if x is None or producer not in semantics.PRODUCERS:
        raise ValueError(f"unknown producer {producer!r}; one of {', '.join(semantics.PRODUCERS)}")
    dtype, device = x.dtype, x.device
    if dtype not in DTYPES or device.type != DEVICE_TYPE:
        raise TypeError(
            f"the sparsify kernel takes bfloat16 or float16 CUDA tensors, got {dtype} on {device}"
        )
    copies: list[Tensor] = []
    x, x_stride = _rows(x, "the input", dtype, device, copies)
    m, k = x.numel() // max(x.shape[-1], 1), x.shape[-1]
    first_columns, second, second_stride = k, None, 0
    vectors: list[Tensor | None] = [None] * 4
    if producer.endswith("_mul") or producer.startswith("cat"):
        assert inputs[1] is not None
        second, second_stride = _rows(inputs[1], "the second input", dtype, device, copies)
        columns = second.shape[-1]
        if producer.startswith("cat"):
            k += columns
        if second.numel() != m * columns or (k == first_columns and columns != k) or first_columns % 64:
            raise ValueError(
                f"{producer}: inputs of {tuple(x.shape)} and {tuple(second.shape)} do not fit together; "
                "both need the same rows, and for cat the first a multiple of 64 columns"
            )
    elif producer.endswith("_norm"):
        vectors = list(inputs[1:])
    if k % layout.BLOCK_COLUMNS or not k:
        raise ValueError(f"sparsify needs K to be a multiple of {layout.BLOCK_COLUMNS}, got K = {k}")
    if compensation not in semantics.COMPENSATIONS:
        raise ValueError(
            f"unknown compensation {compensation!r}; one of {', '.join(semantics.COMPENSATIONS)}"
        )

    storage, addresses = [], []
    sample_strides, sample_rows = [0] * 3, [1] * 3
    for name, vector in zip(_VECTORS, (*vectors, shift, score), strict=True):
        if vector is None:
            storage.append(_ABSENT)
            addresses.append(0)
        elif name in _PER_SAMPLE:
            vector, stride = _rows(vector, name.lower(), None, device, copies)
            samples = vector.numel() // k
            if samples * k != vector.numel() or not samples or m % samples or vector.shape[-1] != k:
                raise ValueError(
                    f"{name.lower()} {tuple(vector.shape)} needs K = {k} channels and a number of rows "
                    f"that divides M = {m}"
                )
            i = _PER_SAMPLE.index(name)
            sample_strides[i], sample_rows[i] = stride, max(m // samples, 1)
            storage.append(_storage(vector, name, dtype))
            addresses.append(vector.data_ptr())
        else:
            if vector.numel() != k or not vector.is_contiguous() or vector.device != device:
                raise ValueError(
                    f"{name.lower()} needs {k} contiguous elements on {device}, got shape "
                    f"{tuple(vector.shape)} with strides {vector.stride()} on {vector.device}"
                )
            storage.append(_storage(vector, name, dtype))
            addresses.append(_aligned(vector, name.lower()))
    rank = lora_stride = 0
    if lora_down is not None and lora_down.shape[0]:
        lora_down, lora_stride = _rows(lora_down, "lora_down", dtype, device, copies)
        rank = lora_down.shape[0]
        if lora_down.dim() != 2 or lora_down.shape[1] != k or rank % 16:
            raise ValueError(
                f"lora_down needs shape (R, {k}) with R a multiple of 16, got {tuple(lora_down.shape)}; "
                "pad it with zeros"
            )

    if not 0 <= deflated <= min(rank, MAX_DEFLATED):
        raise ValueError(
            f"deflated={deflated} counts leading rows of lora_down, which has {rank}; "
            f"the kernel takes at most {MAX_DEFLATED}"
        )
    # From the launch that computes t to the one that deflates: A as that one wants it, and of a norm's rows
    # mean and 1/σ.
    scratch: list[tuple[tuple[int, ...], torch.dtype]] = []
    if deflated:
        scratch.append(((k, padded_rank(deflated)), dtype))
        if producer.endswith("_norm"):
            scratch.append(((m, 2), torch.float32))
    launches = []

    def add(variant: Variant, begin: int, rows: int, encode: Callable[..., bytes]) -> None:
        p = plan(x.get_device(), variant, m, k)
        packed = p.kernel.pack(
            x.data_ptr(),
            second.data_ptr() if second is not None else 0,
            *addresses,
            lora_down.data_ptr() + begin * lora_stride if rows and lora_down is not None else 0,
            *(0,) * OUTPUTS,
            x_stride,
            second_stride,
            *sample_strides,
            lora_stride,
            rank * dtype.itemsize,
            m,
            k,
            first_columns,
            *sample_rows,
            rows,
            p.held_rounds,
            compensation == "native",
            eps,
            mult_offset,
            semantics.NORM_EPS,
            p.slot_rounds,
            deflated,
            padded_rank(deflated),
        )
        launches.append(Launch(p.kernel, p.grid, packed, encode))

    for begin in range(0, max(rank, 1) if m else 0, MAX_RANK):
        part = min(rank - begin, MAX_RANK)
        variant = Variant(dtype, producer, padded_rank(part), tuple(storage))
        add(variant, begin, part, _only_t(begin * dtype.itemsize) if begin or deflated else pointers(4))
    if deflated and m:
        variant = Variant(dtype, producer, padded_rank(deflated), tuple(storage), True)
        add(variant, 0, deflated, pointers(4 + len(scratch)))
    outputs = [
        ((m, k // 2), dtype),
        (layout.metadata_shape(m, k), torch.int32),
        ((m,), torch.float32),
        ((m, rank), dtype),
    ]
    return Call(x.get_device(), outputs, launches, copies, scratch)


def _only_t(offset: int) -> Callable[..., bytes]:
    """`Launch.outputs` of a launch that writes t, `offset` bytes further on, and the first also scratch."""
    pack = pointers(OUTPUTS)
    if offset:
        return lambda values, metadata, scale, t, *scratch: pack(0, 0, 0, t + offset, 0, 0)
    return lambda values, metadata, scale, t, a, statistics=0: pack(0, 0, 0, t, a, statistics)


def kernels_for(
    producer: str,
    inputs: Sequence[Tensor | None],
    m: int,
    k: int,
    device: int,
    *,
    shift: Tensor | None = None,
    score: Tensor | None = None,
    lora_down: Tensor | None = None,
    deflated: int = 0,
) -> list[Kernel]:
    """The kernels `sparsify` launches for X (m, k). The tensors may be fake: only dtypes are read."""
    first = inputs[0]
    assert first is not None
    vectors = inputs[1:] if producer.endswith("_norm") else [None] * 4
    storage = tuple(
        _ABSENT if v is None else _storage(v, name, first.dtype)
        for name, v in zip(_VECTORS, (*vectors, shift, score), strict=True)
    )
    rank = 0 if lora_down is None else geometry.ceil_div(lora_down.shape[0], 16) * 16
    parts = {min(rank - begin, MAX_RANK) for begin in range(0, max(rank, 1), MAX_RANK)}
    variants = [Variant(first.dtype, producer, padded_rank(part), storage) for part in parts]
    if deflated:
        variants.append(Variant(first.dtype, producer, padded_rank(deflated), storage, True))
    return [plan(device, variant, m, k).kernel for variant in variants]


@functools.lru_cache(maxsize=4096)
def plan(device: int, variant: Variant, m: int, k: int) -> Plan:
    """Kernel and geometry for X (m, k) on `device`."""
    properties = torch.cuda.get_device_properties(device)
    smem = properties.shared_memory_per_multiprocessor
    chosen = choose(variant, m, k, multiprocessors(device), properties.major == 9, smem)
    return plan_with(chosen, variant, m, k, smem)


def plan_with(g: Geometry, variant: Variant, m: int, k: int, smem: int) -> Plan:
    """The launch of one geometry on multiprocessors with `smem` bytes of shared memory."""
    memory = geometry.memory(g, variant, k, smem)
    grid = geometry.row_tiles(m, g.row_warps) * g.splits
    return Plan(_kernel(variant, g, memory.dynamic), (grid, 1, 1), memory.held_rounds, memory.slot_rounds)


@functools.lru_cache(maxsize=1024)
def _kernel(variant: Variant, g: Geometry, smem: int) -> Kernel:
    return Kernel(
        SOURCE,
        "sparsify",
        parameters=PARAMETERS,
        threads=32 * geometry.warps(g),
        defines=defines(variant, g),
        smem=smem,
        cluster=g.splits,
        overlap=True,
    )


def defines(variant: Variant, g: Geometry) -> dict[str, int | str]:
    """The macros csrc/sparsify.cu is compiled with."""
    activation = variant.producer.removeprefix("cat_").removesuffix("_mul")
    if variant.producer.startswith("cat"):
        kind = "cat"
    elif variant.producer.endswith("_mul"):
        kind = "act_mul"
    else:
        kind = variant.producer if variant.producer in _PRODUCER_KINDS else "act"
    return {
        "FLOAT16": int(variant.dtype == torch.float16),
        "PRODUCER": _PRODUCER_KINDS[kind],
        "ACTIVATION": _ACTIVATION_KINDS.get(activation, 0),
        "RANK": variant.rank,
        "DEFLATE": int(variant.deflate),
        **dict(zip(_VECTORS, variant.storage, strict=True)),
        "ROW_WARPS": g.row_warps,
        "COLUMN_WARPS": g.column_warps,
        "SPLITS": g.splits,
        "STAGES": g.stages,
        "MIN_BLOCKS": g.min_blocks,
        "HELPERS": g.helpers,
    }


def _rows(
    tensor: Tensor, name: str, dtype: torch.dtype | None, device: torch.device, copies: list[Tensor]
) -> tuple[Tensor, int]:
    """The tensor and the bytes between its rows; a copy, added to `copies`, where that is no constant."""
    if tensor.device != device or (dtype is not None and tensor.dtype != dtype):
        raise TypeError(
            f"{name} must be {dtype or 'a tensor'} on {device}, got {tensor.dtype} on {tensor.device}"
        )
    size = tensor.element_size()
    if tensor.is_contiguous():
        stride = tensor.shape[-1]
    else:
        found = _row_stride(tensor.shape, tensor.stride())
        if found is None or found * size % ALIGNMENT:
            tensor, found = tensor.contiguous(), tensor.shape[-1]
            copies.append(tensor)
        stride = found
    _aligned(tensor, name)
    return tensor, stride * size


def _row_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """Elements between consecutive rows of an N-D tensor, channels last, or None when that is no constant."""
    if strides[-1] != 1 and shape[-1] != 1:
        return None
    row, rows = None, 1
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if row is None:
            row = stride
        elif stride != row * rows:
            return None
        rows *= size
    return shape[-1] if row is None else row


def _aligned(tensor: Tensor, name: str) -> int:
    pointer = tensor.data_ptr()
    if pointer % ALIGNMENT:
        raise ValueError(
            f"{name} starts at address {pointer:#x}, which is no multiple of {ALIGNMENT} bytes; "
            "pass a clone() of it"
        )
    return pointer


def _storage(vector: Tensor, name: str, dtype: torch.dtype) -> int:
    if vector.dtype == dtype:
        return _ELEMENT
    if vector.dtype == torch.float32:
        return _FLOAT
    raise TypeError(f"{name.lower()} must be {dtype} or torch.float32, got {vector.dtype}")
