"""`sparse_linear` on Hopper (csrc/sparse_gemm_sm90.cu): choice of the tile, tensor maps, launch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import build
from .calls import Call, Launch, pointers
from .launch import TENSOR_MAP_BYTES, Kernel, multiprocessors, tensor_map
from .operands import samples
from .semantics import ACTIVATIONS

SOURCE = "sparse_gemm_sm90.cu"
SMEM_LIMIT = 227 * 1024  # of one block
STEP_K = 64  # dense columns of one sparse step
LORA_STEP = 32  # rank of one LoRA step
MAX_STAGES = 8
RASTER_ROWS = 4096  # rows of X that are walked together before the next columns of W


class Tile(NamedTuple):
    """One configuration of the kernel.

    consumers: multiplying warpgroups, each with `blocks` blocks of 64 rows. n: columns. cluster_m, cluster_n:
    blocks of a cluster along M (they share weights) and along N (they share activations).
    """

    consumers: int
    blocks: int
    n: int
    cluster_m: int
    cluster_n: int

    @property
    def m(self) -> int:
        """Rows."""
        return 64 * self.blocks * self.consumers

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.cluster_m * self.cluster_n

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

    def grid(self, m: int, n: int) -> tuple[int, int]:
        """Cluster rows and cluster columns of an (m, n) output."""
        return -(-m // (self.m * self.cluster_m)), -(-n // (self.n * self.cluster_n))


# Tiles with the dense-equivalent TFLOP/s that each reaches when it fills the chip (docs/kernels.md).
RATES = {
    Tile(consumers=2, blocks=2, n=192, cluster_m=2, cluster_n=1): 1000,
    Tile(consumers=2, blocks=1, n=256, cluster_m=2, cluster_n=1): 975,
    Tile(consumers=3, blocks=1, n=192, cluster_m=2, cluster_n=1): 945,
    Tile(consumers=2, blocks=2, n=128, cluster_m=1, cluster_n=2): 930,
    Tile(consumers=2, blocks=1, n=192, cluster_m=2, cluster_n=1): 860,
    Tile(consumers=2, blocks=1, n=128, cluster_m=1, cluster_n=2): 715,
    Tile(consumers=2, blocks=1, n=64, cluster_m=1, cluster_n=2): 475,
}
TILE_OVERHEAD = 2e-6  # seconds a tile takes beside its multiplications
# The chip is bound by power: multiprocessors without a tile let the others run faster, up to the highest
# clock. A part-empty wave therefore costs less than its share; these two numbers fit the measurements.
IDLE_EXPONENT = 0.55
CLOCK_HEADROOM = 1.4


def _light(tile: Tile) -> bool:
    """Whether the tile leaves too few registers for an epilogue with a gate or a residual."""
    return tile.blocks * tile.n > 256


def _has_tail(tile: Tile, tail: bool, m: int, bias_rows: int) -> bool:
    """Whether a call needs the variant with a tail: samples that meet in a warpgroup's rows need it, too."""
    return tail or (bias_rows < m and bias_rows % (64 * tile.blocks) != 0)


@functools.lru_cache(maxsize=4096)
def choose(m: int, n: int, k: int, tail: bool, processors: int, bias_rows: int | None = None) -> Tile:
    """The tile with the least predicted time: its measured rate, less what the last wave leaves empty.

    tail: a gate or a residual follows. bias_rows: rows of X for each row of the bias; all by default.
    """
    rows_of_bias = bias_rows or m

    def seconds(tile: Tile) -> float:
        rows, columns = tile.grid(m, n)
        slots = processors // tile.cluster
        waves = -(-rows * columns // slots)
        flops = 2.0 * tile.m * tile.n * tile.cluster * rows * columns * k
        idle = waves * slots / (rows * columns)
        slowdown = max(idle**IDLE_EXPONENT, idle / CLOCK_HEADROOM)
        return flops / (RATES[tile] * 1e12) * slowdown + waves * TILE_OVERHEAD

    tiles = (tile for tile in RATES if not (_has_tail(tile, tail, m, rows_of_bias) and _light(tile)))
    return min(tiles, key=seconds)


@functools.cache
def kernel(tile: Tile, dtype: torch.dtype, activation: str, tail: bool) -> Kernel:
    """The variant for a tile, an element type and an epilogue.

    tail: a gate, a residual, or a bias whose samples may meet in the rows of one warpgroup.
    """
    return Kernel(
        SOURCE,
        "sparse_gemm",
        parameters="TTTTTPPPPOiiiiiiii",
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
            "ACTIVATION": list(ACTIVATIONS).index(activation),
            "HAS_TAIL": int(tail),
        },
    )


def kernel_for(
    device: int,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    activation: str,
    tail: bool,
    bias_rows: int | None = None,
) -> Kernel:
    """The kernel `sparse_gemm` launches for these sizes.

    tail: a gate, a residual or both. bias_rows: rows of X for each row of the bias; all by default.
    """
    tile = choose(m, n, k, tail, multiprocessors(device), bias_rows)
    return kernel(tile, dtype, activation, _has_tail(tile, tail, m, bias_rows or m))


def variants() -> Iterator[build.Unit]:
    """Every variant that `sparse_gemm` can ask for."""
    for tile, dtype, activation, tail in product(
        RATES, (torch.bfloat16, torch.float16), ACTIVATIONS, (False, True)
    ):
        if not (tail and _light(tile)):
            yield kernel(tile, dtype, activation, tail).unit("sm_90a")


def prepare(
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    t: Tensor,
    weight: Tensor,
    lora_up: Tensor | None,
    bias: Tensor | None,
    activation: str,
    gate: Tensor | None,
    residual: Tensor | None,
    *,
    tile: Tile | None = None,
) -> Call:
    """The call that computes y (M, N) of `ops.sparse_linear`.

    Operands are checked; rows of t may be apart; rank % 16 == 0. tile: instead of the one `choose` takes.
    """
    m, half = values.shape
    n, k = weight.shape
    device, dtype = values.get_device(), values.dtype
    rank = 0 if lora_up is None else lora_up.shape[1]
    processors = multiprocessors(device)
    bias_rows, gate_rows = m // samples(bias, n), m // samples(gate, n)
    tail = gate is not None or residual is not None
    if tile is None:
        tile = choose(m, n, k, tail, processors, bias_rows)
    rows, columns = tile.grid(m, n)
    part_m, part_n = tile.m // tile.cluster_n, tile.n // tile.cluster_m
    variant = kernel(tile, dtype, activation, _has_tail(tile, tail, m, bias_rows))
    packed = variant.pack(
        _map(values, m, half, 32, part_m),
        _map(weight, n, k, 64, part_n),
        _map(t if rank else None, m, rank, 32, part_m, t.stride(0) if rank and m > 1 else rank),
        _map(lora_up if rank else None, n, rank, 32, part_n),
        _map(residual, m, n, 64, 64),
        metadata.data_ptr(),
        scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if gate is None else gate.data_ptr(),
        0,  # y
        m,
        n,
        k // STEP_K,
        -(-rank // LORA_STEP),
        bias_rows,
        gate_rows,
        max(1, RASTER_ROWS // (tile.m * tile.cluster_m)),
        int(residual is not None),
    )
    grid = min(rows * columns, processors // tile.cluster) * tile.cluster, 1, 1
    return Call(device, [((m, n), dtype)], [Launch(variant, grid, packed, pointers(1))])


def sparse_gemm(*operands: Any, tile: Tile | None = None, **options: Any) -> Tensor:
    """y (M, N): `prepare` and run."""
    return prepare(*operands, tile=tile, **options).run()[0]


def _map(
    matrix: Tensor | None, rows: int, columns: int, box_columns: int, box_rows: int, stride: int | None = None
) -> bytes:
    """Tensor map of a row-major matrix whose boxes are as wide as their swizzle; blank without one.

    stride: elements from row to row, where rows do not follow each other.
    """
    if matrix is None:
        return bytes(TENSOR_MAP_BYTES)
    size = matrix.element_size()
    return tensor_map(
        matrix.data_ptr(),
        matrix.dtype,
        (columns, rows),
        ((stride or columns) * size,),
        (box_columns, box_rows),
        box_columns * size,
    )
