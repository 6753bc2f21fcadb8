"""The T5 v1.1 encoder."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class RmsNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps).to(x.dtype) * self.weight


def buckets(length, device):
    """Bucket of key - query for every pair, [length, length]."""
    r = torch.arange(length, device=device)[None, :] - torch.arange(length, device=device)[:, None]
    n = r.abs()
    far = 8 + (8 * (n.clamp(min=1).double() / 8).log() / math.log(16)).floor().long()
    return 16 * (r > 0) + torch.where(n < 8, n, far.clamp(max=15))


class SelfAttention(nn.Module):
    def __init__(self, c, first):
        super().__init__()
        d, inner = c["d_model"], c["num_heads"] * c["d_kv"]
        self.heads = c["num_heads"]
        self.q, self.k, self.v = (nn.Linear(d, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, d, bias=False)
        if first:
            self.relative_attention_bias = nn.Embedding(32, self.heads)

    def forward(self, x, bias):
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(y.transpose(1, 2).flatten(2))


class GatedMlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, inner = c["d_model"], c["d_ff"]
        self.wi_0, self.wi_1 = nn.Linear(d, inner, bias=False), nn.Linear(d, inner, bias=False)
        self.wo = nn.Linear(inner, d, bias=False)

    def forward(self, x):
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class Sublayer(nn.Module):
    def __init__(self, c, name, module):
        super().__init__()
        self.name = name
        setattr(self, name, module)
        self.layer_norm = RmsNorm(c["d_model"], c["layer_norm_epsilon"])

    def forward(self, x, *rest):
        return x + getattr(self, self.name)(self.layer_norm(x), *rest)


class Block(nn.Module):
    def __init__(self, c, first):
        super().__init__()
        self.layer = nn.ModuleList([Sublayer(c, "SelfAttention", SelfAttention(c, first)),
                                    Sublayer(c, "DenseReluDense", GatedMlp(c))])

    def forward(self, x, bias):
        return self.layer[1](self.layer[0](x, bias))


class T5(nn.Module):
    """ids [B, L] and mask [B, L] (1 for real tokens) -> embeddings [B, L, d]."""

    def __init__(self, config):
        super().__init__()
        self.shared = nn.Embedding(config["vocab_size"], config["d_model"])
        self.encoder = nn.Module()
        self.encoder.block = nn.ModuleList(Block(config, i == 0) for i in range(config["num_layers"]))
        self.encoder.final_layer_norm = RmsNorm(config["d_model"], config["layer_norm_epsilon"])

    def forward(self, ids, mask):
        x = self.shared(ids)
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        bias = table(buckets(ids.shape[1], ids.device)).permute(2, 0, 1)[None]
        bias = bias.masked_fill(~mask.bool()[:, None, None, :], torch.finfo(bias.dtype).min).to(x.dtype)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)
