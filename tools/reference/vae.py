"""The causal 3-D VAE: encoder, decoder, streaming, and the published tiling."""

import torch
from torch import nn
from torch.nn import functional as F


class CausalConv(nn.Module):
    """A convolution that sees no later frame.

    Given a `stream` (a dict kept between windows), it carries the frames that the next window needs; without one,
    or in the first window, zero frames stand in front.
    """

    def __init__(self, inputs, outputs, kernel=3, stride=(1, 1, 1)):
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride=stride)
        self.side, self.front, self.time_stride = kernel // 2, kernel - 1, stride[0]

    def forward(self, x, stream=None):
        if self.front:
            carried = None if stream is None else stream.get(id(self))
            if carried is None:
                x = F.pad(x, (0, 0, 0, 0, self.front, 0))
            else:
                x = torch.cat([carried, x], 2)
            if stream is not None:
                stream[id(self)] = x[:, :, -(1 if self.time_stride == 2 else 2):]
        return F.conv3d(x, self.conv.weight, self.conv.bias, self.conv.stride, (0, self.side, self.side))


class NormSilu(nn.GroupNorm):
    """Group norm with the statistics of one frame, then SiLU."""

    def forward(self, x):
        batch, _, frames = x.shape[:3]
        y = F.silu(super().forward(x.transpose(1, 2).flatten(0, 1)))
        return y.unflatten(0, (batch, frames)).transpose(1, 2)


class Resnet(nn.Module):
    def __init__(self, inputs, outputs, groups):
        super().__init__()
        self.norm1, self.norm2 = NormSilu(groups, inputs, 1e-6), NormSilu(groups, outputs, 1e-6)
        self.conv1, self.conv2 = CausalConv(inputs, outputs), CausalConv(outputs, outputs)
        if inputs != outputs:
            self.conv_shortcut = CausalConv(inputs, outputs, 1)

    def forward(self, x, stream=None):
        y = self.conv1(self.norm1(x), stream)
        y = self.conv2(self.norm2(y), stream)
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + y


class FrameAttention(nn.Module):
    """Self-attention within each frame, one head."""

    def __init__(self, width, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, 1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        batch, _, frames, height, width = x.shape
        tokens = self.group_norm(x.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        y = self.to_out[0](F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])
        y = y.transpose(1, 2).unflatten(2, (height, width)).unflatten(0, (batch, frames)).transpose(1, 2)
        return x + y


class MidBlock(nn.Module):
    def __init__(self, width, groups):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(width, width, groups), Resnet(width, width, groups)])
        self.attentions = nn.ModuleList([FrameAttention(width, groups)])

    def forward(self, x, stream=None):
        return self.resnets[1](self.attentions[0](self.resnets[0](x, stream)), stream)


class Sampler(nn.Module):
    """Holds the convolution of a down- or upsampler under its published name."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.conv = CausalConv(*args, **kwargs)


class DownBlock(nn.Module):
    def __init__(self, inputs, outputs, layers, groups, space, time):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(inputs if i == 0 else outputs, outputs, groups) for i in range(layers))
        if space:
            self.downsamplers = nn.ModuleList([Sampler(outputs, outputs, stride=(1, 2, 2))])
        if time:
            self.temporal_downsamplers = nn.ModuleList([Sampler(outputs, outputs, stride=(2, 1, 1))])

    def forward(self, x, stream=None):
        for resnet in self.resnets:
            x = resnet(x, stream)
        for name in ("downsamplers", "temporal_downsamplers"):
            if hasattr(self, name):
                x = getattr(self, name)[0].conv(x, stream)
        return x


def shuffle_space(x):
    """[B, (c, p1, p2), T, H, W] -> [B, c, T, 2H, 2W]."""
    x = x.unflatten(1, (-1, 2, 2))  # B c p1 p2 T H W
    return x.permute(0, 1, 4, 5, 2, 6, 3).flatten(5).flatten(3, 4)


def shuffle_time(x):
    """[B, (c, p), T, H, W] -> [B, c, 2T, H, W]."""
    x = x.unflatten(1, (-1, 2))
    return x.permute(0, 1, 3, 2, 4, 5).flatten(2, 3)


class UpBlock(nn.Module):
    def __init__(self, inputs, outputs, layers, groups, space, time):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(inputs if i == 0 else outputs, outputs, groups) for i in range(layers))
        if space:
            self.upsamplers = nn.ModuleList([Sampler(outputs, 4 * outputs)])
        if time:
            self.temporal_upsamplers = nn.ModuleList([Sampler(outputs, 2 * outputs)])

    def forward(self, x, stream=None):
        for resnet in self.resnets:
            x = resnet(x, stream)
        if hasattr(self, "upsamplers"):
            x = shuffle_space(self.upsamplers[0].conv(x, stream))
        if hasattr(self, "temporal_upsamplers"):
            conv = self.temporal_upsamplers[0].conv
            first = stream is None or id(conv) not in stream
            x = shuffle_time(conv(x, stream))
            x = x[:, :, 1:] if first else x
        return x


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        widths, groups = c["encoder_block_out_channels"], c["encoder_norm_num_groups"]
        self.conv_in = CausalConv(c["encoder_in_channels"], widths[0])
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[max(i - 1, 0)], widths[i], c["encoder_layers_per_block"][i], groups,
                      c["encoder_spatial_down_sample"][i], c["encoder_temporal_down_sample"][i])
            for i in range(len(widths)))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = NormSilu(groups, widths[-1], 1e-6)
        self.conv_out = CausalConv(widths[-1], 2 * c["encoder_out_channels"])

    def forward(self, x, stream=None):
        x = self.conv_in(x, stream)
        for block in self.down_blocks:
            x = block(x, stream)
        return self.conv_out(self.conv_norm_out(self.mid_block(x, stream)), stream)


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        widths, groups = c["decoder_block_out_channels"][::-1], c["decoder_norm_num_groups"]
        self.conv_in = CausalConv(c["decoder_in_channels"], widths[0])
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            UpBlock(widths[max(i - 1, 0)], widths[i], c["decoder_layers_per_block"][i], groups,
                    c["decoder_spatial_up_sample"][i], c["decoder_temporal_up_sample"][i])
            for i in range(len(widths)))
        self.conv_norm_out = NormSilu(groups, widths[-1], 1e-6)
        self.conv_out = CausalConv(widths[-1], c["decoder_out_channels"])

    def forward(self, z, stream=None):
        x = self.mid_block(self.conv_in(z, stream), stream)
        for block in self.up_blocks:
            x = block(x, stream)
        return self.conv_out(self.conv_norm_out(x), stream)


class Vae(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        latent = config["encoder_out_channels"]
        self.quant_conv = CausalConv(2 * latent, 2 * latent, 1)
        self.post_quant_conv = CausalConv(latent, latent, 1)

    def moments(self, pixels, windows=None):
        """Pixels [B, 3, 1+8k, H, W] in [-1, 1] -> mean and logvar [B, 32, 1+k, H/8, W/8].

        `windows` = (first, later) frame counts encodes as a stream."""
        return run_windows(lambda x, s: self.quant_conv(self.encoder(x, s)), pixels, windows)

    def decode(self, z, windows=None):
        """Latents [B, 16, T, h, w] -> pixels [B, 3, 8(T-1)+1, 8h, 8w]; `windows` = (first, later) latent counts."""
        return run_windows(lambda x, s: self.decoder(self.post_quant_conv(x), s), z, windows)

    def moments_tiled(self, pixels, tile=256, windows=None):
        return tiled(lambda x: self.moments(x, windows), pixels, tile, tile * 3 // 4, tile // 8 // 4, tile // 8 * 3 // 4)

    def decode_tiled(self, z, tile=256, windows=None):
        small = tile // 8
        return tiled(lambda x: self.decode(x, windows), z, small, small * 3 // 4, tile // 4, tile * 3 // 4)


def run_windows(step, x, windows):
    if windows is None:
        return step(x, None)
    first, later = windows
    stream = {}
    parts = [step(x[:, :, :first], stream)]
    parts += [step(x[:, :, at:at + later], stream) for at in range(first, x.shape[2], later)]
    return torch.cat(parts, 2)


def blend(before, after, extent, axis):
    """Fade from the end of `before` into the start of `after` along an axis, over at most `extent` positions."""
    extent = min(extent, before.shape[axis], after.shape[axis])
    weight = (torch.arange(extent, device=after.device) / extent).reshape([-1 if a == axis else 1 for a in range(5)])
    head = before.narrow(axis, before.shape[axis] - extent, extent) * (1 - weight) \
        + after.narrow(axis, 0, extent) * weight
    return torch.cat([head, after.narrow(axis, extent, after.shape[axis] - extent)], axis)


def tiled(run, x, tile, stride, blend_extent, keep):
    """The published tiling: overlapping tiles, each blended with its upper and left neighbour."""
    if x.shape[3] <= tile and x.shape[4] <= tile:
        return run(x)
    rows = []
    for i, top in enumerate(range(0, x.shape[3], stride)):
        row = []
        for j, left in enumerate(range(0, x.shape[4], stride)):
            part = run(x[:, :, :, top:top + tile, left:left + tile])
            if i:
                part = blend(rows[i - 1][j], part, blend_extent, 3)
            if j:
                part = blend(row[j - 1], part, blend_extent, 4)
            row.append(part)
        rows.append(row)
    return torch.cat([torch.cat([t[:, :, :, :keep, :keep] for t in row], 4) for row in rows], 3)
