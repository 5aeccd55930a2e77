"""`sparse_linear` on Hopper (csrc/sparse_gemm_sm90.cu): choice of the tile, tensor maps, launch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from . import build
from .launch import Kernel, empty, multiprocessors, tensor_map
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


# Tiles with the dense-equivalent TFLOP/s each reaches when it fills the chip (docs/kernels.md).
RATES = {
    Tile(consumers=2, blocks=2, n=192, cluster_m=2, cluster_n=1): 970,
    Tile(consumers=2, blocks=1, n=256, cluster_m=2, cluster_n=1): 945,
    Tile(consumers=3, blocks=1, n=192, cluster_m=2, cluster_n=1): 915,
    Tile(consumers=2, blocks=1, n=192, cluster_m=2, cluster_n=1): 850,
    Tile(consumers=2, blocks=1, n=128, cluster_m=1, cluster_n=2): 750,
    Tile(consumers=2, blocks=1, n=64, cluster_m=1, cluster_n=2): 450,
}
TILE_OVERHEAD = 2e-6  # seconds a tile takes beside its multiplications


def _light(tile: Tile) -> bool:
    """Whether the tile leaves too few registers for an epilogue with a gate or a residual."""
    return tile.blocks * tile.n > 256


@functools.lru_cache(maxsize=4096)
def choose(m: int, n: int, k: int, tail: bool, processors: int) -> Tile:
    """The tile with the least predicted time: waves of tiles, each at the tile's measured rate.

    tail: a gate or a residual follows.
    """

    def seconds(tile: Tile) -> float:
        rows, columns = tile.grid(m, n)
        waves = -(-rows * columns // (processors // tile.cluster))
        flops = 2.0 * tile.m * tile.n * k * processors
        return waves * (flops / (RATES[tile] * 1e12) + TILE_OVERHEAD)

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
    processors = multiprocessors(device)
    tail = gate is not None or residual is not None
    if tile is None:
        tile = choose(m, n, 2 * half, tail, processors)
    y = empty((m, n), dtype, device)
    rank = 0 if lora_up is None else lora_up.shape[1]
    rows, columns = tile.grid(m, n)
    part_m, part_n = tile.m // tile.cluster_n, tile.n // tile.cluster_m
    maps = (
        _map(values, dtype, m, half, 32, part_m),
        _map(weight, dtype, n, 2 * half, 64, part_n),
        _map(t, dtype, m, rank, 32, part_m, rank if m == 1 else t.stride(0)) if rank else NO_MAP,
        _map(lora_up, dtype, n, rank, 32, part_n) if rank else NO_MAP,
        NO_MAP if residual is None else _map(residual, dtype, m, n, 64, 64),
    )
    kernel(tile, dtype, activation, tail)(
        device,
        (min(rows * columns, processors // tile.cluster) * tile.cluster, 1, 1),
        *maps,
        metadata.data_ptr(),
        scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if gate is None else gate.data_ptr(),
        y.data_ptr(),
        m,
        n,
        2 * half // STEP_K,
        -(-rank // LORA_STEP),
        m if gate is None else m // (gate.numel() // n),
        max(1, RASTER_ROWS // (tile.m * tile.cluster_m)),
        int(residual is not None),
    )
    return y


NO_MAP = bytes(128)


def _map(
    tensor: Tensor | None,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    box_columns: int,
    box_rows: int,
    stride: int | None = None,
) -> bytes:
    """Tensor map of a row-major matrix whose boxes are as wide as their swizzle. stride: between its rows."""
    assert tensor is not None
    size = dtype.itemsize
    return tensor_map(
        tensor.data_ptr(),
        dtype,
        (columns, rows),
        ((stride or columns) * size,),
        (box_columns, box_rows),
        box_columns * size,
    )
