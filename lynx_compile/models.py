"""Diffusion transformers by name: production configs and the inputs of one denoising step.

Nothing is downloaded: a config is what the published checkpoint's `transformer/config.json` says, written
as its differences from the diffusers class's defaults, and the inputs are random tensors of the shapes a
pipeline would pass at a given resolution and batch. Both work on any device, also "meta", where a model of
any size is built in a second.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VAE_STRIDE = 8  # pixels per latent of the image autoencoders
Make = Callable[..., Tensor]
InputBuilder = Callable[[dict[str, Any], "Step", Make], dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """What one denoising step works on: pixels, samples, video frames, text tokens."""

    width: int = 1024
    height: int = 1024
    batch: int = 1
    frames: int = 1
    text_tokens: int = 512

    def latent(self, stride: int = VAE_STRIDE) -> tuple[int, int]:
        return self.height // stride, self.width // stride


@dataclass(frozen=True)
class KnownModel:
    """A published transformer: its class, config, native step, and the checkpoint's size in billions."""

    repository: str
    transformer: str
    parameters_b: float
    config: dict[str, Any] = field(default_factory=dict)
    step: Step = Step()


_VIDEO_480 = {"width": 832, "height": 480}
KNOWN: dict[str, KnownModel] = {
    "flux": KnownModel(
        "black-forest-labs/FLUX.1-dev", "FluxTransformer2DModel", 11.9, {"guidance_embeds": True}
    ),
    "flux-schnell": KnownModel(
        "black-forest-labs/FLUX.1-schnell", "FluxTransformer2DModel", 11.9, step=Step(text_tokens=256)
    ),
    "flux2": KnownModel("black-forest-labs/FLUX.2-dev", "Flux2Transformer2DModel", 32.2),
    "chroma": KnownModel("lodestones/Chroma1-HD", "ChromaTransformer2DModel", 8.9),
    "qwen-image": KnownModel(
        "Qwen/Qwen-Image", "QwenImageTransformer2DModel", 20.4, step=Step(text_tokens=128)
    ),
    "z-image": KnownModel(
        "Tongyi-MAI/Z-Image-Turbo", "ZImageTransformer2DModel", 6.2, step=Step(text_tokens=128)
    ),
    "sd3.5-large": KnownModel(
        "stabilityai/stable-diffusion-3.5-large",
        "SD3Transformer2DModel",
        8.1,
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        Step(text_tokens=333),
    ),
    "sd3.5-medium": KnownModel(
        "stabilityai/stable-diffusion-3.5-medium",
        "SD3Transformer2DModel",
        2.5,
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
        Step(text_tokens=333),
    ),
    "auraflow": KnownModel(
        "fal/AuraFlow", "AuraFlowTransformer2DModel", 6.8, {"pos_embed_max_size": 4096}, Step(text_tokens=256)
    ),
    "cogview4": KnownModel(
        "THUDM/CogView4-6B",
        "CogView4Transformer2DModel",
        6.4,
        {"num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 32},
        Step(text_tokens=224),
    ),
    "pixart-sigma": KnownModel(
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        "PixArtTransformer2DModel",
        0.6,
        {"caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False},
        Step(text_tokens=300),
    ),
    "sana": KnownModel(
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
        "SanaTransformer2DModel",
        1.6,
        step=Step(text_tokens=300),
    ),
    "wan-14b": KnownModel(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers", "WanTransformer3DModel", 14.3, step=Step(**_VIDEO_480, frames=81)
    ),
    "wan-1.3b": KnownModel(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "WanTransformer3DModel",
        1.4,
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        Step(**_VIDEO_480, frames=81),
    ),
    "hunyuan-video": KnownModel(
        "hunyuanvideo-community/HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        12.8,
        step=Step(width=960, height=544, frames=61, text_tokens=256),
    ),
    "ltx-video": KnownModel(
        "Lightricks/LTX-Video",
        "LTXVideoTransformer3DModel",
        1.9,
        step=Step(width=704, height=480, frames=121, text_tokens=128),
    ),
    "cogvideox-5b": KnownModel(
        "THUDM/CogVideoX-5b",
        "CogVideoXTransformer3DModel",
        5.6,
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
        Step(width=720, height=480, frames=49, text_tokens=226),
    ),
}


@dataclass(frozen=True)
class Resolved:
    """What a user's model argument names: a title, the transformer's class and config, its native step."""

    title: str
    transformer: str
    config: dict[str, Any]
    step: Step

    def build(
        self, device: str | torch.device = "meta", dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> nn.Module:
        """The transformer in eval mode with random weights, created on `device` in `dtype` directly.

        Raises ValueError for a config that the class cannot be built from.
        """
        torch.manual_seed(seed)
        build = transformer_class(self.transformer)
        with torch.device(device), default_dtype(dtype), self._blaming_config():
            model = build(**self.config)
        # diffusers' own `to` keeps modules in fp32 that a checkpoint would load in fp32, and warns about it
        return nn.Module.to(model, dtype).eval().requires_grad_(False)

    def inputs(
        self,
        step: Step | None = None,
        device: str | torch.device = "meta",
        dtype: torch.dtype = torch.bfloat16,
    ) -> dict[str, Any]:
        """Keyword inputs of one denoising step.

        Raises ValueError for a class with no inputs on record, and for a config they cannot be read from.
        """
        if self.transformer not in INPUTS:
            raise ValueError(
                f"no example inputs for {self.transformer}; known are: {', '.join(sorted(INPUTS))}. "
                "From Python, pass your own: lynx_compile.explain(model, inputs)"
            )

        def make(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

        with self._blaming_config():
            return INPUTS[self.transformer](self.full_config(), step or self.step, make)

    @contextmanager
    def _blaming_config(self) -> Iterator[None]:
        try:
            yield
        except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            raise ValueError(
                f"{self.title}: its config does not fit {self.transformer} ({reason}); "
                "compare it with the config.json of the published checkpoint"
            ) from error

    def block_counts(self, blocks: int) -> dict[str, int]:
        """Overrides of the config for this many blocks of each kind: the same layers, a smaller model."""
        counts = ("num_layers", "num_single_layers", "n_layers")
        return dict.fromkeys((key for key in self.full_config() if key.endswith(counts)), blocks)

    def full_config(self) -> dict[str, Any]:
        """The config with the class's defaults filled in."""
        parameters = inspect.signature(transformer_class(self.transformer).__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        return defaults | self.config


def resolve(model: str) -> Resolved:
    """A known name or its hub id, a folder or `config.json` of a transformer or pipeline, or any hub id.

    Raises ValueError that lists the known names when it is none of these or cannot be fetched.
    """
    for name, known in KNOWN.items():
        if model in (name, known.repository):
            return Resolved(known.repository, known.transformer, known.config, known.step)
    path = Path(model)
    for candidate in (path, path / "transformer" / "config.json", path / "config.json"):
        if candidate.is_file():
            return _from_config(model, read_object(candidate))
    if model and path.exists():
        raise ValueError(f"{model}: no transformer/config.json and no config.json in this folder")
    if "/" not in model:
        near = difflib.get_close_matches(model, KNOWN, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"{model!r} is no known model, no path and no hub id; {meant}known models: {', '.join(KNOWN)}"
        )
    return _from_config(model, _hub_config(model))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object. Raises ValueError that names the file when it holds something else."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:  # also what is no text
        raise ValueError(f"{path}: is not valid JSON ({error})") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give a JSON file") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not a JSON object")
    return found


def transformer_class(name: str) -> Any:
    """The diffusers class. Raises ValueError when the installed diffusers has no class of that name."""
    import diffusers

    found = getattr(diffusers, name, None)
    if found is None:
        raise ValueError(f"diffusers {diffusers.__version__} has no class {name}; install a newer diffusers")
    return found


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New floating-point parameters get this dtype inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _from_config(title: str, config: dict[str, Any]) -> Resolved:
    name = config.get("_class_name")
    if not name or not isinstance(name, str):
        named = f"_class_name is {name!r}" if name else "the config has no _class_name"
        raise ValueError(f"{title}: {named}, so it is not a diffusers transformer's")
    options = {key: value for key, value in config.items() if not key.startswith("_")}
    native = next((known.step for known in KNOWN.values() if known.transformer == name), Step())
    return Resolved(title, name, options, native)


def _hub_config(repository: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    for filename in ("transformer/config.json", "config.json"):
        try:
            return read_object(Path(hf_hub_download(repository, filename)))
        except Exception as error:
            failure = error
    raise ValueError(
        f"{repository!r} is no known model and no path, and its config could not be fetched from the hub "
        f"({type(failure).__name__}); known models: {', '.join(KNOWN)}"
    ) from failure


# Inputs of one step, by transformer class ------------------------------------------------------------------


def _timestep(step: Step, make: Make) -> Tensor:
    return make(step.batch).abs()


def _text(width: int, step: Step, make: Make) -> Tensor:
    return make(step.batch, step.text_tokens, width)


def _ids(height: int, width: int, axes: int, make: Make) -> Tensor:
    like = make(1)
    ids = torch.zeros(height, width, axes, device=like.device, dtype=like.dtype)
    ids[..., 1] += torch.arange(height, device=like.device)[:, None]
    ids[..., 2] += torch.arange(width, device=like.device)
    return ids.reshape(-1, axes)


def _flux(config: dict[str, Any], step: Step, make: Make) -> dict[str, Any]:
    height, width = step.latent(2 * VAE_STRIDE)
    axes = len(config["axes_dims_rope"])
    inputs = {
        "hidden_states": make(step.batch, height * width, config["in_channels"]),
        "encoder_hidden_states": _text(config["joint_attention_dim"], step, make),
        "timestep": _timestep(step, make),
        "img_ids": _ids(height, width, axes, make),
        "txt_ids": torch.zeros_like(_ids(step.text_tokens, 1, axes, make)),
    }
    if "pooled_projection_dim" in config:
        inputs["pooled_projections"] = make(step.batch, config["pooled_projection_dim"])
    if config.get("guidance_embeds"):
        inputs["guidance"] = _timestep(step, make)
    return inputs


def _qwen_image(config: dict[str, Any], step: Step, make: Make) -> dict[str, Any]:
    height, width = step.latent(2 * VAE_STRIDE)
    return {
        "hidden_states": make(step.batch, height * width, config["in_channels"]),
        "encoder_hidden_states": _text(config["joint_attention_dim"], step, make),
        "timestep": _timestep(step, make),
        "img_shapes": [[(1, height, width)]] * step.batch,
    }


def _z_image(config: dict[str, Any], step: Step, make: Make) -> dict[str, Any]:
    height, width = step.latent()
    return {
        "x": [make(config["in_channels"], 1, height, width) for _ in range(step.batch)],
        "cap_feats": [make(step.text_tokens, config["cap_feat_dim"]) for _ in range(step.batch)],
        "t": _timestep(step, make),
    }


def _latents(config: dict[str, Any], step: Step, make: Make) -> dict[str, Any]:
    """(B, C, H, W) latents, a timestep and text: what the other image models have in common."""
    widths = ("joint_attention_dim", "text_embed_dim", "caption_channels")
    height, width = step.latent(
        32 if config["in_channels"] == 32 else VAE_STRIDE
    )  # Sana's autoencoder is DC-AE
    return {
        "hidden_states": make(step.batch, config["in_channels"], height, width),
        "encoder_hidden_states": _text(next(config[w] for w in widths if config.get(w)), step, make),
        "timestep": _timestep(step, make),
    }


def _sd3(config: dict[str, Any], step: Step, make: Make) -> dict[str, Any]:
    return _latents(config, step, make) | {
        "pooled_projections": make(step.batch, config["pooled_projection_dim"])
    }


def _cogview4(config: dict[str, Any], step: Step, make: Make) -> dict[str, Any]:
    size = make(step.batch, 2).abs()
    return _latents(config, step, make) | {"original_size": size, "target_size": size, "crop_coords": size}


def _pixart(config: dict[str, Any], step: Step, make: Make) -> dict[str, Any]:
    return _latents(config, step, make) | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def _video(config: dict[str, Any], step: Step, make: Make) -> dict[str, Any]:
    """(B, C, F, H, W) latents, four frames to one: Wan and HunyuanVideo."""
    height, width = step.latent()
    frames = (step.frames - 1) // 4 + 1
    text = config.get("text_embed_dim") or config["text_dim"]
    inputs = {
        "hidden_states": make(step.batch, config["in_channels"], frames, height, width),
        "encoder_hidden_states": _text(text, step, make),
        "timestep": _timestep(step, make),
    }
    if config.get("guidance_embeds"):  # HunyuanVideo
        device = inputs["timestep"].device
        mask = torch.ones(step.batch, step.text_tokens, device=device, dtype=torch.bool)
        inputs["encoder_attention_mask"] = mask
        inputs["pooled_projections"] = make(step.batch, config["pooled_projection_dim"])
        inputs["guidance"] = _timestep(step, make)
    return inputs


def _ltx(config: dict[str, Any], step: Step, make: Make) -> dict[str, Any]:
    height, width = step.latent(32)
    frames = (step.frames - 1) // 8 + 1
    timestep = _timestep(step, make)
    mask = torch.ones(step.batch, step.text_tokens, device=timestep.device, dtype=torch.bool)
    return {
        "hidden_states": make(step.batch, frames * height * width, config["in_channels"]),
        "encoder_hidden_states": _text(config["caption_channels"], step, make),
        "timestep": timestep,
        "encoder_attention_mask": mask,
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def _cogvideox(config: dict[str, Any], step: Step, make: Make) -> dict[str, Any]:
    height, width = step.latent()
    frames = (step.frames - 1) // 4 + 1
    tokens = frames * height * width // config["patch_size"] ** 2
    return {
        "hidden_states": make(step.batch, frames, config["in_channels"], height, width),
        "encoder_hidden_states": _text(config["text_embed_dim"], step, make),
        "timestep": _timestep(step, make),
        "image_rotary_emb": (
            make(tokens, config["attention_head_dim"]),
            make(tokens, config["attention_head_dim"]),
        ),
    }


INPUTS: dict[str, InputBuilder] = {
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux,
    "ChromaTransformer2DModel": _flux,
    "QwenImageTransformer2DModel": _qwen_image,
    "ZImageTransformer2DModel": _z_image,
    "SD3Transformer2DModel": _sd3,
    "AuraFlowTransformer2DModel": _latents,
    "SanaTransformer2DModel": _latents,
    "CogView4Transformer2DModel": _cogview4,
    "PixArtTransformer2DModel": _pixart,
    "WanTransformer3DModel": _video,
    "HunyuanVideoTransformer3DModel": _video,
    "LTXVideoTransformer3DModel": _ltx,
    "CogVideoXTransformer3DModel": _cogvideox,
}
