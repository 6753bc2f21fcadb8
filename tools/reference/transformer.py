"""What both transformers share: embeddings of time and text, norms, rotary positions, joint blocks, clip layout."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class RmsNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class TwoLinear(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inputs, width), nn.Linear(width, width)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeTextEmbed(nn.Module):
    """timestep [B] and pooled text [B, P] -> temb [B, d]."""

    def __init__(self, width, pooled):
        super().__init__()
        self.timestep_embedder = TwoLinear(256, width)
        self.text_embedder = TwoLinear(pooled, width)

    def forward(self, timestep, pooled):
        rate = torch.exp(-math.log(10000) * torch.arange(128, device=timestep.device, dtype=torch.float32) / 128)
        angle = timestep.float()[:, None] * rate
        wave = torch.cat([angle.cos(), angle.sin()], -1).to(pooled.dtype)
        return self.timestep_embedder(wave) + self.text_embedder(pooled)


class NormLinear(nn.Module):
    """AdaLN: `parts` vectors of width d from temb, each [B, 1, d]."""

    def __init__(self, width, parts):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, temb):
        return self.linear(F.silu(temb)).unsqueeze(1).chunk(self.parts, -1)


def normed(x, shift, scale):
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        up = nn.Module()
        up.proj = nn.Linear(width, 4 * width)
        self.net = nn.ModuleList([up, nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x):
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))


def rotary_table(positions, width):
    """cos and sin [..., width/2] of positions [...], angles in f64."""
    rate = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width)
    angle = positions.double()[..., None] * rate
    return angle.cos().float(), angle.sin().float()


def rotate(x, table):
    """Turn the pairs (2k, 2k+1) of x [B, heads, L, 64] by the table's angles ([L, 32] or [B, 1, L, 32]), in f32."""
    cos, sin = table
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def attend(q, k, v, mask):
    """Attention under a boolean mask, or whatever stands in its place: a function of q, k and v."""
    return mask(q, k, v) if callable(mask) else F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class JointAttention(nn.Module):
    """Attention over [text, image] with separate projections."""

    def __init__(self, width, heads, eps, added_names, text_out):
        super().__init__()
        self.heads, self.added_names = heads, added_names
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = RmsNorm(width // heads, eps), RmsNorm(width // heads, eps)
        for name in added_names:
            setattr(self, name, RmsNorm(width // heads, eps))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        if text_out:
            self.to_add_out = nn.Linear(width, width)

    def forward(self, text, image, table, mask):
        def split(x):
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        norm_added_q, norm_added_k = (getattr(self, n) for n in self.added_names)
        q = torch.cat([norm_added_q(split(self.add_q_proj(text))), self.norm_q(split(self.to_q(image)))], 2)
        k = torch.cat([norm_added_k(split(self.add_k_proj(text))), self.norm_k(split(self.to_k(image)))], 2)
        v = torch.cat([split(self.add_v_proj(text)), split(self.to_v(image))], 2)
        y = attend(rotate(q, table), rotate(k, table), v, mask)
        y = y.transpose(1, 2).flatten(2)
        text_y, image_y = y[:, : text.shape[1]], y[:, text.shape[1]:]
        return (self.to_add_out(text_y) if hasattr(self, "to_add_out") else None), self.to_out[0](image_y)


class JointBlock(nn.Module):
    def __init__(self, width, heads, eps, added_names, last):
        super().__init__()
        self.last = last
        self.norm1 = NormLinear(width, 6)
        self.norm1_context = NormLinear(width, 2 if last else 6)
        self.attn = JointAttention(width, heads, eps, added_names, not last)
        self.ff = FeedForward(width)
        if not last:
            self.ff_context = FeedForward(width)

    def forward(self, text, image, temb, table, mask):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.norm1(temb)
        context = self.norm1_context(temb)
        text_in = normed(text, context[1], context[0]) if self.last else normed(text, context[0], context[1])
        text_y, image_y = self.attn(text_in, normed(image, shift_a, scale_a), table, mask)
        image = image + gate_a * image_y
        image = image + gate_m * self.ff(normed(image, shift_m, scale_m))
        if not self.last:
            text = text + context[2] * text_y
            text = text + context[5] * self.ff_context(normed(text, context[3], context[4]))
        return text, image


def frame_times(clips):
    """Time of every image token: the frame's index counted through the clips. clips: list of [B, C, T, H, W]."""
    times, seen = [], 0
    for clip in clips:
        t, h, w = clip.shape[2:]
        times.append((seen + torch.arange(t)).repeat_interleave((h // 2) * (w // 2)))
        seen += t
    return torch.cat(times)


def attention_mask(text_mask, image_times):
    """[B, 1, L, L]: a query may attend a key iff the key is no padding and not later in time."""
    text_times = torch.zeros(text_mask.shape[1], dtype=torch.long, device=text_mask.device)
    times = torch.cat([text_times, image_times.to(text_mask.device)])
    valid = F.pad(text_mask.bool(), (0, len(image_times)), value=True)
    mask = (times[:, None] >= times[None, :])[None] & valid[:, None, :]
    # A padding query sees itself, so that its softmax is defined; nothing that is used reads it.
    mask = mask | torch.eye(len(times), dtype=torch.bool, device=mask.device)
    return mask[:, None]


def unpatchify(tokens, height, width):
    """[B, h*w, 2*2*C] with features (p1, p2, c) -> [B, C, 1, 2h, 2w]."""
    x = tokens.unflatten(1, (height, width)).unflatten(-1, (2, 2, -1))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3).unsqueeze(2)
