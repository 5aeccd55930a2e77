"""`sparse_linear` on Hopper (csrc/sparse_gemm_sm90.cu): choice of the tile, tensor maps, launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import build
from .calls import Call, Launch, pointers
from .launch import TENSOR_MAP_BYTES, Grid, Kernel, multiprocessors, tensor_map
from .operands import Layer, samples
from .semantics import ACTIVATIONS

SOURCE = "sparse_gemm_sm90.cu"
SMEM_LIMIT = 227 * 1024  # of one block
STEP_K = 64  # dense columns of one sparse step
LORA_STEP = 32  # rank of one LoRA step
MAX_STAGES = 8
RASTER_ROWS = 4096  # rows of X that are walked together before the next columns of W
LAYERS = 4  # of one launch, at most
NEVER = 2**31 - 1  # a column that no tile reaches


class Tile(NamedTuple):
    """One configuration of the kernel.

    consumers: multiplying warpgroups, each with `blocks` blocks of 64 rows. n: columns. cluster_m, cluster_n:
    blocks of a cluster along M (they share weights) and along N (they share activations). split: blocks of a
    cluster that each compute a part of K of one tile.
    """

    consumers: int
    blocks: int
    n: int
    cluster_m: int
    cluster_n: int
    split: int = 1

    @property
    def m(self) -> int:
        """Rows."""
        return 64 * self.blocks * self.consumers

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.cluster_m * self.cluster_n * self.split

    @property
    def threads(self) -> int:
        """Of a block: the consumers and one producer warpgroup."""
        return 128 * (self.consumers + 1)

    @property
    def slot(self) -> int:
        """Bytes of a slot of the ring: weight, values and metadata of one step."""
        return -(-(self.n * 128 + self.m * 64 + self.m // 64 * 512) // 1024) * 1024

    @property
    def stages(self) -> int:
        """Slots of the ring: as many as fit beside the bias, the gate and the barriers."""
        return min(MAX_STAGES, (SMEM_LIMIT - self._vectors - 16 * MAX_STAGES) // self.slot)

    @property
    def smem(self) -> int:
        """Bytes of shared memory of a block."""
        return self.stages * self.slot + self._vectors + 16 * self.stages

    @property
    def _vectors(self) -> int:
        # Room for the gate beside the bias, also where the variant has none: one ring fits both.
        return 2 * self.consumers * 2 * self.n * 4

    def grid(self, m: int, *widths: int) -> tuple[int, int]:
        """Cluster rows and cluster columns of outputs with m rows, which have columns of their own."""
        return -(-m // (self.m * self.cluster_m)), sum(-(-n // (self.n * self.cluster_n)) for n in widths)


# Tiles with the dense-equivalent TFLOP/s of their multiplications when they fill the chip. These and the
# numbers below fit every tile's times over 34 shapes: what is chosen loses 4% at most (docs/kernels_gemm.md).
RATES = {
    Tile(consumers=2, blocks=2, n=192, cluster_m=2, cluster_n=1): 1065,
    Tile(consumers=2, blocks=1, n=256, cluster_m=2, cluster_n=1): 1070,
    Tile(consumers=3, blocks=1, n=192, cluster_m=2, cluster_n=1): 1045,
    Tile(consumers=2, blocks=2, n=128, cluster_m=1, cluster_n=2): 1015,
    Tile(consumers=2, blocks=1, n=192, cluster_m=2, cluster_n=1): 970,
    Tile(consumers=2, blocks=1, n=128, cluster_m=1, cluster_n=2): 810,
    Tile(consumers=2, blocks=2, n=192, cluster_m=1, cluster_n=1, split=2): 1025,
    Tile(consumers=2, blocks=2, n=128, cluster_m=1, cluster_n=1, split=2): 1070,
    Tile(consumers=2, blocks=1, n=192, cluster_m=1, cluster_n=1, split=2): 960,
    Tile(consumers=2, blocks=2, n=128, cluster_m=1, cluster_n=1, split=4): 705,
    Tile(consumers=2, blocks=1, n=128, cluster_m=1, cluster_n=1, split=4): 710,
}
TILE_OVERHEAD = 2.5e-6  # seconds a tile takes beside its multiplications
SPLIT_OVERHEAD = 3.4e-6  # seconds more for the exchange of partial sums
FILLED_BY_FOUR = 0.91  # share of the multiprocessors that clusters of four blocks can occupy
# The chip is bound by power: multiprocessors without a tile let the others run faster, up to the highest
# clock. A part-empty wave therefore costs less than its share.
IDLE_EXPONENT = 0.7
CLOCK_HEADROOM = 1.25


def _tail_level(tile: Tile, tail: bool, m: int, sample_rows: Sequence[int]) -> int:
    """The variant's TAIL. tail: a gate or a residual. sample_rows: of X for each row of a bias or a gate."""
    meet = any(rows < m and rows % (64 * tile.blocks) for rows in sample_rows)
    return 2 if meet else int(tail)


def _clusters(tile: Tile, processors: int) -> int:
    """How many clusters of a tile run at once. Those of four do not fill every group of multiprocessors."""
    return int(processors * (FILLED_BY_FOUR if tile.cluster > 2 else 1.0)) // tile.cluster


@functools.lru_cache(maxsize=4096)
def choose(m: int, n: int | tuple[int, ...], k: int, processors: int) -> Tile:
    """The tile with the least predicted time: its measured rate, less what the last wave leaves empty.

    n: the width of a layer, or of each layer of a launch.
    """
    widths = (n,) if isinstance(n, int) else n

    def seconds(tile: Tile) -> float:
        rows, columns = tile.grid(m, *widths)
        slots = _clusters(tile, processors)
        waves = -(-rows * columns // slots)
        flops = 2.0 * tile.m * tile.cluster_m * rows * tile.n * tile.cluster_n * columns * k
        idle = waves * slots / (rows * columns)
        slowdown = max(idle**IDLE_EXPONENT, idle / CLOCK_HEADROOM)
        overhead = TILE_OVERHEAD + (SPLIT_OVERHEAD if tile.split > 1 else 0.0)
        return flops / (RATES[tile] * 1e12) * slowdown + waves * overhead

    return min((tile for tile in RATES if tile.split <= k // STEP_K), key=seconds)


@functools.cache
def kernel(tile: Tile, dtype: torch.dtype, activation: str, tail: int) -> Kernel:
    """The variant for a tile, an element type and an epilogue.

    tail: 0 for none, 1 for a gate or a residual, 2 where samples may also meet in the rows of a warpgroup.
    """
    return Kernel(
        SOURCE,
        "sparse_gemm",
        parameters="TT"
        + 3 * LAYERS * "T"
        + "PPPP"
        + LAYERS * "P"
        + LAYERS * "O"
        + 5 * LAYERS * "i"
        + "iiiii",
        threads=tile.threads,
        smem=tile.smem,
        cluster=tile.cluster,
        overlap=True,
        defines={
            "BF16": int(dtype == torch.bfloat16),
            "CONSUMERS": tile.consumers,
            "BLOCKS": tile.blocks,
            "TILE_N": tile.n,
            "STAGES": tile.stages,
            "CLUSTER_M": tile.cluster_m,
            "CLUSTER_N": tile.cluster_n,
            "SPLIT": tile.split,
            "ACTIVATION": list(ACTIVATIONS).index(activation),
            "TAIL": tail,
        },
    )


def kernel_for(
    device: int,
    dtype: torch.dtype,
    m: int,
    n: int | tuple[int, ...],
    k: int,
    activation: str,
    tail: bool,
    sample_rows: int | None = None,
) -> Kernel:
    """The kernel that is launched for these sizes.

    n: the width of a layer, or of each layer of a launch. tail: a gate, a residual or both. sample_rows: rows
    of X for each row of the bias or the gate; all by default.
    """
    tile = choose(m, n, k, multiprocessors(device))
    return kernel(tile, dtype, activation, _tail_level(tile, tail, m, (sample_rows or m,)))


def variants() -> Iterator[build.Unit]:
    """Every variant that a call can ask for."""
    for tile, dtype, activation, tail in product(
        RATES, (torch.bfloat16, torch.float16), ACTIVATIONS, range(3)
    ):
        yield kernel(tile, dtype, activation, tail).unit("sm_90a")


def prepare_all(
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    layers: Sequence[Layer],
    *,
    y_stride: int = 0,
    tile: Tile | None = None,
) -> Call:
    """The call that computes y (M, N) of each layer of one X. Layers that can be share a launch.

    Operands are checked; rows of t may be apart; rank % 16 == 0. y_stride: elements from row to row of each
    y, a multiple of 8; N by default. tile: instead of the one `choose` takes.
    """
    outputs = [((values.shape[0], layer.weight.shape[0]), values.dtype) for layer in layers]
    launches = []
    for group in groups(layers):
        kernel, grid, packed = _pack(values, metadata, scale, [layers[i] for i in group], y_stride, tile)
        launches.append(Launch(kernel, grid, packed, _addresses(group, len(layers))))
    return Call(values.get_device(), outputs, launches)


def groups(layers: Sequence[Layer]) -> list[list[int]]:
    """Which layers share a launch: up to LAYERS that have one activation, and neither gate nor residual."""
    found: list[list[int]] = []
    growing: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        alone = layer.gate is not None or layer.residual is not None
        group = None if alone else growing.get(layer.activation)
        if group is None or len(group) == LAYERS:
            found.append(group := [])
            if not alone:
                growing[layer.activation] = group
        group.append(i)
    return found


def _addresses(group: Sequence[int], outputs: int) -> Callable[..., bytes]:
    """`Launch.outputs` of a launch that writes some of a call's outputs."""
    pack = pointers(len(group))
    return pack if len(group) == outputs else lambda *addresses: pack(*[addresses[i] for i in group])


def _pack(
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    layers: Sequence[Layer],
    y_stride: int,
    tile: Tile | None,
) -> tuple[Kernel, Grid, bytes]:
    """Kernel, grid and parameters of one launch."""
    (m, half), dtype = values.shape, values.dtype
    k, processors = 2 * half, multiprocessors(values.get_device())
    widths = tuple(layer.weight.shape[0] for layer in layers)
    gate, residual = layers[0].gate, layers[0].residual
    tail = gate is not None or residual is not None
    gate_rows = m // samples(gate, widths[0])
    bias_rows = tuple(m // samples(layer.bias, n) for layer, n in zip(layers, widths, strict=True))
    if tile is not None and tile.split > k // STEP_K:
        raise ValueError(f"{tile} cannot split K = {k}: each part needs {STEP_K} columns; take another tile")
    if tile is None:
        tile = choose(m, widths, k, processors)
    rows, columns = tile.grid(m, *widths)
    part_m, part_n = tile.m // tile.cluster_n, tile.n // tile.cluster_m
    fields: list[tuple[Any, ...]] = []  # of each layer: tensor maps, address of the bias, numbers
    begin = 0
    for layer, n, rows_of_bias in zip(layers, widths, bias_rows, strict=True):
        t, up, bias = layer.t, layer.lora_up, layer.bias
        rank = 0 if up is None else up.shape[1]
        fields.append(
            (
                _map(layer.weight, n, k, 64, part_n),
                _map(t if rank else None, m, rank, 32, part_m, t.stride(0) if rank and m > 1 else rank),
                _map(up if rank else None, n, rank, 32, part_n),
                0 if bias is None else bias.data_ptr(),
                n,
                y_stride or n,
                -(-rank // LORA_STEP),
                rows_of_bias,
                begin,
            )
        )
        begin += tile.grid(m, n)[1]
    fields += [(_NO_MAP, _NO_MAP, _NO_MAP, 0, 0, 0, 0, m, NEVER)] * (LAYERS - len(layers))
    weights, ts, ups, biases, *numbers = zip(*fields, strict=True)
    level = _tail_level(tile, tail, m, (*bias_rows, gate_rows))
    variant = kernel(tile, dtype, layers[0].activation, level)
    packed = variant.pack(
        _map(values, m, half, 32, part_m),
        _map(residual, m, widths[0], 64, 64),
        *weights,
        *ts,
        *ups,
        metadata.data_ptr(),
        scale.data_ptr(),
        0 if gate is None else gate.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        *biases,
        *[0] * LAYERS,  # outputs
        *chain.from_iterable(numbers),
        columns,
        m,
        k // STEP_K,
        gate_rows,
        max(1, RASTER_ROWS // (tile.m * tile.cluster_m)),
    )
    clusters = rows * columns if tile.split > 1 else min(rows * columns, processors // tile.cluster)
    return variant, (clusters * tile.cluster, 1, 1), packed


def sparse_gemm(
    values: Tensor, metadata: Tensor, scale: Tensor, *layer: Any, tile: Tile | None = None, **fields: Any
) -> Tensor:
    """y (M, N): `prepare_all` for one layer, the fields of `Layer`, and run."""
    return prepare_all(values, metadata, scale, [Layer(*layer, **fields)], tile=tile).run()[0]


_NO_MAP = bytes(TENSOR_MAP_BYTES)


def _map(
    matrix: Tensor | None, rows: int, columns: int, box_columns: int, box_rows: int, stride: int | None = None
) -> bytes:
    """Tensor map of a row-major matrix whose boxes are as wide as their swizzle; blank without one.

    stride: elements from row to row, where rows do not follow each other.
    """
    if matrix is None:
        return _NO_MAP
    size = matrix.element_size()
    return tensor_map(
        matrix.data_ptr(),
        matrix.dtype,
        (columns, rows),
        ((stride or columns) * size,),
        (box_columns, box_rows),
        box_columns * size,
    )
