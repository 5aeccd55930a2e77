"""The compressed 2:4 layout: kept values and the metadata words `wgmma.sp` reads from registers.

For 16-bit types, 64 rows × 64 dense columns take one 32-bit word for each of 128 threads. Thread
t = 32·w + l of a warpgroup holds, for the 16 dense columns 16·(l % 4) … +15 of the block,

    bits  0–15: row 16·w + l // 4
    bits 16–31: row 16·w + l // 4 + 8

and nibble j of a half describes group j of those columns: first kept index | second kept index << 2.
The first k32 step of the block uses sparsity selector 0, the second selector 1, on the same word. The layout
is part of the ops' contract (`ops.VERSION`), also where no tensor core reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .semantics import GROUP, KEPT

BLOCK_ROWS = 64
BLOCK_COLUMNS = 64
WORDS = 128  # metadata words of one 64 × 64 block


def metadata_shape(m: int, k: int) -> tuple[int, int, int]:
    """(row blocks, column blocks, 128) of int32 for X (M, K). Works on SymInts."""
    return (m + BLOCK_ROWS - 1) // BLOCK_ROWS, k // BLOCK_COLUMNS, WORDS


def pack(pruned: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Compress z̃ (M, K) and its mask (two True in each group of 4) to values (M, K/2) and metadata.

    Rows past M in the last row block have metadata 0x4444… (indices 0 and 1). K must be a multiple of 64.
    """
    m, k = pruned.shape
    blocks, columns, _ = metadata_shape(m, k)
    k0, k1, k2, k3 = keep.unflatten(-1, (-1, GROUP)).unbind(-1)
    # two are kept, so the first is among 0, 1, 2 and the second among 1, 2, 3
    first, second = torch.where(k0, 0, torch.where(k1, 1, 2)), torch.where(k3, 3, torch.where(k2, 2, 1))
    index = torch.stack([first, second], -1)
    values = pruned.unflatten(-1, (-1, GROUP)).gather(-1, index).flatten(-2)
    nibbles = torch.full((blocks * BLOCK_ROWS, k // GROUP), 0b0100, dtype=torch.int64, device=pruned.device)
    nibbles[:m] = index[..., 0] | index[..., 1] << 2
    weights = 16 ** torch.arange(GROUP, device=pruned.device)
    halves = (nibbles.unflatten(-1, (columns, 4, GROUP)) * weights).sum(-1)  # (rows, columns, l % 4)
    halves = halves.unflatten(0, (blocks, 4, 2, 8))  # row = 64·block + 16·w + 8·half + l // 4
    words = halves[:, :, 0] | halves[:, :, 1] << 16  # (blocks, w, l // 4, columns, l % 4)
    words = words.permute(0, 3, 1, 2, 4).reshape(blocks, columns, WORDS)
    return values, torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def kept_indices(metadata: Tensor, m: int) -> Tensor:
    """(M, K/4, 2) int64: the two kept positions of each group, ascending. Inverse of `pack`'s metadata."""
    blocks, columns, _ = metadata.shape
    words = metadata.to(torch.int64) & 0xFFFFFFFF
    words = words.reshape(blocks, columns, 4, 8, 4).permute(0, 2, 3, 1, 4)  # block, w, l // 4, column, l % 4
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=2)  # (block, w, half, l // 4, column, l % 4)
    halves = halves.reshape(blocks * BLOCK_ROWS, columns * 4)[:m]
    shifts = 4 * torch.arange(GROUP, device=metadata.device)
    nibbles = (halves[..., None] >> shifts & 0xF).flatten(-2)  # (m, K/4)
    return torch.stack([nibbles & 3, nibbles >> 2], dim=-1)


def unpack(values: Tensor, metadata: Tensor) -> Tensor:
    """z̃ (M, K) from values (M, K/2) and metadata: the exact inverse of `pack`."""
    m, half = values.shape
    dense = values.new_zeros(m, half // KEPT, GROUP)
    dense.scatter_(-1, kept_indices(metadata, m), values.unflatten(-1, (-1, KEPT)))
    return dense.flatten(-2)
