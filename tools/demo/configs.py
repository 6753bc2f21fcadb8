"""Configurations of the demo model's parts, as they are written into its checkpoint folder."""

TRANSFORMER = "diffusion_transformer_128p"


def vae():
    flags = [True, True, True, False]
    config = {"_class_name": "CausalVideoVAE", "_diffusers_version": "0.29.2", "add_post_quant_conv": True,
              "decoder_type": "causal_vae_conv", "encoder_type": "causal_vae_conv", "downsample_scale": 8,
              "encoder_double_z": True, "interpolate": False, "sample_size": 128, "scaling_factor": 0.13025}
    for side, widths, block, inputs, outputs, sampling in (
            ("encoder", [16, 24, 32, 40], "DownEncoderBlockCausal3D", 3, 16, "down"),
            ("decoder", [24, 32, 40, 40], "UpDecoderBlockCausal3D", 16, 3, "up")):
        config.update({
            f"{side}_act_fn": "silu", f"{side}_block_dropout": [0.0] * 4, f"{side}_block_out_channels": widths,
            f"{side}_in_channels": inputs, f"{side}_out_channels": outputs, f"{side}_layers_per_block": [1] * 4,
            f"{side}_norm_num_groups": 8, f"{side}_spatial_{sampling}_sample": flags,
            f"{side}_temporal_{sampling}_sample": flags, f"{side}_{sampling}_block_types": [block] * 4})
    return config


def transformer():
    return {"_class_name": "PyramidDiffusionMMDiT", "_diffusers_version": "0.30.0", "sample_size": 16,
            "patch_size": 2, "in_channels": 16, "num_layers": 6, "attention_head_dim": 64, "num_attention_heads": 2,
            "caption_projection_dim": 128, "pooled_projection_dim": 64, "pos_embed_max_size": 16,
            "max_num_frames": 16, "qk_norm": "rms_norm", "pos_embed_type": "sincos", "joint_attention_dim": 64,
            "add_temp_pos_embed": True, "temp_pos_embed_type": "rope", "use_t5_mask": True,
            "interp_condition_pos": True, "use_flash_attn": False, "use_temporal_causal": True}


def clip(vocabulary, activation):
    return {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model",
            "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 77, "hidden_act": activation, "projection_dim": 32,
            "eos_token_id": 2, "layer_norm_eps": 1e-5}


def t5(vocabulary):
    return {"architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": vocabulary, "d_model": 64,
            "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2, "feed_forward_proj": "gated-gelu",
            "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
            "layer_norm_epsilon": 1e-6, "is_encoder_decoder": False, "use_cache": False, "dropout_rate": 0.0}
