"""Write the demo model as a checkpoint folder in the published sd3 layout, in bf16."""

import json

import torch
from safetensors.torch import save_file

import configs
import vocabulary


def write(folder, config, module, name):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tensors = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in module.state_dict().items()}
    save_file(tensors, folder / name, metadata={"format": "pt"})


def export(root, vae, model):
    """model: transformer_training.Model with the averaged weights; vae: with whitening folded in."""
    clip, t5 = vocabulary.write_all(root)
    write(root / "causal_video_vae", configs.vae(), vae, "diffusion_pytorch_model.safetensors")
    write(root / configs.TRANSFORMER, configs.transformer(), model.transformer, "diffusion_pytorch_model.safetensors")
    for name, activation, encoder in zip(("text_encoder", "text_encoder_2"), ("quick_gelu", "gelu"), model.clips):
        write(root / name, configs.clip(clip, activation), encoder, "model.safetensors")
    write(root / "text_encoder_3", configs.t5(t5), model.t5, "model.safetensors")
