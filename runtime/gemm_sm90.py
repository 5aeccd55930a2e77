"""`sparse_linear` on Hopper (csrc/sparse_gemm_sm90.cu): choice of the tile, tensor maps, launch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from . import build
from .launch import TENSOR_MAP_BYTES, Kernel, empty, multiprocessors, tensor_map
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
        """Slots of the ring: as many as fit beside the bias and the barriers."""
        return min(MAX_STAGES, (SMEM_LIMIT - self._bias - 16 * MAX_STAGES) // self.slot)

    @property
    def smem(self) -> int:
        """Bytes of shared memory of a block."""
        return self.stages * self.slot + self._bias + 16 * self.stages

    @property
    def _bias(self) -> int:
        return 2 * self.consumers * self.n * 4

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


@functools.lru_cache(maxsize=4096)
def choose(m: int, n: int, k: int, tail: bool, processors: int) -> Tile:
    """The tile with the least predicted time: its measured rate, less what the last wave leaves empty.

    tail: a gate or a residual follows.
    """

    def seconds(tile: Tile) -> float:
        rows, columns = tile.grid(m, n)
        slots = processors // tile.cluster
        waves = -(-rows * columns // slots)
        flops = 2.0 * tile.m * tile.n * tile.cluster * rows * columns * k
        idle = waves * slots / (rows * columns)
        slowdown = max(idle**IDLE_EXPONENT, idle / CLOCK_HEADROOM)
        return flops / (RATES[tile] * 1e12) * slowdown + waves * TILE_OVERHEAD

    return min((tile for tile in RATES if not (tail and _light(tile))), key=seconds)


@functools.cache
def kernel(tile: Tile, dtype: torch.dtype, activation: str, tail: bool) -> Kernel:
    """The variant for a tile, an element type and an epilogue; tail: a gate, a residual or both."""
    return Kernel(
        SOURCE,
        "sparse_gemm",
        parameters="TTTTTPPPPPiiiiiii",
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
    device: int, dtype: torch.dtype, m: int, n: int, k: int, activation: str, tail: bool
) -> Kernel:
    """The kernel `sparse_gemm` launches for these sizes; tail: a gate, a residual or both."""
    return kernel(choose(m, n, k, tail, multiprocessors(device)), dtype, activation, tail)


def variants() -> Iterator[build.Unit]:
    """Every variant that `sparse_gemm` can ask for."""
    for tile, dtype, activation, tail in product(
        RATES, (torch.bfloat16, torch.float16), ACTIVATIONS, (False, True)
    ):
        if not (tail and _light(tile)):
            yield kernel(tile, dtype, activation, tail).unit("sm_90a")


def sparse_gemm(
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
    tile: Tile | None = None,
) -> Tensor:
    """y (M, N) of `ops.sparse_linear`. Operands are checked; rows of t may be apart; rank % 16 == 0.

    tile: instead of the one `choose` takes.
    """
    m, half = values.shape
    n = weight.shape[0]
    device, dtype = values.get_device(), values.dtype
    y = empty((m, n), dtype, device)
    rank = 0 if lora_up is None else lora_up.shape[1]
    kernel, grid, packed = _launch(
        tile,
        device,
        dtype,
        activation,
        values.data_ptr(),
        metadata.data_ptr(),
        scale.data_ptr(),
        t.data_ptr() if rank else 0,
        weight.data_ptr(),
        0 if lora_up is None else lora_up.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if gate is None else gate.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        y.data_ptr(),
        m,
        n,
        2 * half,
        rank,
        t.stride(0) if rank and m > 1 else rank,
        m if gate is None else m // (gate.numel() // n),
    )
    kernel.launch(device, grid, packed)
    return y


@functools.lru_cache(maxsize=8192)
def _launch(
    tile: Tile | None,
    device: int,
    dtype: torch.dtype,
    activation: str,
    values: int,
    metadata: int,
    scale: int,
    t: int,
    weight: int,
    lora_up: int,
    bias: int,
    gate: int,
    residual: int,
    y: int,
    m: int,
    n: int,
    k: int,
    rank: int,
    t_stride: int,
    rows_per_sample: int,
) -> tuple[Kernel, tuple[int, int, int], bytes]:
    """Kernel, grid and packed parameters for operands at these addresses. Layers see the same ones again."""
    processors = multiprocessors(device)
    tail = bool(gate or residual)
    if tile is None:
        tile = choose(m, n, k, tail, processors)
    rows, columns = tile.grid(m, n)
    part_m, part_n = tile.m // tile.cluster_n, tile.n // tile.cluster_m
    variant = kernel(tile, dtype, activation, tail)
    packed = variant.pack(
        _map(values, dtype, m, k // 2, 32, part_m),
        _map(weight, dtype, n, k, 64, part_n),
        _map(t, dtype, m, rank, 32, part_m, t_stride),
        _map(lora_up, dtype, n, rank, 32, part_n),
        _map(residual, dtype, m, n, 64, 64),
        metadata,
        scale,
        bias,
        gate,
        y,
        m,
        n,
        k // STEP_K,
        -(-rank // LORA_STEP),
        rows_per_sample,
        max(1, RASTER_ROWS // (tile.m * tile.cluster_m)),
        int(residual != 0),
    )
    return variant, (min(rows * columns, processors // tile.cluster) * tile.cluster, 1, 1), packed


def _map(
    pointer: int,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    box_columns: int,
    box_rows: int,
    stride: int | None = None,
) -> bytes:
    """Tensor map of a row-major matrix whose boxes are as wide as their swizzle; blank for a null pointer.

    stride: elements from row to row, where rows do not follow each other.
    """
    if not pointer:
        return bytes(TENSOR_MAP_BYTES)
    size = dtype.itemsize
    return tensor_map(
        pointer,
        dtype,
        (columns, rows),
        ((stride or columns) * size,),
        (box_columns, box_rows),
        box_columns * size,
    )
