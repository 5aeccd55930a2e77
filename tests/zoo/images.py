"""Image models that take latents (B, C, H, W)."""

import torch

from .registry import Entry, entry, noise, steps

# fmt: off


@entry("SD3Transformer2DModel")
def _sd3(name: str) -> Entry:
    config = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3,
              "attention_head_dim": 32, "num_attention_heads": 2, "caption_projection_dim": 64,
              "joint_attention_dim": 64, "pooled_projection_dim": 64, "out_channels": 4,
              "pos_embed_max_size": 16, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    return config, {"hidden_states": noise(2, 4, 8, 12), "encoder_hidden_states": noise(2, 8, 64),
                    "pooled_projections": noise(2, 64), "timestep": steps(2)}


@entry("AuraFlowTransformer2DModel")
def _aura(name: str) -> Entry:
    config = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 2,
              "num_single_dit_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
              "caption_projection_dim": 64, "joint_attention_dim": 64, "out_channels": 4,
              "pos_embed_max_size": 64}
    return config, {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 8, 64),
                    "timestep": torch.rand(2)}


@entry("CogView3PlusTransformer2DModel", "CogView4Transformer2DModel", "GlmImageTransformer2DModel")
def _cogview(name: str) -> Entry:
    config = {"patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 32,
              "num_attention_heads": 2, "out_channels": 4, "text_embed_dim": 64, "time_embed_dim": 64,
              "condition_dim": 64}
    size = torch.tensor([[64.0, 64.0]] * 2)
    inputs = {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 8, 64),
              "timestep": steps(2), "target_size": size, "crop_coords": torch.zeros(2, 2)}
    if name == "GlmImageTransformer2DModel":
        config |= {"prior_vq_quantizer_codebook_size": 32}
        inputs |= {"prior_token_id": torch.randint(0, 32, (2, 16)),
                   "prior_token_drop": torch.zeros(2, 16).bool()}
    else:
        config |= {"sample_size": 8, "pos_embed_max_size": 8}
        inputs |= {"original_size": size}
    return config, inputs


@entry("DiTTransformer2DModel")
def _dit(name: str) -> Entry:
    config = {"in_channels": 4, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 32,
              "num_layers": 2, "num_embeds_ada_norm": 8, "patch_size": 2, "sample_size": 8}
    return config, {"hidden_states": noise(2, 4, 8, 8), "timestep": steps(2),
                    "class_labels": torch.tensor([0, 3])}


@entry("PixArtTransformer2DModel")
def _pixart(name: str) -> Entry:
    config = {"sample_size": 8, "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
              "cross_attention_dim": 64, "caption_channels": 64, "use_additional_conditions": False}
    return config, {"hidden_states": noise(2, 4, 8, 8), "timestep": steps(2),
                    "encoder_hidden_states": noise(2, 8, 64),
                    "added_cond_kwargs": {"aspect_ratio": None, "resolution": None}}


@entry("HunyuanDiT2DModel")
def _hunyuan_dit(name: str) -> Entry:
    config = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2,
              "attention_head_dim": 32, "num_attention_heads": 2, "hidden_size": 64,
              "cross_attention_dim": 64, "cross_attention_dim_t5": 64, "pooled_projection_dim": 64,
              "text_len": 4, "text_len_t5": 4}
    return config, {"hidden_states": noise(2, 4, 8, 8), "timestep": steps(2).float(),
                    "encoder_hidden_states": noise(2, 4, 64), "text_embedding_mask": torch.ones(2, 4),
                    "encoder_hidden_states_t5": noise(2, 4, 64), "text_embedding_mask_t5": torch.ones(2, 4),
                    "image_meta_size": torch.tensor([[64.0, 64, 64, 64, 0, 0]] * 2),
                    "style": torch.zeros(2).long(),
                    "image_rotary_emb": [torch.ones(16, 32), torch.zeros(16, 32)]}


@entry("SanaTransformer2DModel")
def _sana(name: str) -> Entry:
    config = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 32,
              "num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 32,
              "cross_attention_dim": 64, "caption_channels": 64, "sample_size": 8}
    return config, {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 8, 64),
                    "timestep": steps(2)}


@entry("LuminaNextDiT2DModel")
def _lumina_next(name: str) -> Entry:
    config = {"sample_size": 8, "in_channels": 4, "hidden_size": 64, "num_layers": 2,
              "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 64, "learn_sigma": False,
              "cross_attention_dim": 64}
    return config, {"hidden_states": noise(2, 4, 8, 8), "timestep": torch.rand(2),
                    "encoder_hidden_states": noise(2, 8, 64), "encoder_mask": torch.ones(2, 8),
                    "image_rotary_emb": torch.polar(torch.ones(384, 384, 16), torch.rand(384, 384, 16)),
                    "cross_attention_kwargs": {}}


@entry("Lumina2Transformer2DModel")
def _lumina2(name: str) -> Entry:
    config = {"sample_size": 8, "in_channels": 4, "hidden_size": 64, "num_layers": 2,
              "num_refiner_layers": 2, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 64,
              "axes_dim_rope": (8, 12, 12), "axes_lens": (64, 64, 64), "cap_feat_dim": 64}
    return config, {"hidden_states": noise(1, 4, 8, 12), "timestep": torch.rand(1),
                    "encoder_hidden_states": noise(1, 8, 64),
                    "encoder_attention_mask": torch.ones(1, 8, dtype=torch.bool)}


@entry("ZImageTransformer2DModel")
def _z_image(name: str) -> Entry:
    config = {"in_channels": 4, "dim": 192, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 6,
              "n_kv_heads": 6, "cap_feat_dim": 64, "axes_dims": [8, 12, 12], "axes_lens": [128, 64, 64]}
    return config, {"x": [noise(4, 1, 8, 16)], "cap_feats": [noise(32, 64)], "t": torch.rand(1)}


@entry("BriaFibo2Transformer2DModel")
def _fibo2(name: str) -> Entry:
    config = {"in_channels": 4, "dim": 192, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 6,
              "cap_feat_dim": 64, "injection_layer_ids": (1,), "perceiver_num_layers": 1,
              "min_num_gist_tokens": 8, "max_num_gist_tokens": 16, "gist_step": 8, "gist_min_text_len": 8,
              "gist_max_text_len": 32, "axes_dims": (8, 12, 12), "axes_lens": (128, 64, 64)}
    return config, {"hidden_states": noise(1, 4, 8, 12), "timestep": torch.rand(1),
                    "encoder_hidden_states": noise(1, 2, 8, 64)}


@entry("HiDreamImageTransformer2DModel")
def _hidream(name: str) -> Entry:
    config = {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
              "attention_head_dim": 32, "num_attention_heads": 2, "caption_channels": [64, 64],
              "text_emb_dim": 64, "num_routed_experts": 2, "num_activated_experts": 2,
              "axes_dims_rope": (8, 12, 12), "max_resolution": (16, 16), "llama_layers": (0, 1),
              "force_inference_output": True}
    return config, {"hidden_states": noise(1, 4, 16, 16), "encoder_hidden_states_t5": noise(1, 8, 64),
                    "encoder_hidden_states_llama3": noise(2, 1, 8, 64), "pooled_embeds": noise(1, 64),
                    "timesteps": steps(1)}


@entry("OmniGenTransformer2DModel")
def _omnigen(name: str) -> Entry:
    config = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2,
              "intermediate_size": 128, "num_layers": 2, "pad_token_id": 0, "vocab_size": 64,
              "in_channels": 4, "time_step_dim": 64,
              "rope_scaling": {"long_factor": [1.0] * 16, "short_factor": [1.0] * 16}}
    text, image, reference = (24, 16, 16)
    total = text + 1 + image
    return config, {"hidden_states": noise(1, 4, 8, 8), "timestep": torch.rand(1),
                    "input_ids": torch.randint(0, 64, (1, text)), "input_img_latents": [noise(1, 4, 8, 8)],
                    "input_image_sizes": {0: [[2, 2 + reference]]},
                    "attention_mask": torch.ones(1, total, total),
                    "position_ids": torch.arange(total)[None]}


@entry("PRXTransformer2DModel")
def _prx(name: str) -> Entry:
    config = {"in_channels": 4, "patch_size": 2, "context_in_dim": 64, "hidden_size": 64, "mlp_ratio": 2.0,
              "num_heads": 2, "depth": 2, "axes_dim": [16, 16]}
    return config, {"hidden_states": noise(1, 4, 8, 12), "timestep": torch.rand(1),
                    "encoder_hidden_states": noise(1, 8, 64)}


@entry("HunyuanImageTransformer2DModel")
def _hunyuan_image(name: str) -> Entry:
    config = {"in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 32,
              "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0,
              "text_embed_dim": 64, "rope_axes_dim": (16, 16)}
    return config, {"hidden_states": noise(1, 16, 4, 6), "timestep": steps(1).float(),
                    "encoder_hidden_states": noise(1, 8, 64), "encoder_attention_mask": torch.ones(1, 8)}


@entry("Transformer2DModel", "DreamLiteTransformer2DModel")
def _transformer_2d(name: str) -> Entry:
    config = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 64, "num_layers": 2,
              "norm_num_groups": 32, "cross_attention_dim": 64}
    return config, {"hidden_states": noise(2, 64, 4, 6), "encoder_hidden_states": noise(2, 8, 64)}


@entry("DualTransformer2DModel")
def _dual(name: str) -> Entry:
    config = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 64, "num_layers": 1,
              "cross_attention_dim": 64}
    return config, {"hidden_states": noise(1, 64, 4, 6), "encoder_hidden_states": noise(1, 77 + 257, 64)}


@entry("TransformerTemporalModel")
def _temporal(name: str) -> Entry:
    config = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 64, "num_layers": 2}
    return config, {"hidden_states": noise(4, 64, 4, 4), "num_frames": 2}
