"""Train the emoji FLUX: rectified flow on 64×64 pixels, conditioned on MiniLM token states.

    python examples/emoji_flux/prepare.py
    python examples/emoji_flux/train.py --compile            # about five minutes of one data-centre GPU

Training is bounded by the clock: warm-up, then a cosine to zero over `--minutes`. A run that was stopped
goes on where its last checkpoint was (`--out` names the run's folder). Each checkpoint leaves the EMA weights
as a pipeline folder in bf16, `<out>/model_<seconds>`, and `training.json` says how well it does on held-out
pictures and on ones it has seen; `<out>/model` is a copy of the last.

    x_σ = (1 − σ)·x + σ·ε,   v = ε − x,   loss = ‖v̂(x_σ, σ, text) − v‖²,   σ = sigmoid(n), n ~ N(m, 1)
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from corpus import Batch, Corpus
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from pipeline import PATCH, EmojiFluxPipeline, position_ids
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
LOG_STEPS = 100

# Every width is a multiple of 64, so that every linear layer of the blocks can be 2:4 sparse.
ARCHITECTURE: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 3 * PATCH * PATCH,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 5,
    "joint_attention_dim": 384,
    "pooled_projection_dim": 384,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 24, 24),
}


@dataclass
class Config:
    """What a run is made of; written to `<out>/training.json`."""

    minutes: float = 4.5
    batch: int = 256
    lr: float = 8e-4
    warmup_steps: int = 400
    weight_decay: float = 0.1
    ema: float = 0.9995
    noise_mean: float = 0.3
    drop_condition: float = 0.1
    checkpoint_seconds: float = 90.0
    seed: int = 0
    compile: bool = False


def build(device: torch.device) -> FluxTransformer2DModel:
    """A fresh model: Xavier weights, zero biases; with modulation and output zero a block is the identity."""
    model = FluxTransformer2DModel(**ARCHITECTURE)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
            if ".norm" in name or name in ("proj_out", "norm_out.linear"):
                torch.nn.init.zeros_(module.weight)
    return model.to(device)


def optimizer_of(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = matrices[0].device.type == "cuda"
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=fused)


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
        self.device = corpus.pictures.device
        torch.manual_seed(config.seed)
        self.model = build(self.device)
        self.ema = build(self.device).requires_grad_(False)
        self.ema.load_state_dict(self.model.state_dict())
        self.optimizer = optimizer_of(self.model, config)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.ids = position_ids(self.device)
        self.step, self.pictures_seen, self.seconds = 0, 0, 0.0
        self.log: list[dict[str, float]] = []
        self.checkpoints: list[dict[str, float | str]] = []
        if self.checkpoint.exists():
            self.resume()
        if config.compile:
            self.model.compile_repeated_blocks(dynamic=False)
        self._loss().backward()  # compiles, before the clock starts
        self.optimizer.zero_grad()

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.manual_seed(self.config.seed + state["step"])
        self.step, self.pictures_seen = state["step"], state["pictures_seen"]
        self.seconds, self.log, self.checkpoints = state["seconds"], state["log"], state["checkpoints"]

    def save(self) -> None:
        """Checkpoint (renamed into place: a kill leaves the old one), pipeline folders and figures."""
        name = f"model_{self.seconds:.0f}"
        self.checkpoints.append({"model": name, "step": self.step, **self.validate()})
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "pictures_seen": self.pictures_seen,
            "seconds": self.seconds,
            "log": self.log,
            "checkpoints": self.checkpoints,
        }
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        self.checkpoint.with_suffix(".tmp").replace(self.checkpoint)
        shipped = build(torch.device("cpu"))
        shipped.load_state_dict(self.ema.state_dict())
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        for parameter in shipped.parameters():
            parameter.data = parameter.data.bfloat16()
        pipe = EmojiFluxPipeline(shipped, scheduler)
        pipe.save_pretrained(self.out / name, max_shard_size="12MB")
        shutil.copytree(self.out / name, self.out / "model", dirs_exist_ok=True)
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
            "checkpoints": self.checkpoints,
            "log": self.log,
        }

    def learning_rate(self) -> float:
        progress = min(self.seconds / (60 * self.config.minutes), 1.0)
        warmup = min((self.step + 1) / self.config.warmup_steps, 1.0)
        return self.config.lr * warmup * 0.5 * (1 + math.cos(math.pi * progress))

    def _loss(self) -> Tensor:
        batch = self.corpus.sample(self.config.batch, self.config.drop_condition, self.generator)
        return flow_loss(self.model, batch, self.ids, self.config.noise_mean, self.generator)

    def update(self) -> Tensor:
        """One optimizer step; returns the loss on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self._loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # a short memory first, so that the average does not carry the initial weights along
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1
        self.pictures_seen += self.config.batch
        return loss.detach()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses of the averaged weights on the held-out pictures and on as many that it trained on.

        All pictures unaugmented under their first captions, always with the same σ and noise: the gap between
        the two is what the model has learnt by heart. Empty when nothing is held out.
        """
        losses: dict[str, float] = {}
        rows = self.corpus.held_out_rows
        if not len(rows):
            return losses
        seen = self.corpus.train_rows[:: max(len(self.corpus.train_rows) // len(rows), 1)][: len(rows)]
        for name, chosen in (("held_out_loss", rows), ("trained_loss", seen)):
            generator = torch.Generator(self.device).manual_seed(0)
            batch = self.corpus.batch(chosen)
            each = [flow_loss(self.ema, batch, self.ids, self.config.noise_mean, generator) for _ in range(8)]
            losses[name] = round(torch.stack(each).mean().item(), 5)
        return losses

    def train(self, max_steps: int | None = None) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        losses: deque[Tensor] = deque(maxlen=LOG_STEPS)
        total = 60 * self.config.minutes
        with Progress(*columns, TimeRemainingColumn(), refresh_per_second=1) as progress:
            bar = progress.add_task("training", total=round(total), completed=round(self.seconds))
            saved, began = self.seconds, time.perf_counter() - self.seconds
            while self.seconds < total and self.step != max_steps:
                losses.append(self.update())
                self.seconds = time.perf_counter() - began
                if self.step % LOG_STEPS == 0:
                    # waits for the device, so the clock is honest
                    loss = torch.stack(list(losses)).mean().item()
                    self.seconds = time.perf_counter() - began
                    rate = self.pictures_seen / self.seconds
                    self.log.append(
                        {"step": self.step, "seconds": round(self.seconds, 1), "loss": round(loss, 5)}
                    )
                    note = f"step {self.step}  loss {loss:.4f}  {rate:.0f} pictures/s"
                    progress.update(bar, completed=round(self.seconds), description=note)
                if self.seconds - saved > self.config.checkpoint_seconds:
                    saved = self.seconds
                    self.save()
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
    print(f"{run.step} steps, {run.seconds:.0f} s; the last of these is {args.out / 'model'}")
    for entry in run.checkpoints:
        print(entry)


if __name__ == "__main__":
    main()
