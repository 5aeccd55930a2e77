"""Video models that take latents (B, C, F, H, W)."""

import importlib

import torch

from .registry import Entry, entry, noise, steps

# fmt: off


@entry("WanTransformer3DModel", "SkyReelsV2Transformer3DModel", "ChronoEditTransformer3DModel",
       "WanVACETransformer3DModel", "HeliosTransformer3DModel", "WanAnimateTransformer3DModel")
def _wan(name: str) -> Entry:
    config = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 16, "out_channels": 16,
              "text_dim": 64, "freq_dim": 64, "ffn_dim": 128, "num_layers": 2, "rope_max_seq_len": 32}
    inputs = {"hidden_states": noise(1, 16, 2, 8, 8), "timestep": steps(1),
              "encoder_hidden_states": noise(1, 8, 64)}
    if name == "WanVACETransformer3DModel":
        config |= {"vace_layers": [0, 1], "vace_in_channels": 16}
        inputs |= {"control_hidden_states": noise(1, 16, 2, 8, 8)}
    elif name == "HeliosTransformer3DModel":
        del config["rope_max_seq_len"]
        config |= {"rope_dim": (12, 10, 10)}
        one, four = (torch.zeros(1, 1), torch.arange(4.0)[None])
        inputs |= {"indices_hidden_states": torch.arange(2.0)[None], "indices_latents_history_short": one,
                   "indices_latents_history_mid": one, "indices_latents_history_long": four,
                   "latents_history_short": noise(1, 16, 1, 8, 8),
                   "latents_history_mid": noise(1, 16, 1, 8, 8),
                   "latents_history_long": noise(1, 16, 4, 8, 8)}
    elif name == "WanAnimateTransformer3DModel":
        config |= {"in_channels": 36, "latent_channels": 16, "image_dim": 64, "motion_encoder_size": 16,
                   "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_style_dim": 16,
                   "motion_dim": 4, "motion_encoder_dim": 64, "face_encoder_hidden_dim": 64,
                   "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2}
        inputs |= {"hidden_states": noise(1, 36, 3, 8, 8), "encoder_hidden_states_image": noise(1, 8, 64),
                   "pose_hidden_states": noise(1, 16, 2, 8, 8), "face_pixel_values": noise(1, 3, 5, 16, 16)}
    return config, inputs


@entry("AnyFlowTransformer3DModel", "AnyFlowFARTransformer3DModel")
def _anyflow(name: str) -> Entry:
    config = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 16, "out_channels": 16,
              "text_dim": 64, "freq_dim": 64, "ffn_dim": 128, "num_layers": 2, "rope_max_seq_len": 32}
    inputs = {"hidden_states": noise(1, 2, 16, 8, 8), "timestep": torch.full((1, 2), 500.0),
              "r_timestep": torch.full((1, 2), 250.0), "encoder_hidden_states": noise(1, 8, 64)}
    if name == "AnyFlowFARTransformer3DModel":
        inputs |= {"chunk_partition": [1, 1]}
    return config, inputs


@entry("WanAnimate2Transformer3DModel")
def _wan_animate2(name: str) -> Entry:
    source = importlib.import_module("diffusers.models.transformers.transformer_wan_animate_2")
    config = {"text_len": 8, "in_dim": 36, "dim": 64, "ffn_dim": 128, "freq_dim": 64, "text_dim": 64,
              "out_dim": 16, "num_heads": 2, "num_layers": 2}
    return config, {"hidden_states": [noise(16, 1, 8, 8)], "timestep": torch.ones(1),
                    "encoder_hidden_states": [noise(8, 64)], "condition_latents": [noise(20, 1, 8, 8)],
                    "encoder_hidden_states_image": noise(1, 8, 1280),
                    "kv_cache": source.WanAnimate2KVCache(2), "kv_cache_mode": "extract", "seq_len": 16,
                    "offset_grid_sizes": torch.tensor([[1, 4, 4]])}


@entry("HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel")
def _hunyuan_video(name: str) -> Entry:
    config = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 32,
              "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0,
              "text_embed_dim": 64, "pooled_projection_dim": 64, "rope_axes_dim": (8, 12, 12)}
    inputs = {"hidden_states": noise(1, 4, 2, 8, 8), "timestep": steps(1),
              "encoder_hidden_states": noise(1, 8, 64), "encoder_attention_mask": torch.ones(1, 8),
              "pooled_projections": noise(1, 64), "guidance": torch.full((1,), 6.0)}
    if name == "HunyuanVideoFramepackTransformer3DModel":
        config |= {"has_image_proj": True, "image_proj_dim": 64, "has_clean_x_embedder": True}
        inputs |= {"image_embeds": noise(1, 8, 64), "indices_latents": torch.arange(2.0),
                   "latents_clean": noise(1, 4, 1, 8, 8), "indices_latents_clean": torch.zeros(1),
                   "latents_history_2x": noise(1, 4, 2, 8, 8),
                   "indices_latents_history_2x": torch.arange(2.0),
                   "latents_history_4x": noise(1, 4, 4, 8, 8),
                   "indices_latents_history_4x": torch.arange(4.0)}
    return config, inputs


@entry("HunyuanVideo15Transformer3DModel")
def _hunyuan_video15(name: str) -> Entry:
    config = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 32,
              "num_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 64,
              "text_embed_2_dim": 64, "image_embed_dim": 64, "rope_axes_dim": (8, 12, 12),
              "target_size": 16, "task_type": "t2v"}
    return config, {"hidden_states": noise(1, 4, 1, 4, 6), "timestep": steps(1).float(),
                    "encoder_hidden_states": noise(1, 8, 64), "encoder_attention_mask": torch.ones(1, 8),
                    "encoder_hidden_states_2": noise(1, 4, 64),
                    "encoder_attention_mask_2": torch.ones(1, 4), "image_embeds": torch.zeros(1, 4, 64)}


@entry("LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel")
def _ltx(name: str) -> Entry:
    config = {"in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 32,
              "cross_attention_dim": 64, "num_layers": 2, "caption_channels": 64}
    inputs = {"hidden_states": noise(1, 24, 16), "encoder_hidden_states": noise(1, 8, 64),
              "timestep": steps(1), "encoder_attention_mask": torch.ones(1, 8).bool(), "num_frames": 2,
              "height": 3, "width": 4}
    if name == "LTX2VideoTransformer3DModel":
        config |= {"audio_in_channels": 16, "audio_out_channels": 16, "audio_num_attention_heads": 2,
                   "audio_attention_head_dim": 32, "audio_cross_attention_dim": 64,
                   "rope_double_precision": False}
        inputs |= {"audio_hidden_states": noise(1, 6, 16), "audio_encoder_hidden_states": noise(1, 8, 64),
                   "audio_num_frames": 6, "timestep": steps(1).float()}
    return config, inputs


@entry("SanaWMLTX2RefinerTransformer3DModel")
def _sana_wm_refiner(name: str) -> Entry:
    config = {"in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 32,
              "cross_attention_dim": 64, "num_layers": 2, "caption_channels": 64, "audio_in_channels": 16,
              "audio_out_channels": 16, "audio_num_attention_heads": 2, "audio_attention_head_dim": 32,
              "audio_cross_attention_dim": 64}
    angles = torch.rand(1, 24, 64)
    return config, {"hidden_states": noise(1, 24, 16), "encoder_hidden_states": noise(1, 8, 64),
                    "timestep": torch.full((1, 24), 500.0),
                    "video_rotary_emb": (angles.cos(), angles.sin())}


@entry("MochiTransformer3DModel")
def _mochi(name: str) -> Entry:
    config = {"num_attention_heads": 6, "attention_head_dim": 32, "num_layers": 2,
              "pooled_projection_dim": 64, "in_channels": 4, "text_embed_dim": 64, "time_embed_dim": 64,
              "max_sequence_length": 8}
    return config, {"hidden_states": noise(1, 4, 2, 8, 8), "encoder_hidden_states": noise(1, 8, 64),
                    "timestep": steps(1), "encoder_attention_mask": torch.ones(1, 8, dtype=torch.bool)}


@entry("AllegroTransformer3DModel")
def _allegro(name: str) -> Entry:
    config = {"num_attention_heads": 2, "attention_head_dim": 96, "num_layers": 2,
              "cross_attention_dim": 192, "sample_width": 8, "sample_height": 8, "sample_frames": 8,
              "caption_channels": 64}
    rotary = [(torch.rand(8, 32), torch.rand(8, 32)) for _ in range(3)]
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4)).T[:, None]
    return config, {"hidden_states": noise(1, 4, 2, 8, 8), "encoder_hidden_states": noise(1, 8, 64),
                    "timestep": steps(1), "image_rotary_emb": (tuple(rotary), tuple(grid))}


@entry("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
def _cogvideox(name: str) -> Entry:
    config = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4,
              "time_embed_dim": 64, "text_embed_dim": 64, "num_layers": 2, "sample_width": 8,
              "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 8}
    inputs = {"hidden_states": noise(1, 2, 4, 8, 8), "encoder_hidden_states": noise(1, 8, 64),
              "timestep": steps(1)}
    if name == "ConsisIDTransformer3DModel":  # its face branch is two thirds as wide as the model
        config |= {"num_attention_heads": 6, "is_train_face": True, "cross_attn_interval": 1,
                   "cross_attn_dim_head": 32, "cross_attn_num_heads": 2, "LFE_id_dim": 64,
                   "LFE_vit_dim": 64, "LFE_depth": 5, "LFE_dim_head": 32, "LFE_num_heads": 2,
                   "LFE_num_id_token": 1, "LFE_num_querie": 4, "LFE_output_dim": 128, "LFE_ff_mult": 1,
                   "LFE_num_scale": 5}
        inputs |= {"id_vit_hidden": [noise(1, 4, 64) for _ in range(5)], "id_cond": noise(1, 64)}
    return config, inputs


@entry("CosmosTransformer3DModel")
def _cosmos(name: str) -> Entry:
    config = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 32,
              "num_layers": 2, "mlp_ratio": 2.0, "text_embed_dim": 64, "adaln_lora_dim": 64,
              "max_size": (4, 16, 16), "concat_padding_mask": False}
    return config, {"hidden_states": noise(1, 4, 1, 8, 8), "timestep": steps(1),
                    "encoder_hidden_states": noise(1, 8, 64), "fps": 30}


@entry("Cosmos3OmniTransformer")
def _cosmos3(name: str) -> Entry:
    config = {"head_dim": 32, "hidden_size": 64, "intermediate_size": 128, "latent_channel": 4,
              "latent_patch_size": 1, "num_attention_heads": 2, "num_hidden_layers": 2,
              "num_key_value_heads": 1, "patch_latent_dim": 4, "rope_axes_dim": [6, 5, 5], "vocab_size": 32}
    vision = torch.arange(8, 24)
    return config, {"input_ids": torch.arange(8), "text_indexes": torch.arange(8),
                    "position_ids": torch.arange(24).repeat(3, 1), "und_len": 8, "sequence_length": 24,
                    "vision_tokens": [noise(1, 4, 1, 4, 4)], "vision_token_shapes": [(1, 4, 4)],
                    "vision_sequence_indexes": vision, "vision_mse_loss_indexes": vision,
                    "vision_timesteps": torch.ones(16), "vision_noisy_frame_indexes": [torch.tensor([0])]}


@entry("EasyAnimateTransformer3DModel")
def _easy_animate(name: str) -> Entry:
    config = {"attention_head_dim": 32, "num_attention_heads": 2, "in_channels": 4, "mmdit_layers": 2,
              "num_layers": 2, "out_channels": 4, "patch_size": 2, "text_embed_dim": 64,
              "time_embed_dim": 64}
    return config, {"hidden_states": noise(1, 4, 2, 8, 8), "timestep": steps(1),
                    "encoder_hidden_states": noise(1, 8, 64)}


@entry("LatteTransformer3DModel")
def _latte(name: str) -> Entry:
    config = {"sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 32,
              "num_attention_heads": 2, "caption_channels": 64, "in_channels": 4, "cross_attention_dim": 64,
              "out_channels": 8, "attention_bias": True, "activation_fn": "gelu-approximate",
              "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
              "norm_eps": 1e-06, "video_length": 2}
    return config, {"hidden_states": noise(1, 4, 2, 8, 8), "encoder_hidden_states": noise(1, 8, 64),
                    "timestep": steps(1)}


@entry("MotifVideoTransformer3DModel")
def _motif(name: str) -> Entry:
    config = {"in_channels": 8, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 32,
              "num_layers": 2, "num_single_layers": 2, "mlp_ratio": 2.0, "text_embed_dim": 64,
              "rope_axes_dim": (8, 12, 12)}
    return config, {"hidden_states": noise(1, 8, 2, 8, 8), "timestep": steps(1),
                    "encoder_hidden_states": noise(1, 8, 64)}


@entry("SanaVideoTransformer3DModel")
def _sana_video(name: str) -> Entry:
    config = {"in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 32,
              "num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 32,
              "cross_attention_dim": 64, "caption_channels": 64, "mlp_ratio": 2.0, "sample_size": 8,
              "rope_max_seq_len": 32}
    return config, {"hidden_states": noise(1, 16, 2, 8, 8), "encoder_hidden_states": noise(1, 8, 64),
                    "timestep": steps(1)}


@entry("SanaWMTransformer3DModel")
def _sana_wm(name: str) -> Entry:
    config = {"in_channels": 16, "num_layers": 2, "hidden_size": 64, "num_attention_heads": 2,
              "linear_head_dim": 32, "softmax_every_n": 2, "mlp_ratio": 2.0, "caption_channels": 64,
              "chunk_plucker_post_attn_blocks": 2, "image_size": 64}
    return config, {"hidden_states": noise(1, 16, 2, 4, 4), "timestep": steps(2).float()[None, None],
                    "encoder_hidden_states": noise(1, 1, 8, 64), "encoder_attention_mask": torch.ones(1, 8)}


@entry("JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel")
def _joy(name: str) -> Entry:
    config = {"in_channels": 16, "hidden_size": 64, "num_attention_heads": 2, "text_dim": 64,
              "num_layers": 2, "rope_dim_list": [8, 12, 12]}
    inputs = {"hidden_states": noise(1, 16, 1, 8, 8), "encoder_hidden_states": noise(1, 8, 64),
              "timestep": torch.rand(1)}
    if name == "JoyImageEditPlusTransformer3DModel":
        inputs |= {"hidden_states": noise(1, 8, 16, 1, 2, 2), "shape_list": [[(1, 2, 2), (1, 2, 2)]]}
    return config, inputs


@entry("Kandinsky5Transformer3DModel")
def _kandinsky5(name: str) -> Entry:
    config = {"in_text_dim": 64, "in_text_dim2": 64, "time_dim": 64, "model_dim": 64, "ff_dim": 128,
              "num_text_blocks": 2, "num_visual_blocks": 2, "axes_dims": (8, 12, 12)}
    return config, {"hidden_states": noise(1, 2, 8, 8, 4), "encoder_hidden_states": noise(1, 8, 64),
                    "timestep": torch.rand(1), "pooled_projections": noise(1, 64),
                    "text_rope_pos": torch.arange(8),
                    "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)]}


@entry("Kandinsky6Transformer3DModel")
def _kandinsky6(name: str) -> Entry:
    config = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 64, "in_text_dim2": 64,
              "time_dim": 64, "model_dim": 64, "ff_dim": 128, "num_text_blocks": 2, "num_visual_blocks": 2,
              "axes_dims": (8, 12, 12), "in_audio_dim": 16, "out_audio_dim": 16}
    return config, {"hidden_states": noise(1, 2, 8, 8, 9), "encoder_hidden_states": noise(1, 8, 64),
                    "pooled_projections": noise(1, 64), "timestep": torch.rand(1),
                    "audio_hidden_states": noise(1, 6, 16)}


@entry("Kandinsky6SRTransformer3DModel")
def _kandinsky6_sr(name: str) -> Entry:
    config = {"in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 64, "model_dim": 64, "ff_dim": 128,
              "num_visual_blocks": 2, "axes_dims": (8, 12, 12)}
    return config, {"hidden_states": noise(1, 2, 8, 8, 9), "timestep": torch.rand(1)}
