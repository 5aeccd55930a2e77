"""Train the emoji FLUX: rectified flow on 64×64 pixels, conditioned on MiniLM token states.

    python examples/emoji_flux/prepare.py
    python examples/emoji_flux/train.py --minutes 8          # about eight minutes of one data-centre GPU

Training is bounded by the clock: warm-up, then a cosine to zero over `--minutes`. A run that was stopped
goes on where its last checkpoint was (`--out` names the run's folder); `--init` starts a new one from trained
weights. The EMA weights are written as a pipeline folder beside the checkpoint, `<out>/model`, in bf16.

    x_σ = (1 − σ)·x + σ·ε,   v = ε − x,   loss = ‖v̂(x_σ, σ, text) − v‖²,   σ = sigmoid(n), n ~ N(m, 1)

The matrices of the blocks are trained with Muon; modulation, embedders, norms and biases with AdamW.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import time
import zipfile
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from captions import captions_of
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from PIL import Image
from pipeline import PATCH, EmojiFluxPipeline, encode, load_text_encoder, patchify, position_ids
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

HERE = Path(__file__).resolve().parent
HELD_OUT = 50  # every 50th (emoji, style) pair is kept from training, for the validation loss
CHECKPOINT_SECONDS = 60
LOG_STEPS = 100

# What people ask for most is shown most: the many near-equal flags, people and signs less often.
CATEGORY_WEIGHTS = {"Flags": 0.3, "People & Body": 0.4, "Symbols": 0.5, "Component": 0.1}

# Every width is a multiple of 64, so that every linear layer of the blocks can be 2:4 sparse.
ARCHITECTURE: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 3 * PATCH * PATCH,
    "num_layers": 2,
    "num_single_layers": 6,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 384,
    "pooled_projection_dim": 384,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 24, 24),
}


@dataclass
class Config:
    """What a run is made of; written to `<out>/training.json`."""

    minutes: float = 8.0
    batch: int = 512
    lr: float = 8e-4
    warmup_steps: int = 500
    weight_decay: float = 0.01
    ema: float = 0.9995
    noise_mean: float = 0.3
    drop_condition: float = 0.1
    seed: int = 0
    compile: bool = False
    init: str = ""


class Batch(NamedTuple):
    """tokens (B, 256, 48) in [−1, 1], text (B, 32, 384), pooled (B, 384)."""

    tokens: Tensor
    text: Tensor
    pooled: Tensor


class Corpus:
    """All pictures and all encoded captions, on the device: an epoch costs no input pipeline."""

    def __init__(self, archive: Path, device: torch.device, limit: int | None = None):
        with zipfile.ZipFile(archive) as folder:
            rows = [json.loads(line) for line in folder.read("metadata.jsonl").decode().splitlines()][:limit]
            pixels = np.stack(
                [np.asarray(Image.open(io.BytesIO(folder.read(row["file_name"])))) for row in rows]
            )
        # uint8 patches; they become floats a batch at a time
        self.tokens = patchify(torch.from_numpy(pixels).permute(0, 3, 1, 2).float()).to(device, torch.uint8)
        texts, self.first, self.count = [""], [], []
        for i, row in enumerate(rows):
            captions = captions_of(row["names"], row["style"], seed=i)
            self.first.append(len(texts))
            self.count.append(len(captions))
            texts += captions
        self.first = torch.tensor(self.first, device=device)
        self.count = torch.tensor(self.count, device=device)
        self.text, self.pooled = self._encode(texts, device)
        held_out = torch.arange(len(rows), device=device) % HELD_OUT == HELD_OUT - 1
        self.train_rows, self.held_out_rows = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
        weights = torch.tensor([CATEGORY_WEIGHTS.get(row["category"], 1.0) for row in rows], device=device)
        self.weights = weights[self.train_rows]

    @staticmethod
    def _encode(texts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        encoder, tokenizer = load_text_encoder()
        encoder.to(device)
        parts = [encode(encoder, tokenizer, texts[i : i + 2048]) for i in range(0, len(texts), 2048)]
        return torch.cat([p[0].bfloat16() for p in parts]), torch.cat([p[1].bfloat16() for p in parts])

    def batch(self, rows: Tensor, captions: Tensor) -> Batch:
        return Batch(self.tokens[rows].float() / 127.5 - 1, self.text[captions], self.pooled[captions])

    def sample(self, size: int, drop: float, generator: torch.Generator) -> Batch:
        """A random batch under random captions; a share `drop` of them is the empty caption."""
        device = self.tokens.device
        pick = torch.multinomial(self.weights, size, replacement=True, generator=generator)
        rows = self.train_rows[pick]
        which = torch.rand(size, device=device, generator=generator)
        captions = self.first[rows] + (which * self.count[rows]).long()
        dropped = torch.rand(size, device=device, generator=generator) < drop
        return self.batch(rows, torch.where(dropped, 0, captions))

    def held_out(self) -> Batch:
        return self.batch(self.held_out_rows, self.first[self.held_out_rows])


def build(device: torch.device, init: str = "") -> FluxTransformer2DModel:
    """The model of the pipeline folder `init`, or a fresh one.

    A fresh model: Xavier weights, zero biases, modulation and output zero: each block starts as the identity.
    """
    if init:
        return FluxTransformer2DModel.from_pretrained(init, subfolder="transformer").train().to(device)
    model = FluxTransformer2DModel(**ARCHITECTURE)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
            if ".norm" in name or name in ("proj_out", "norm_out.linear"):
                torch.nn.init.zeros_(module.weight)
    return model.to(device)


def optimizers(model: torch.nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest, at one learning rate (Muon's is RMS-matched)."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        hidden = "blocks." in name and ".norm" not in name and parameter.ndim == 2
        (matrices if hidden else others).append(parameter)
    rate = {"lr": config.lr, "weight_decay": config.weight_decay}
    fused = others[0].device.type == "cuda"
    return [
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **rate),
        torch.optim.AdamW(others, betas=(0.9, 0.99), fused=fused, **rate),
    ]


def flow_loss(
    model: torch.nn.Module,
    batch: Batch,
    ids: tuple[Tensor, Tensor],
    noise_mean: float,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the velocity at one random σ a picture."""
    clean = batch.tokens
    sigma = (torch.randn(len(clean), device=clean.device, generator=generator) + noise_mean).sigmoid()
    noise = torch.randn(clean.shape, device=clean.device, generator=generator)
    noisy = torch.lerp(clean, noise, sigma[:, None, None])
    with torch.autocast(clean.device.type, torch.bfloat16):
        velocity = model(
            hidden_states=noisy,
            encoder_hidden_states=batch.text,
            pooled_projections=batch.pooled,
            timestep=sigma,
            txt_ids=ids[0],
            img_ids=ids[1],
            return_dict=False,
        )[0]
    return F.mse_loss(velocity.float(), noise - clean)


class Run:
    """One training run: model, its average, optimizer and clock, saved and resumed together."""

    def __init__(self, config: Config, corpus: Corpus, out: Path):
        self.config, self.corpus, self.out = config, corpus, out
        self.device = corpus.tokens.device
        torch.manual_seed(config.seed)
        self.model = build(self.device, config.init)
        self.ema = build(self.device).requires_grad_(False)
        self.ema.load_state_dict(self.model.state_dict())
        self.optimizers = optimizers(self.model, config)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.ids = position_ids(self.device)
        self.step, self.pictures_seen, self.seconds = 0, 0, 0.0
        self.log: list[dict[str, float]] = []
        if self.checkpoint.exists():
            self.resume()
        if config.compile:
            self.model.compile_repeated_blocks(dynamic=False)

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.manual_seed(self.config.seed + state["step"])
        self.step, self.pictures_seen = state["step"], state["pictures_seen"]
        self.seconds, self.log = state["seconds"], state["log"]

    def save(self) -> None:
        """Checkpoint (renamed into place, so that a kill leaves the old one), pipeline folder and figures."""
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "pictures_seen": self.pictures_seen,
            "seconds": self.seconds,
            "log": self.log,
        }
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        self.checkpoint.with_suffix(".tmp").replace(self.checkpoint)
        shipped = build(torch.device("cpu"))
        shipped.load_state_dict(self.ema.state_dict())
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        for parameter in shipped.parameters():
            parameter.data = parameter.data.bfloat16()
        pipe = EmojiFluxPipeline(shipped, scheduler)
        pipe.save_pretrained(self.out / "model", max_shard_size="12MB")
        (self.out / "training.json").write_text(json.dumps(self.figures(), indent=1))

    def figures(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "architecture": ARCHITECTURE,
            "config": asdict(self.config),
            "pictures": len(self.corpus.train_rows),
            "held_out_pictures": len(self.corpus.held_out_rows),
            "captions": len(self.corpus.text) - 1,
            "steps": self.step,
            "pictures_seen": self.pictures_seen,
            "seconds": round(self.seconds, 1),
            "device": torch.cuda.get_device_name(self.device) if cuda else platform.processor() or "cpu",
            "peak_memory_gib": round(torch.cuda.max_memory_allocated(self.device) / 2**30, 1)
            if cuda
            else None,
            "torch": torch.__version__,
            "log": self.log,
        }

    def learning_rate(self) -> float:
        progress = min(self.seconds / (60 * self.config.minutes), 1.0)
        warmup = min((self.step + 1) / self.config.warmup_steps, 1.0)
        return self.config.lr * warmup * 0.5 * (1 + math.cos(math.pi * progress))

    def update(self) -> Tensor:
        """One optimizer step; returns the loss on the device."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate()
        batch = self.corpus.sample(self.config.batch, self.config.drop_condition, self.generator)
        loss = flow_loss(self.model, batch, self.ids, self.config.noise_mean, self.generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        # a short memory first, so that the average does not carry the initial weights along
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1
        self.pictures_seen += self.config.batch
        return loss.detach()

    @torch.no_grad()
    def validate(self) -> float:
        """Loss of the averaged weights on the held-out pictures, always with the same σ and noise."""
        generator = torch.Generator(self.device).manual_seed(0)
        batch = self.corpus.held_out()
        losses = [flow_loss(self.ema, batch, self.ids, self.config.noise_mean, generator) for _ in range(8)]
        return torch.stack(losses).mean().item()

    def train(self, max_steps: int | None = None) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        losses: deque[Tensor] = deque(maxlen=LOG_STEPS)
        total = 60 * self.config.minutes
        with Progress(*columns, TimeRemainingColumn(), refresh_per_second=1) as progress:
            bar = progress.add_task("training", total=round(total), completed=round(self.seconds))
            saved, began = time.perf_counter(), time.perf_counter() - self.seconds
            while self.seconds < total and self.step != max_steps:
                losses.append(self.update())
                self.seconds = time.perf_counter() - began
                if self.step % LOG_STEPS == 0:
                    loss = (
                        torch.stack(list(losses)).mean().item()
                    )  # waits for the device, so the clock is honest
                    self.seconds = time.perf_counter() - began
                    rate = self.pictures_seen / self.seconds
                    self.log.append(
                        {"step": self.step, "seconds": round(self.seconds, 1), "loss": round(loss, 5)}
                    )
                    note = f"step {self.step}  loss {loss:.4f}  {rate:.0f} pictures/s"
                    progress.update(bar, completed=round(self.seconds), description=note)
                if time.perf_counter() - saved > CHECKPOINT_SECONDS:
                    self.checkpoint_now()
                    saved = time.perf_counter()
        self.checkpoint_now()

    def checkpoint_now(self) -> None:
        if self.log and len(self.corpus.held_out_rows):
            self.log[-1]["held_out_loss"] = round(self.validate(), 5)
        self.save()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Config()
    for name, default in asdict(defaults).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(default), default=default)
    parser.add_argument("--data", type=Path, default=HERE / "data" / "emoji.zip")
    parser.add_argument("--out", type=Path, default=HERE / "runs" / "emoji")
    parser.add_argument("--max-steps", type=int, help="stop early, for a smoke test")
    parser.add_argument("--pictures", type=int, help="use only the first pictures, for a smoke test")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    # cuDNN's attention backward fails on these shapes (torch 2.11, H200: illegal memory access)
    torch.backends.cuda.enable_cudnn_sdp(False)
    config = Config(**{name: getattr(args, name) for name in asdict(defaults)})
    run = Run(config, Corpus(args.data, torch.device(args.device), args.pictures), args.out)
    run.train(args.max_steps)
    last = run.log[-1] if run.log else "nothing logged"
    print(f"{run.step} steps, {run.seconds:.0f} s, {last}")
    print(args.out / "model")


if __name__ == "__main__":
    main()
