"""Image models that take tokens and position ids: FLUX, Qwen-Image and their kin."""

import importlib

import torch

from .registry import Entry, entry, grid_ids, noise

# fmt: off


@entry("FluxTransformer2DModel", "BriaTransformer2DModel", "ChromaTransformer2DModel",
       "LongCatImageTransformer2DModel", "OvisImageTransformer2DModel", "BriaFiboTransformer2DModel")
def _flux(name: str) -> Entry:
    config = {"patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2,
              "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64,
              "axes_dims_rope": (8, 12, 12)}
    inputs = {"hidden_states": noise(1, 24, 16), "encoder_hidden_states": noise(1, 8, 64),
              "timestep": torch.rand(1), "img_ids": grid_ids(4, 6), "txt_ids": torch.zeros(8, 3)}
    if name == "FluxTransformer2DModel":
        config |= {"pooled_projection_dim": 64, "guidance_embeds": True}
        inputs |= {"pooled_projections": noise(1, 64), "guidance": torch.full((1,), 3.5)}
    elif name == "LongCatImageTransformer2DModel":
        config |= {"pooled_projection_dim": 64}
        inputs |= {"guidance": torch.full((1,), 3.5)}
    elif name == "ChromaTransformer2DModel":
        config |= {"approximator_num_channels": 64, "approximator_hidden_dim": 64, "approximator_layers": 2}
    elif name == "OvisImageTransformer2DModel":
        config |= {"out_channels": 16}
    elif name == "BriaFiboTransformer2DModel":
        config |= {"text_encoder_dim": 32}
        inputs |= {"text_encoder_layers": [noise(1, 8, 32) for _ in range(4)]}
    return config, inputs


@entry("Flux2Transformer2DModel")
def _flux2(name: str) -> Entry:
    config = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32,
              "num_attention_heads": 2, "joint_attention_dim": 64, "axes_dims_rope": (8, 8, 8, 8)}
    return config, {"hidden_states": noise(1, 24, 16), "encoder_hidden_states": noise(1, 8, 64),
                    "timestep": torch.rand(1), "img_ids": grid_ids(4, 6, 4), "txt_ids": torch.zeros(8, 4),
                    "guidance": torch.ones(1)}


@entry("Flux3Transformer2DModel")
def _flux3(name: str) -> Entry:
    config = {"in_channels": 16, "cond_in_channels": 16, "num_layers": 2, "num_single_layers": 2,
              "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64,
              "axes_dims_rope": (8, 8, 8, 8)}
    return config, {"hidden_states": noise(1, 24, 16), "encoder_hidden_states": noise(1, 8, 64),
                    "timestep": torch.rand(1), "img_ids": grid_ids(4, 6, 4), "txt_ids": torch.zeros(8, 4)}


@entry("QwenImageTransformer2DModel")
def _qwen(name: str) -> Entry:
    config = {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2,
              "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64,
              "axes_dims_rope": (8, 12, 12)}
    return config, {"hidden_states": noise(1, 24, 16), "encoder_hidden_states": noise(1, 8, 64),
                    "encoder_hidden_states_mask": torch.ones(1, 8, dtype=torch.long),
                    "timestep": torch.rand(1), "img_shapes": [[(1, 4, 6)]]}


@entry("QwenImage21Transformer2DModel")
def _qwen21(name: str) -> Entry:
    config = {"in_channels": 16, "out_channels": 16, "num_layers": 2, "attention_head_dim": 32,
              "num_attention_heads": 2, "context_in_dim": 64, "axes_dims_rope": (8, 12, 12)}
    mask = torch.zeros(1, 8 + 6, dtype=torch.bool)
    mask[:, 8:] = True
    return config, {"hidden_states": noise(1, 24, 16), "encoder_hidden_states": noise(1, 8, 64),
                    "timestep": torch.rand(1), "img_shapes": [[(1, 4, 6)]], "img_mask": mask}


@entry("NucleusMoEImageTransformer2DModel")
def _nucleus(name: str) -> Entry:
    config = {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2,
              "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64,
              "axes_dims_rope": (8, 12, 12), "moe_enabled": False, "capacity_factors": [8.0, 8.0]}
    return config, {"hidden_states": noise(1, 24, 16), "encoder_hidden_states": noise(1, 8, 64),
                    "encoder_hidden_states_mask": torch.ones(1, 8, dtype=torch.long),
                    "timestep": torch.rand(1), "img_shapes": [(1, 4, 6)]}


@entry("ErnieImageTransformer2DModel")
def _ernie(name: str) -> Entry:
    config = {"hidden_size": 64, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 128,
              "in_channels": 16, "out_channels": 16, "text_in_dim": 64, "rope_axes_dim": (8, 12, 12)}
    return config, {"hidden_states": noise(1, 16, 4, 6), "timestep": torch.rand(1),
                    "text_bth": noise(1, 8, 64), "text_lens": torch.tensor([8])}


@entry("Krea2Transformer2DModel")
def _krea2(name: str) -> Entry:
    config = {"in_channels": 16, "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
              "num_key_value_heads": 1, "intermediate_size": 128, "timestep_embed_dim": 64,
              "text_hidden_dim": 64, "num_text_layers": 3, "text_num_attention_heads": 2,
              "text_num_key_value_heads": 2, "text_intermediate_size": 128, "num_layerwise_text_blocks": 1,
              "num_refiner_text_blocks": 1, "axes_dims_rope": (8, 12, 12)}
    return config, {"hidden_states": noise(1, 24, 16), "encoder_hidden_states": noise(1, 8, 3, 64),
                    "timestep": torch.rand(1),
                    "position_ids": torch.cat([torch.zeros(8, 3), grid_ids(4, 6)])}


@entry("Ideogram4Transformer2DModel")
def _ideogram(name: str) -> Entry:
    constants = importlib.import_module("diffusers.models.transformers.transformer_ideogram4")
    config = {"in_channels": 16, "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
              "intermediate_size": 128, "adaln_dim": 64, "llm_features_dim": 64, "mrope_section": (8, 4, 4)}
    text, image = (8, 24)
    indicator = torch.full((1, text + image), constants.OUTPUT_IMAGE_INDICATOR)
    indicator[:, :text] = constants.LLM_TOKEN_INDICATOR
    positions = torch.cat([torch.arange(text)[:, None].expand(text, 3), 64 + grid_ids(4, 6).long()])[None]
    return config, {"hidden_states": noise(1, text + image, 16),
                    "encoder_hidden_states": noise(1, text + image, 64), "timestep": torch.rand(1),
                    "position_ids": positions, "indicator": indicator,
                    "segment_ids": torch.ones(1, text + image, dtype=torch.long)}


@entry("MiniMaxH3Transformer3DModel")
def _minimax_h3(name: str) -> Entry:
    config = {"num_attention_heads": 2, "attention_head_dim": 32, "hidden_size": 64, "num_layers": 2,
              "num_refiner_layers": 2, "ffn_dim": 128, "in_channels": 16, "audio_in_channels": 16,
              "text_dim": 64, "freq_dim": 64, "time_embed_hidden_dim": 64, "time_embed_dim": 64,
              "rope_freq_dim": 4}
    text, audio, video = (torch.arange(6), torch.arange(6, 10), torch.arange(10, 34))
    tags, timesteps = (torch.zeros(34, dtype=torch.long), torch.zeros(34, dtype=torch.long))
    tags[text], tags[audio], timesteps[audio] = (1, 2, 1)
    positions = torch.arange(34.0)[:, None].repeat(1, 3)
    positions[:, 1:] %= torch.tensor([4, 2])
    return config, {"hidden_states": noise(1, 24, 64), "audio_hidden_states": noise(1, 4, 16),
                    "encoder_hidden_states": noise(1, 6, 64), "timestep": torch.tensor([0.7, 0.3]),
                    "timestep_indices": timesteps, "token_tags": tags, "position_ids": positions,
                    "video_indices": video, "audio_indices": audio, "text_indices": text}
