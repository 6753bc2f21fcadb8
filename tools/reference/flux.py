"""The miniflux transformer: PyramidFluxTransformer."""

import torch
from torch import nn
from torch.nn import functional as F

from .transformer import (JointBlock, NormLinear, RmsNorm, TimeTextEmbed, attend, attention_mask, normed,
                          rotary_table, rotate, unpatchify)


class SingleAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = RmsNorm(width // heads, 1e-6), RmsNorm(width // heads, 1e-6)

    def forward(self, x, table, mask):
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        y = attend(rotate(self.norm_q(q), table), rotate(self.norm_k(k), table), v, mask)
        return y.transpose(1, 2).flatten(2)


class SingleBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm = NormLinear(width, 3)
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(5 * width, width)
        self.attn = SingleAttention(width, heads)

    def forward(self, x, temb, table, mask):
        shift, scale, gate = self.norm(temb)
        n = normed(x, shift, scale)
        mlp = F.gelu(self.proj_mlp(n), approximate="tanh")
        return x + gate * self.proj_out(torch.cat([self.attn(n, table, mask), mlp], -1))


def patch_tokens(clip):
    """[B, C, T, h, w] -> [B, T*h/2*w/2, 2*2*C], features ordered (p1, p2, c)."""
    x = clip.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))  # B C T h p1 w p2
    return x.permute(0, 2, 3, 5, 4, 6, 1).flatten(4).flatten(1, 3)


def axis_positions(stage_length, length):
    """Positions of a clip's grid along one axis: the current stage's indices, resized linearly."""
    index = torch.arange(stage_length, dtype=torch.float32)
    if length == stage_length:
        return index
    return F.interpolate(index[None, None], length, mode="linear", align_corners=False)[0, 0]


class Flux(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.axes = config["num_attention_heads"], config["axes_dims_rope"]
        width = self.heads * config["attention_head_dim"]
        self.x_embedder = nn.Linear(config["in_channels"], width)
        self.context_embedder = nn.Linear(config["joint_attention_dim"], width)
        self.time_text_embed = TimeTextEmbed(width, config["pooled_projection_dim"])
        self.transformer_blocks = nn.ModuleList(
            JointBlock(width, self.heads, 1e-6, ("norm_added_q", "norm_added_k"), False)
            for _ in range(config["num_layers"]))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(width, self.heads) for _ in range(config["num_single_layers"]))
        self.norm_out = NormLinear(width, 2)
        self.proj_out = nn.Linear(width, config["in_channels"])

    def positions(self, clips):
        """(time, y, x) of every image token, [L, 3]."""
        height, width = (n // 2 for n in clips[-1].shape[3:])
        rows, seen = [], 0
        for clip in clips:
            t, h, w = clip.shape[2], clip.shape[3] // 2, clip.shape[4] // 2
            grid = torch.meshgrid(seen + torch.arange(t).float(), axis_positions(height, h), axis_positions(width, w),
                                  indexing="ij")
            rows.append(torch.stack(grid, -1).flatten(0, 2))
            seen += t
        return torch.cat(rows)

    def forward(self, clips, timestep, text, text_mask, pooled):
        image = self.x_embedder(torch.cat([patch_tokens(clip) for clip in clips], 1))
        text = self.context_embedder(text)
        positions = self.positions(clips).to(image.device)
        mask = attention_mask(text_mask, positions[:, 0].long())
        padded = F.pad(positions, (0, 0, text.shape[1], 0))
        tables = [rotary_table(padded[:, a], n) for a, n in enumerate(self.axes)]
        table = tuple(torch.cat(part, -1) for part in zip(*tables))
        temb = self.time_text_embed(timestep, pooled)
        for block in self.transformer_blocks:
            text, image = block(text, image, temb, table, mask)
        x = torch.cat([text, image], 1)
        for block in self.single_transformer_blocks:
            x = block(x, temb, table, mask)
        scale, shift = self.norm_out(temb)
        height, width = (n // 2 for n in clips[-1].shape[3:])
        out = self.proj_out(normed(x[:, -height * width:], shift, scale))
        return unpatchify(out, height, width)
