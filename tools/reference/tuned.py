"""The transformers and the VAE made fast with what PyTorch offers: the same weights, the same function, up to rounding.

`Tuned` runs a transformer. What does not change from step to step of a stage (text, history, positions) is computed
once; padding text is dropped; attention is computed without masked pairs (`split`: one call of cuDNN or FlashAttention
per frame and sample) or by FlexAttention with a block mask (`flex`); blocks are compiled; a stage's call can be captured
as a CUDA graph. `tune_vae` changes a VAE in place: channels-last convolutions, compiled norms, shuffles in one copy.
"""

import functools

import torch
from torch import library
from torch.nn import functional as F

from .flux import Flux, patch_tokens
from .transformer import frame_times, normed, rotary_table, unpatchify
from .vae import CausalConv, NormSilu, UpBlock

KINDS = ("split", "flex")
LARGEST = (1 << 31) - 1  # values a convolution takes or gives at once: cuDNN counts in 32 bits
CUDNN_ROWS = 1024  # queries from which on a call goes to cuDNN, which makes a plan for every new shape


class Layout:
    """Who attends whom: text first, padding before it; then frames, each of which sees the text and all before it."""

    def __init__(self, text, valid, frame_tokens, kind):
        self.kind, self.padding = kind, [text - n for n in valid]
        ends, edges = text, []
        for n in frame_tokens:
            ends += n
            edges.append(ends)
        # Text is of the same time as the first frame.
        self.groups = list(zip([0] + edges[:-1], edges))
        self.length, self.block_mask = ends, None

    def attend(self, q, k, v):
        """q, k, v [B, heads, L, 64] -> the same shape, laid out as [B, L, heads, 64]."""
        if self.kind == "flex":
            return self.flex(q, k, v)
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        for b, padding in enumerate(self.padding):
            for start, end in self.groups:
                part = [q[b:b + 1, :, start:end], k[b:b + 1, :, padding:end], v[b:b + 1, :, padding:end]]
                out[b:b + 1, :, start:end] = attend_all(*part)
        return out

    def flex(self, q, k, v):
        if self.block_mask is None:
            from torch.nn.attention.flex_attention import create_block_mask
            group = torch.zeros(self.length, dtype=torch.int32, device=q.device)
            for i, (start, end) in enumerate(self.groups):
                group[start:end] = i
            padding = torch.tensor(self.padding, device=q.device)
            self.block_mask = create_block_mask(lambda b, h, i, j: (group[i] >= group[j]) & (j >= padding[b]),
                                                len(self.padding), None, self.length, self.length, device=q.device)
        out = flex_attention(q.device.type)(q.contiguous(), k.contiguous(), v.contiguous(), block_mask=self.block_mask)
        return out.transpose(1, 2).contiguous().transpose(1, 2)


def attend_all(q, k, v):
    """Every query sees every key."""
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)
    from torch.nn.attention import SDPBackend, sdpa_kernel
    first = SDPBackend.CUDNN_ATTENTION if q.shape[2] >= CUDNN_ROWS else SDPBackend.FLASH_ATTENTION
    with sdpa_kernel([first, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)


@functools.cache
def flex_attention(device):
    """FlexAttention, compiled on a GPU (elsewhere it is plain PyTorch, for tests)."""
    from torch.nn.attention import flex_attention as module
    plain = module.flex_attention
    return torch.compile(plain, dynamic=True) if device == "cuda" else plain


# The layout of the call that is running. The compiler must not look into attention: it would compile the blocks
# anew for every number of frames.
_layout = [None]


@library.custom_op("pyramid_reference::attend", mutates_args=())
def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _layout[0].attend(q, k, v)


@_attend.register_fake
def _(q, k, v):
    batch, heads, length, width = q.shape
    return q.new_empty(batch, length, heads, width).transpose(1, 2)


def attention(q, k, v):
    return _attend(q.to(v.dtype), k.to(v.dtype), v)


class Tuned:
    """A transformer of this folder, in bf16 or f32."""

    def __init__(self, model, compiled):
        self.model, self.flux = model, isinstance(model, Flux)
        self.joint = list(model.transformer_blocks)
        self.single = list(model.single_transformer_blocks) if self.flux else []
        self.compiled = compiled
        if compiled:
            torch._dynamo.config.recompile_limit = 64
            for block in self.joint + self.single:
                block.forward = torch.compile(block.forward)

    def tokens(self, clips):
        """Image tokens of some clips [1, 16, T, h, w], without the positions of sd3."""
        if self.flux:
            return self.model.x_embedder(torch.cat([patch_tokens(clip) for clip in clips], 1))
        return torch.cat([self.model.pos_embed.patches(clip).flatten(1, 2) for clip in clips], 1)

    def positions(self, clips, text, device):
        """The rotary table, and for sd3 what is added to the tokens of each clip."""
        if self.flux:
            padded = F.pad(self.model.positions(clips), (0, 0, text, 0)).to(device)
            tables = [rotary_table(padded[:, a], n) for a, n in enumerate(self.model.axes)]
            return tuple(torch.cat(part, -1) for part in zip(*tables)), None
        grid = [(clip.shape[3] // 2, clip.shape[4] // 2) for clip in clips]
        added = [self.model.pos_embed.positions(grid[-1], g).repeat(clip.shape[2], 1) for g, clip in zip(grid, clips)]
        times = F.pad(frame_times(clips), (text, 0)).to(device)
        return rotary_table(times, self.model.head_width), added

    def dynamic(self, tensor, axis):
        """Tells the compiler that the number of tokens changes from call to call."""
        if self.compiled:
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
        return tensor

    def blocks(self, text, image, temb, table):
        table = tuple(self.dynamic(part, 0) for part in table)
        for block in self.joint:
            text, image = block(text, self.dynamic(image, 1), temb, table, attention)
        if not self.single:
            return image
        x, length = torch.cat([text, image], 1), text.shape[1]
        for block in self.single:
            x = block(self.dynamic(x, 1), temb, table, attention)
        return x[:, length:]


class Call:
    """One stage of one unit: `call(x, timestep)` is the velocity of the current frame for every prompt, negative first.

    clips: history and last a current frame, each [1, 16, T, h, w]; text, text_mask, pooled: of all prompts.
    """

    def __init__(self, tuned, clips, text, text_mask, pooled, kind):
        self.tuned, self.pooled, self.graph = tuned, pooled, None
        valid = text_mask.sum(1).tolist()
        length, batch = max(valid), len(valid)
        turned = torch.stack([torch.cat([t[n:length], t[:n]]) for t, n in zip(text, valid)])
        self.text = tuned.model.context_embedder(turned)
        self.table, added = tuned.positions(clips, length, text.device)
        self.grid = tuple(n // 2 for n in clips[-1].shape[3:])
        self.past = tuned.tokens(clips[:-1]) if len(clips) > 1 else None
        self.added = added and added[-1]
        if self.past is not None and added:
            self.past = self.past + torch.cat(added[:-1])
        frames = [clip.shape[3] * clip.shape[4] // 4 for clip in clips for _ in range(clip.shape[2])]
        self.layout, self.batch = Layout(length, valid, frames, kind), batch

    def run(self, x, timestep):
        model = self.tuned.model
        _layout[0] = self.layout
        now = self.tuned.tokens([x])
        if self.added is not None:
            now = now + self.added
        image = now if self.past is None else torch.cat([self.past.to(now.dtype), now], 1)
        image = image.to(self.text.dtype).expand(self.batch, -1, -1).contiguous()
        temb = model.time_text_embed(timestep.expand(self.batch), self.pooled)
        image = self.tuned.blocks(self.text, image, temb, self.table)[:, -self.grid[0] * self.grid[1]:]
        scale, shift = model.norm_out(temb)
        return unpatchify(model.proj_out(normed(image, shift, scale)), *self.grid)

    def capture(self, x, timestep):
        """Records a CUDA graph, which later calls replay."""
        self.x, self.timestep = x.clone(), timestep.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run(self.x, self.timestep)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self.run(self.x, self.timestep)
        return self

    def __call__(self, x, timestep):
        if self.graph is None:
            return self.run(x, timestep)
        self.x.copy_(x)
        self.timestep.copy_(timestep)
        self.graph.replay()
        return self.out


# The VAE

def norm_silu(x, weight, bias, groups, eps):
    """Group norm with the statistics of each frame, then SiLU: [B, C, T, H, W]."""
    y = x.unflatten(1, (groups, -1)).float()
    variance, mean = torch.var_mean(y, (2, 4, 5), correction=0, keepdim=True)
    y = ((y - mean) * torch.rsqrt(variance + eps)).flatten(1, 2)
    y = y * weight.float()[:, None, None, None] + bias.float()[:, None, None, None]
    return F.silu(y).to(x.dtype).contiguous(memory_format=torch.channels_last_3d)


def convolve(conv, x, side):
    """A convolution of stride 1 in time, in as many parts of time as cuDNN's 32-bit counts ask for."""
    kernel = conv.kernel_size[0]
    frames = x.shape[2] - kernel + 1
    rows = max(conv.in_channels, conv.out_channels) * x.shape[0] * x.shape[3] * x.shape[4]
    most = max(LARGEST // rows - kernel + 1, 1)
    if conv.stride[0] != 1 or frames <= most:
        return F.conv3d(x, conv.weight, conv.bias, conv.stride, (0, side, side))
    parts = -(-frames // most)
    edges = [frames * i // parts for i in range(parts + 1)]
    return torch.cat([F.conv3d(x[:, :, a:b + kernel - 1], conv.weight, conv.bias, conv.stride, (0, side, side))
                      for a, b in zip(edges, edges[1:])], 2)


class TunedConv(CausalConv):
    def forward(self, x, stream=None):
        if self.front:
            carried = None if stream is None else stream.get(id(self))
            if carried is None:
                carried = x.new_zeros(x.shape[0], x.shape[1], self.front, *x.shape[3:])
            x = torch.cat([carried.contiguous(memory_format=torch.channels_last_3d), x], 2)
            if stream is not None:
                stream[id(self)] = x[:, :, -(1 if self.time_stride == 2 else 2):]
        return convolve(self.conv, x.contiguous(memory_format=torch.channels_last_3d), self.side)


class TunedUpBlock(UpBlock):
    def forward(self, x, stream=None):
        for resnet in self.resnets:
            x = resnet(x, stream)
        if hasattr(self, "upsamplers"):
            y = self.upsamplers[0].conv(x, stream).permute(0, 2, 3, 4, 1).unflatten(-1, (-1, 2, 2))  # B T H W c p q
            x = y.permute(0, 1, 2, 5, 3, 6, 4).flatten(4, 5).flatten(2, 3).permute(0, 4, 1, 2, 3)
        if hasattr(self, "temporal_upsamplers"):
            conv = self.temporal_upsamplers[0].conv
            first = stream is None or id(conv) not in stream
            y = conv(x, stream).permute(0, 2, 3, 4, 1).unflatten(-1, (-1, 2))  # B T H W c p
            x = y.permute(0, 1, 5, 2, 3, 4).flatten(1, 2).permute(0, 4, 1, 2, 3)
            x = x[:, :, 1:] if first else x
        return x


def tune_vae(vae, compiled):
    """Changes a VAE in place; its methods stay the same."""
    norm = torch.compile(norm_silu) if compiled else norm_silu
    if compiled:
        torch._dynamo.config.recompile_limit = 64

    class TunedNorm(NormSilu):
        def forward(self, x):
            return norm(x, self.weight, self.bias, self.num_groups, self.eps)

    change = {CausalConv: TunedConv, NormSilu: TunedNorm, UpBlock: TunedUpBlock}
    for module in vae.modules():
        module.__class__ = change.get(type(module), type(module))
    return vae.to(memory_format=torch.channels_last_3d)
