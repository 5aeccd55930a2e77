"""How `sparsify` lays out its work: the rows and columns of a block, and what lies in its shared memory."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import layout, semantics

CLUSTERS = (1, 2, 3, 4, 8)  # sizes; 8 is the largest that every chip with clusters has
MAX_STAGES = 3  # more gain nothing
WARPGROUP_RING = 6  # chunks of the LoRA weight it keeps
LONG_ROW = 8192  # columns from which more warps are worth their later start
KILOBYTES_A_UNIT = 5.1  # of x and of the LoRA weight that reach a multiprocessor in one unit of time

_SLOT_BYTES = 16 * 128  # one warp's chunk of one input in shared memory
_RESERVED_BYTES = 1024  # of shared memory a block, by the system


class Variant(NamedTuple):
    """What a kernel is compiled for. rank: of the LoRA branch, padded. storage: of `_VECTORS`.

    deflate: takes t·A off z, where t comes from another launch and `rank` counts the rows of A that it takes.
    """

    dtype: torch.dtype
    producer: str
    rank: int
    storage: tuple[int, ...]
    deflate: bool = False


class Geometry(NamedTuple):
    """How work is laid out.

    A block has row_warps × column_warps warps of 16 rows each, keeps stages − 1 chunks a warp in flight, and
    leaves room for min_blocks of its kind on a multiprocessor. `splits` blocks, a cluster, share the columns.
    helpers: warps beside; with LoRA one that copies the weight, or four, on Hopper, that multiply by it.
    """

    row_warps: int
    column_warps: int
    stages: int
    min_blocks: int
    splits: int
    helpers: int = 0


class Memory(NamedTuple):
    """Shared memory of a block. static, dynamic: bytes.

    held_rounds: rounds of x that stay there between the two passes of a norm. slot_rounds: rounds of slots.
    """

    static: int
    dynamic: int
    held_rounds: int
    slot_rounds: int


def padded_rank(rank: int) -> int:
    """The rank a kernel is compiled for: coarser steps for wider branches keep the variants few."""
    step = 16 if rank <= 64 else 32
    return ceil_div(rank, step) * step


def choose(variant: Variant, m: int, k: int, sms: int, clusters: bool, smem: int) -> Geometry:
    """Geometry for X (m, k) on a chip of `sms` multiprocessors with `smem` bytes of shared memory each.

    Without LoRA a block takes few rows, so that all multiprocessors have work. With LoRA each block reads the
    weight of its columns once, which speaks for more rows, and a cluster's blocks share the columns where
    rows alone cannot fill the chip. Measured on an H200: `docs/kernels_sparsify.md`.
    """
    found = _geometries(_shapes(variant, k, clusters), variant, m, k, sms, clusters, smem)
    if not found:  # little shared memory
        small = [(2, 1, 1, 1) if variant.rank else (1, 4, 1, 0)]
        found = _geometries(small, variant, m, k, sms, clusters, smem)
    return min(found, key=lambda g: _time(g, variant, m, k, sms))


def _shapes(variant: Variant, k: int, clusters: bool) -> list[tuple[int, int, int, int]]:
    """What to try: row warps, column warps, blocks on a multiprocessor and helpers; none spills.

    A warpgroup computes t where that was faster: for wide branches, and for producers that keep the other
    warps busy.
    """
    heavy = variant.producer.endswith(("_norm", "_mul"))
    if not variant.rank:
        return [(1, 16, 1, 0)] if k >= LONG_ROW and not heavy else [(1, 8, 2, 0)]
    if variant.deflate:
        columns = 3 if clusters and variant.rank <= 128 else 2
        return [(4, columns, 1, 1), (5, columns, 1, 1), (2, 5 if columns == 3 else 4, 1, 1)]
    if clusters and variant.rank > 64:
        columns = 2 if sum(map(bool, variant.storage)) > 2 else 3
        return [(4, columns, 1, 4), (2, 6, 1, 4)]
    if variant.rank > 64:
        return [(2, 3, 1, 1), (2, 5, 1, 1)]
    if clusters and variant.rank == 64 and variant.producer == "identity" and not any(variant.storage):
        return [(4, 3, 1, 4), (5, 3, 1, 1), (2, 5, 1, 1)]
    if clusters and variant.rank == 64 and (heavy or variant.producer in semantics.ACTIVATIONS):
        if heavy or any(variant.storage):
            return [(4, 2 if sum(map(bool, variant.storage)) > 2 else 3, 1, 4), (5, 2, 1, 1), (2, 6, 1, 4)]
        return [(4, 4, 1, 4), (5, 3, 1, 4), (2, 6, 1, 4)]
    columns = 3 if clusters and not heavy and not any(variant.storage) else 2
    return [(4, columns, 1, 1), (5, columns, 1, 1), (2, 5, 1, 1)]


def _geometries(
    shapes: list[tuple[int, int, int, int]],
    variant: Variant,
    m: int,
    k: int,
    sms: int,
    clusters: bool,
    smem: int,
) -> list[Geometry]:
    """Each shape in clusters of each useful size, with as many stages as fit."""
    found = []
    for row_warps, column_warps, blocks, helpers in shapes:
        # A warpgroup holds a slot for two rounds more.
        most, least = (MAX_STAGES + 1, 3) if helpers == 4 else (MAX_STAGES, 2)
        shared = clusters and (variant.rank or row_tiles(m, row_warps) < sms)
        for splits in CLUSTERS if shared else (1,):
            if splits > k // layout.BLOCK_COLUMNS:
                break
            options = [
                Geometry(row_warps, column_warps, stages, blocks, splits, helpers)
                for stages in range(most, least - 1, -1)
            ]
            found += [g for g in options if fits(g, variant, k, smem)][:1]
    return found


def _time(g: Geometry, variant: Variant, m: int, k: int, sms: int) -> float:
    """Of the whole launch, in units of one warp's round: about 0.126 µs on an H200."""
    workers = g.row_warps * g.column_warps
    inputs = 2 if variant.producer.endswith("_mul") else 1
    loaded = (2 * inputs * workers + g.column_warps * variant.rank / 8) / KILOBYTES_A_UNIT
    rounds = ceil_div(ceil_div(k // layout.BLOCK_COLUMNS, g.splits), g.column_warps)
    at_once = sms * g.min_blocks
    if g.splits > 2:  # some multiprocessors of a group are left over
        at_once = at_once * 9 // 10
    tiles = row_tiles(m, g.row_warps)
    waves = ceil_div(tiles, max(at_once // g.splits, 1))
    sharing = min(g.min_blocks, ceil_div(tiles * g.splits, sms))
    return waves * sharing * (rounds * max(workers, loaded) + (25 if g.splits > 1 else 10))


def warps(g: Geometry) -> int:
    """Of a block: those that work on X, and their helpers; a warpgroup begins at a multiple of four."""
    workers = g.row_warps * g.column_warps
    return (ceil_div(workers, 4) * 4 if g.helpers == 4 else workers) + g.helpers


def row_tiles(m: int, row_warps: int) -> int:
    """Blocks along M. Metadata is written for whole blocks of 64 rows."""
    return ceil_div(ceil_div(m, layout.BLOCK_ROWS) * layout.BLOCK_ROWS, 16 * row_warps)


def fits(g: Geometry, variant: Variant, k: int, smem: int) -> bool:
    """Whether `min_blocks` blocks fit into `smem` bytes of shared memory."""
    found = memory(g, variant, k, smem)
    return (found.static + found.dynamic + _RESERVED_BYTES) * g.min_blocks <= smem


def memory(g: Geometry, variant: Variant, k: int, smem: int) -> Memory:
    """What a block needs of the `smem` bytes of a multiprocessor, as csrc/sparsify.cu lays it out."""
    rows, columns = 16 * g.row_warps, g.column_warps
    two_passes = variant.producer.endswith("_norm") and not variant.deflate
    columns_of_t = 0 if variant.deflate else variant.rank
    static = 8 * columns * rows + 16 * columns * g.stages + 128  # sums of squares, barriers, alignment
    if any(variant.storage[2:5]):
        static += 3 * 8 * rows  # where each row's sample begins
    if two_passes:
        static += 8 * rows * (columns + g.splits)  # moments
    if g.splits > 1:
        static += g.splits * ceil_div(rows, g.splits) * (4 * max(columns_of_t, 4) + 8)
    inputs = 2 if variant.producer.endswith("_mul") else 1
    round_bytes = g.row_warps * columns * _SLOT_BYTES * inputs
    vectors = g.row_warps * columns * layout.BLOCK_COLUMNS * 2 * sum(variant.storage)
    chunks = WARPGROUP_RING if g.helpers == 4 else g.stages * columns  # of the LoRA weight
    rings = chunks * variant.rank * 128 + g.stages * vectors
    if g.helpers == 4:
        static += 1024  # alignment
    held = 0
    if two_passes:
        rounds = ceil_div(ceil_div(k // layout.BLOCK_COLUMNS, g.splits), columns)
        room = smem // g.min_blocks - _RESERVED_BYTES - static - rings
        held = min(rounds, room // round_bytes)
        if held < rounds:
            held = max(room // round_bytes - g.stages, 0)
        slots = held if held == rounds else held + g.stages
    else:
        slots = g.stages
    partial = 4 * (1 if g.helpers == 4 else columns) * rows * (columns_of_t + 8) if columns_of_t else 0
    return Memory(static, max(rings + slots * round_bytes, partial), held, slots)


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b
