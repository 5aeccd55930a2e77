"""The training pictures and captions on the device, and how a batch is drawn from them."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from captions import captions_of, color_word
from PIL import Image
from pipeline import encode, load_text_encoder, patchify
from torch import Tensor

HELD_OUT = 31  # every 31st (emoji, style) pair is kept from training, for the validation loss

# What people ask for most is shown most: the many near-equal flags, people and signs less often.
CATEGORY_WEIGHTS = {"Flags": 0.3, "People & Body": 0.4, "Symbols": 0.5, "Component": 0.1}
MIRRORED = ("Animals & Nature", "Food & Drink")  # no letters, hands or clocks: left and right mean nothing
SMALLEST = 0.85  # of the original size, somewhere within its frame
UNTOUCHED = 0.3  # share of the pictures that keep their size and place


class Batch(NamedTuple):
    """tokens (B, 256, 48) in [−1, 1], text (B, 32, 384), pooled (B, 384)."""

    tokens: Tensor
    text: Tensor
    pooled: Tensor


def augment(pictures: Tensor, mirrored: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, H, W) in [−1, 1] on white, shrunk by up to 15% and moved within the frame, some mirrored.

    mirrored: (B,) bool, the pictures of which half are turned. Nothing leaves the frame.
    """
    size, device = len(pictures), pictures.device
    draw = torch.rand(5, size, device=device, generator=generator)
    scale = torch.where(draw[0] < UNTOUCHED, 1.0, SMALLEST + (1 - SMALLEST) * draw[1])
    shift = (2 * draw[2:4] - 1) * (1 - scale)
    turn = torch.where(mirrored & (draw[4] < 0.5), -1.0, 1.0)
    # the frame's point p shows the picture's point (p − shift) / scale
    affine = torch.zeros(size, 2, 3, device=device)
    affine[:, 0, 0], affine[:, 1, 1] = turn / scale, 1 / scale
    affine[:, 0, 2], affine[:, 1, 2] = -turn * shift[0] / scale, -shift[1] / scale
    grid = F.affine_grid(affine, list(pictures.shape), align_corners=False)
    moved = F.grid_sample(pictures - 1, grid, mode="bicubic", padding_mode="zeros", align_corners=False) + 1
    return torch.where(
        (scale == 1.0)[:, None, None, None] & (turn == 1.0)[:, None, None, None], pictures, moved
    ).clamp(-1, 1)


class Corpus:
    """All pictures and all encoded captions, on the device: an epoch costs no input pipeline."""

    def __init__(self, archive: Path, device: torch.device, limit: int | None = None):
        with zipfile.ZipFile(archive) as folder:
            rows = [json.loads(line) for line in folder.read("metadata.jsonl").decode().splitlines()][:limit]
            pixels = np.stack(
                [np.asarray(Image.open(io.BytesIO(folder.read(row["file_name"])))) for row in rows]
            )
        # uint8; they become floats a batch at a time
        self.pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)
        texts, first, count = [""], [], []
        for i, row in enumerate(rows):
            captions = captions_of(row["names"], row["style"], seed=i, color=color_word(pixels[i]))
            first.append(len(texts))
            count.append(len(captions))
            texts += captions
        self.first, self.count = torch.tensor(first, device=device), torch.tensor(count, device=device)
        self.text, self.pooled = self._encode(texts, device)
        held_out = torch.arange(len(rows), device=device) % HELD_OUT == HELD_OUT - 1
        self.train_rows, self.held_out_rows = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
        weights = torch.tensor([CATEGORY_WEIGHTS.get(row["category"], 1.0) for row in rows], device=device)
        self.weights = weights[self.train_rows]
        self.mirrored = torch.tensor([row["category"] in MIRRORED for row in rows], device=device)

    @staticmethod
    def _encode(texts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        encoder, tokenizer = load_text_encoder()
        encoder.to(device)
        parts = [encode(encoder, tokenizer, texts[i : i + 2048]) for i in range(0, len(texts), 2048)]
        return torch.cat([p[0].bfloat16() for p in parts]), torch.cat([p[1].bfloat16() for p in parts])

    def floats(self, rows: Tensor) -> Tensor:
        return self.pictures[rows].float() / 127.5 - 1

    def sample(self, size: int, drop: float, generator: torch.Generator) -> Batch:
        """A random batch of augmented pictures, random captions; a share `drop` of these is the empty one."""
        device = self.pictures.device
        pick = torch.multinomial(self.weights, size, replacement=True, generator=generator)
        rows = self.train_rows[pick]
        which = torch.rand(size, device=device, generator=generator)
        captions = self.first[rows] + (which * self.count[rows]).long()
        dropped = torch.rand(size, device=device, generator=generator) < drop
        captions = torch.where(dropped, 0, captions)
        pictures = augment(self.floats(rows), self.mirrored[rows], generator)
        return Batch(patchify(pictures), self.text[captions], self.pooled[captions])

    def batch(self, rows: Tensor) -> Batch:
        """These pictures as they are, under their first captions."""
        captions = self.first[rows]
        return Batch(patchify(self.floats(rows)), self.text[captions], self.pooled[captions])
