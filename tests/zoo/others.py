"""Audio, molecules, embeddings: what is neither picture nor film."""

import torch

from .registry import Entry, entry, noise, steps

# fmt: off


@entry("AceStepTransformer1DModel")
def _ace_step(name: str) -> Entry:
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 32, "in_channels": 48, "audio_acoustic_hidden_dim": 16,
              "sliding_window": 8}
    return config, {"hidden_states": noise(2, 16, 16), "timestep": torch.rand(2),
                    "timestep_r": torch.rand(2), "encoder_hidden_states": noise(2, 8, 64),
                    "context_latents": noise(2, 16, 32)}


@entry("StableAudioDiTModel")
def _stable_audio(name: str) -> Entry:
    config = {"sample_size": 16, "in_channels": 8, "num_layers": 2, "attention_head_dim": 32,
              "num_attention_heads": 2, "num_key_value_attention_heads": 1, "out_channels": 8,
              "cross_attention_dim": 32, "time_proj_dim": 64, "global_states_input_dim": 64,
              "cross_attention_input_dim": 64}
    angles = torch.rand(16 + 1, 16)
    return config, {"hidden_states": noise(1, 8, 16), "timestep": torch.rand(1),
                    "encoder_hidden_states": noise(1, 8, 64), "global_hidden_states": noise(1, 1, 64),
                    "rotary_embedding": (angles.cos(), angles.sin())}


@entry("StableAudio3DiTModel")
def _stable_audio3(name: str) -> Entry:
    config = {"io_channels": 16, "embed_dim": 64, "depth": 2, "num_heads": 2, "cond_token_dim": 64,
              "global_cond_dim": 64, "local_add_cond_dim": 16, "timestep_features_dim": 64, "ff_mult": 2,
              "num_memory_tokens": 4}
    return config, {"hidden_states": noise(1, 16, 16), "timestep": torch.rand(1),
                    "encoder_hidden_states": noise(1, 8, 64), "global_hidden_states": noise(1, 64)}


@entry("LongCatAudioDiTTransformer")
def _longcat_audio(name: str) -> Entry:
    config = {"dit_dim": 64, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 64, "latent_dim": 16,
              "text_conv": False}
    return config, {"hidden_states": noise(1, 16, 16), "encoder_hidden_states": noise(1, 8, 64),
                    "encoder_attention_mask": torch.ones(1, 8).bool(),
                    "attention_mask": torch.ones(1, 16).bool(), "timestep": torch.rand(1),
                    "latent_cond": noise(1, 16, 16)}


@entry("MiniMaxMusic3Transformer1DModel")
def _minimax_music(name: str) -> Entry:
    config = {"in_channels": 16, "condition_dim": 64, "num_layers": 2, "num_attention_heads": 2,
              "attention_head_dim": 32, "ff_inner_dim": 128, "rotary_dim": 16, "fourier_embedding_dim": 64}
    return config, {"hidden_states": noise(1, 16, 24), "timestep": torch.rand(1),
                    "encoder_hidden_states": noise(1, 24, 64)}


@entry("MiniMaxMusic3RVQDepthDecoder")
def _minimax_decoder(name: str) -> Entry:
    config = {"hidden_size": 64, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
              "audio_vocab_size": 32, "num_codebooks": 2}
    return config, {"inputs_embeds": noise(2, 8, 64)}


@entry("PriorTransformer")
def _prior(name: str) -> Entry:
    config = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "embedding_dim": 64,
              "num_embeddings": 8}
    return config, {"hidden_states": noise(2, 64), "timestep": steps(2), "proj_embedding": noise(2, 64),
                    "encoder_hidden_states": noise(2, 8, 64)}


@entry("T5FilmDecoder")
def _t5_film(name: str) -> Entry:
    config = {"input_dims": 16, "targets_length": 16, "d_model": 64, "num_layers": 2, "num_heads": 2,
              "d_kv": 32, "d_ff": 128}
    return config, {"encodings_and_masks": [(noise(1, 8, 64), torch.ones(1, 8))],
                    "decoder_input_tokens": noise(1, 16, 16), "decoder_noise_time": torch.rand(1)}


@entry("RFD4ProteinaTransformer")
def _proteina(name: str) -> Entry:
    times = ("time_emb_bb_ca", "time_emb_local_latents")
    config = {"nlayers": 2, "token_dim": 64, "nheads": 2, "dim_cond": 64, "pair_repr_dim": 64,
              "latent_dim": 16, "t_emb_dim": 64, "tri_mult_c": 64,
              "feats_seq": ("xt_bb_ca", "xt_local_latents"), "feats_cond_seq": times,
              "feats_pair_repr": ("xt_bb_ca_pair_dists",), "feats_pair_cond": times}
    tokens = torch.ones(1, 16, dtype=torch.bool)
    conditioning = {"is_in_context_conditioning": ~tokens, "supports_local_latent": tokens}
    return config, {"bb_ca": noise(1, 16, 3), "local_latents": noise(1, 16, 16),
                    "bb_ca_time": torch.rand(1), "local_latents_time": torch.rand(1),
                    "padding_mask": tokens, "conditioning": conditioning}
