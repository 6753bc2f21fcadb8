"""Write a checkpoint of random weights in a published layout and of the published size.

    python tools/random_checkpoint.py sd3 DIR                       # or miniflux; all components
    python tools/random_checkpoint.py sd3 DIR --components transformer,vae    # of the others config.json only
    python tools/random_checkpoint.py miniflux DIR --scale tiny     # for tests: the same layout, few values

The weights are bf16 and seeded by their names. Tokenizers are not written: single calls need none. Where PyTorch sees
a GPU the values are drawn on it (another draw than on a CPU).

Nothing is left at its initial value of nought or one: adaptive norms, gates and biases all count. Matrices are scaled
by their number of inputs, so that activations stay near one however deep the network is; query and key norms are
around 1.5, so that attention prefers some keys to others as a trained one does.
"""

import argparse
import json
import math
import pathlib
import sys
import time
import zlib

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from reference.clip import Clip  # noqa: E402
from reference.flux import Flux  # noqa: E402
from reference.mmdit import Mmdit  # noqa: E402
from reference.t5 import T5  # noqa: E402
from reference.vae import Vae  # noqa: E402

MMDIT = {
    "_class_name": "PyramidDiffusionMMDiT", "_diffusers_version": "0.30.0", "attention_head_dim": 64,
    "caption_projection_dim": 1536, "in_channels": 16, "joint_attention_dim": 4096, "max_num_frames": 200,
    "num_attention_heads": 24, "num_layers": 24, "patch_size": 2, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192, "pos_embed_type": "sincos", "qk_norm": "rms_norm", "sample_size": 128,
    "use_flash_attn": False, "use_gradient_checkpointing": False, "use_temporal_causal": True}
FLUX = {
    "_class_name": "PyramidFluxTransformer", "_diffusers_version": "0.30.3", "attention_head_dim": 64,
    "axes_dims_rope": [16, 24, 24], "in_channels": 64, "interp_condition_pos": True, "joint_attention_dim": 4096,
    "num_attention_heads": 30, "num_layers": 8, "num_single_layers": 16, "patch_size": 1, "pooled_projection_dim": 768,
    "use_flash_attn": False, "use_gradient_checkpointing": False, "use_temporal_causal": True}
VAE = {
    "_class_name": "CausalVideoVAE", "_diffusers_version": "0.29.2", "add_post_quant_conv": True,
    "decoder_act_fn": "silu", "decoder_block_dropout": [0.0] * 4, "decoder_block_out_channels": [128, 256, 512, 512],
    "decoder_in_channels": 16, "decoder_layers_per_block": [3, 3, 3, 3], "decoder_norm_num_groups": 32,
    "decoder_out_channels": 3, "decoder_spatial_up_sample": [True, True, True, False],
    "decoder_temporal_up_sample": [True, True, True, False], "decoder_type": "causal_vae_conv",
    "decoder_up_block_types": ["UpDecoderBlockCausal3D"] * 4, "downsample_scale": 8, "encoder_act_fn": "silu",
    "encoder_block_dropout": [0.0] * 4, "encoder_block_out_channels": [128, 256, 512, 512], "encoder_double_z": True,
    "encoder_down_block_types": ["DownEncoderBlockCausal3D"] * 4, "encoder_in_channels": 3,
    "encoder_layers_per_block": [2, 2, 2, 2], "encoder_norm_num_groups": 32, "encoder_out_channels": 16,
    "encoder_spatial_down_sample": [True, True, True, False],
    "encoder_temporal_down_sample": [True, True, True, False], "encoder_type": "causal_vae_conv",
    "interpolate": False, "sample_size": 256, "scaling_factor": 0.13025}
CLIP_L = {
    "architectures": ["CLIPTextModelWithProjection"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0,
    "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0,
    "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
    "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
    "projection_dim": 768, "vocab_size": 49408}
CLIP_G = {**CLIP_L, "hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20,
          "num_hidden_layers": 32, "projection_dim": 1280}
T5_XXL = {
    "architectures": ["T5EncoderModel"], "classifier_dropout": 0.0, "d_ff": 10240, "d_kv": 64, "d_model": 4096,
    "decoder_start_token_id": 0, "dense_act_fn": "gelu_new", "dropout_rate": 0.0, "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": False, "is_gated_act": True,
    "layer_norm_epsilon": 1e-06, "model_type": "t5", "num_decoder_layers": 24, "num_heads": 64, "num_layers": 24,
    "pad_token_id": 0, "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False, "use_cache": False, "vocab_size": 32128}

# What differs at `--scale tiny`; attention heads stay 64 wide in the transformers.
TINY_DIT = {"num_attention_heads": 2, "num_layers": 2, "joint_attention_dim": 64}
TINY_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
             "projection_dim": 32, "vocab_size": 600}
TINY = {
    "sd3/transformer": {**TINY_DIT, "caption_projection_dim": 128, "pooled_projection_dim": 64,
                        "pos_embed_max_size": 24, "sample_size": 16},
    "miniflux/transformer": {**TINY_DIT, "num_single_layers": 2, "pooled_projection_dim": 32},
    "vae": {"decoder_block_out_channels": [16, 16, 16, 32], "encoder_block_out_channels": [16, 16, 16, 32],
            "decoder_layers_per_block": [1] * 4, "encoder_layers_per_block": [1] * 4, "decoder_norm_num_groups": 8,
            "encoder_norm_num_groups": 8},
    "clip_l": TINY_CLIP,
    "clip_g": TINY_CLIP,
    "t5": {"d_ff": 96, "d_kv": 16, "d_model": 64, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2,
           "vocab_size": 700}}

WITHOUT_PROJECTION = {"architectures": ["CLIPTextModel"]}
DIFFUSION_FILE, TEXT_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"


def components(family):
    """Component -> (folder, config, class, file)."""
    dit = (MMDIT, Mmdit) if family == "sd3" else (FLUX, Flux)
    clip = (CLIP_L, lambda c: Clip(c, True)) if family == "sd3" else \
        ({**CLIP_L, **WITHOUT_PROJECTION}, lambda c: Clip(c, False))
    parts = {
        "transformer": ("diffusion_transformer_768p", *dit, DIFFUSION_FILE),
        "vae": ("causal_video_vae", VAE, Vae, DIFFUSION_FILE),
        "clip_l": ("text_encoder", *clip, TEXT_FILE)}
    if family == "sd3":
        parts["clip_g"] = ("text_encoder_2", CLIP_G, lambda c: Clip(c, True), TEXT_FILE)
    parts["t5"] = ("text_encoder_3" if family == "sd3" else "text_encoder_2", T5_XXL, T5, TEXT_FILE)
    return parts


def position_table(config):
    """The sin-cos table of the sd3 transformer, [1, M * M, width]: columns, then rows; sines, then cosines."""
    m, width = config["pos_embed_max_size"], config["num_attention_heads"] * config["attention_head_dim"]
    base = config["sample_size"] // config["patch_size"]
    rate = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = (torch.arange(m, dtype=torch.float64) * base / m)[:, None] * rate
    axis = torch.cat([angle.sin(), angle.cos()], 1)
    return torch.cat([axis[None].expand(m, m, -1), axis[:, None].expand(m, m, -1)], 2).reshape(1, m * m, width)


def scale(name, shape, config):
    """Mean and standard deviation of the values of a weight."""
    if name.endswith(".bias"):
        adaptive = name.endswith(("norm.linear.bias", "norm1.linear.bias", "norm1_context.linear.bias",
                                  "norm_out.linear.bias"))
        return 0.0, 0.3 if adaptive else 0.1
    if len(shape) == 1:
        heads = name.endswith(tuple(f"attn.norm_{n}.weight" for n in
                                    ("q", "k", "add_q", "add_k", "added_q", "added_k")))
        return 1.5 if heads else 1.0, 0.1
    if name in ("shared.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"):
        return 0.0, 1.0
    if "_embedding." in name:
        return 0.0, 0.5
    inputs = math.prod(shape[1:])
    if name.endswith("SelfAttention.q.weight"):
        return 0.0, 1.5 / math.sqrt(inputs * config["d_kv"])  # T5 does not scale its attention
    # What follows an activation has smaller inputs: about 0.6 of what went into the activation.
    after_activation = ("net.2.weight", "fc2.weight", "wo.weight", "linear_2.weight", "linear.weight",
                        "conv1.conv.weight", "conv2.conv.weight", "conv_out.conv.weight")
    return 0.0, (1.5 if name.endswith(after_activation) else 1.0) / math.sqrt(inputs)


def draw(name, shape, config, seed, device):
    """The values of a weight in bf16, on the device they were drawn on."""
    if name == "pos_embed.pos_embed":
        return position_table(config).to(torch.bfloat16)
    generator = torch.Generator(device).manual_seed(seed << 32 | zlib.crc32(name.encode()))
    mean, deviation = scale(name, shape, config)
    values = torch.randn(shape, generator=generator, device=device)
    return values.mul_(deviation).add_(mean).to(torch.bfloat16)


def shards(weights, limit):
    """Names in order, cut where a shard would grow beyond `limit` values."""
    out, size = [[]], 0
    for name, shape in weights.items():
        size += math.prod(shape)
        if size > limit and out[-1]:
            out.append([])
            size = math.prod(shape)
        out[-1].append(name)
    return out


def write(folder, config, make, file, seed, device):
    with torch.device("meta"):
        weights = {name: tuple(w.shape) for name, w in make(config).state_dict().items()}
    total = sum(math.prod(shape) for shape in weights.values())
    # The published miniflux transformer has no metadata, T5 comes in two files.
    metadata = None if config.get("_class_name") == "PyramidFluxTransformer" else {"format": "pt"}
    split = shards(weights, total * 0.525) if config.get("model_type") == "t5" else [list(weights)]
    stem = file.removesuffix(".safetensors")
    home = {}
    for i, names in enumerate(split):
        path = file if len(split) == 1 else f"{stem}-{i + 1:05d}-of-{len(split):05d}.safetensors"
        save_file({n: draw(n, weights[n], config, seed, device).cpu() for n in names}, folder / path, metadata)
        home.update({name: path for name in names})
    if len(split) > 1:
        index = {"metadata": {"total_size": 2 * total}, "weight_map": dict(sorted(home.items()))}
        (folder / f"{file}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return len(weights), total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=["sd3", "miniflux"])
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--components", help="comma-separated; by default all")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = components(options.family)
    chosen = options.components.split(",") if options.components else list(parts)
    if unknown := set(chosen) - set(parts):
        parser.error(f"{options.family} has no {', '.join(unknown)}; it has {', '.join(parts)}")
    for name, (folder, config, make, file) in parts.items():
        if options.scale == "tiny":
            config = {**config, **TINY.get(f"{options.family}/{name}", TINY.get(name, {}))}
        (options.dir / folder).mkdir(parents=True, exist_ok=True)
        (options.dir / folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if name not in chosen:
            continue
        start = time.time()
        count, total = write(options.dir / folder, config, make, file, options.seed, device)
        print(f"{name}: {count} tensors, {total:,} values, {time.time() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
