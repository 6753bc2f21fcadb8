"""The sd3 transformer: PyramidDiffusionMMDiT."""

import torch
from torch import nn
from torch.nn import functional as F

from .transformer import (JointBlock, NormLinear, TimeTextEmbed, attention_mask, frame_times, normed, rotary_table,
                          unpatchify)


class PatchEmbed(nn.Module):
    """2x2 patches of a clip [B, 16, T, h, w] -> tokens [B, T*h/2*w/2, d], plus the position table's crop."""

    def __init__(self, channels, width, table_size):
        super().__init__()
        self.table_size = table_size
        self.proj = nn.Conv2d(channels, width, 2, stride=2)
        self.pos_embed = nn.Parameter(torch.zeros(1, table_size * table_size, width), requires_grad=False)

    def positions(self, stage_size, clip_size):
        """[h*w, d]: the centred crop for the current stage's grid, resized to the clip's grid. Sizes are (h, w)."""
        (rows, columns), m = stage_size, self.table_size
        top, left = (m - rows) // 2, (m - columns) // 2
        crop = self.pos_embed.unflatten(1, (m, m))[:, top:top + rows, left:left + columns]
        if tuple(clip_size) != tuple(stage_size):
            crop = F.interpolate(crop.permute(0, 3, 1, 2).float(), tuple(clip_size), mode="bilinear",
                                 align_corners=False).permute(0, 2, 3, 1)
        return crop.flatten(1, 2)[0]

    def patches(self, clip):
        """[B, T, h/2*w/2, d], without positions."""
        batch, _, frames = clip.shape[:3]
        x = self.proj(clip.transpose(1, 2).flatten(0, 1))
        return x.flatten(2).transpose(1, 2).unflatten(0, (batch, frames))


class Mmdit(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config["num_attention_heads"]
        width = self.heads * config["attention_head_dim"]
        self.head_width = config["attention_head_dim"]
        self.pos_embed = PatchEmbed(config["in_channels"], width, config["pos_embed_max_size"])
        self.time_text_embed = TimeTextEmbed(width, config["pooled_projection_dim"])
        self.context_embedder = nn.Linear(config["joint_attention_dim"], width)
        layers = config["num_layers"]
        self.transformer_blocks = nn.ModuleList(
            JointBlock(width, self.heads, 1e-5, ("norm_add_q", "norm_add_k"), i == layers - 1) for i in range(layers))
        self.norm_out = NormLinear(width, 2)
        self.proj_out = nn.Linear(width, 4 * config["in_channels"])

    def backbone(self, text, image, temb, table, mask):
        """Text [B, Lt, d] and image tokens [B, Li, d] -> output features of the image tokens [B, Li, 64]."""
        for block in self.transformer_blocks:
            text, image = block(text, image, temb, table, mask)
        scale, shift = self.norm_out(temb)
        return self.proj_out(normed(image, shift, scale))

    def forward(self, clips, timestep, text, text_mask, pooled):
        """clips: history and last the current frame, each [B, 16, T, h, w]. Returns the current frame's velocity."""
        height, width = (n // 2 for n in clips[-1].shape[3:])
        tokens = []
        for clip in clips:
            grid = (clip.shape[3] // 2, clip.shape[4] // 2)
            tokens.append((self.pos_embed.patches(clip) + self.pos_embed.positions((height, width), grid)).flatten(1, 2))
        image = torch.cat(tokens, 1)
        times = frame_times(clips).to(image.device)
        table = rotary_table(F.pad(times, (text.shape[1], 0)), self.head_width)
        temb = self.time_text_embed(timestep, pooled)
        out = self.backbone(self.context_embedder(text), image, temb, table, attention_mask(text_mask, times))
        return unpatchify(out[:, -height * width:], height, width)
