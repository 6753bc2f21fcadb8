"""Group norm per frame followed by SiLU, as two passes over memory on a GPU (training only).

The statistics of a channel in a frame are its sum and its sum of squares; everything between those and the scale and
shift of the channel is a few tiny tensors. So a forward is one reduction and one elementwise
kernel, and a backward likewise. Pixels lie channels-last: [frames, positions, channels].
"""

import torch
import triton
import triton.language as tl

ROWS, SPLIT = 128, 8


@triton.jit
def load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def sums_kernel(x, g, a, b, first, second, positions, C: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
                SPLIT: tl.constexpr, BACKWARD: tl.constexpr):
    """Per frame and channel: sums of x and x^2; backward: sums of x*d and d, with d = g * silu'(a*x + b)."""
    frame, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, WIDE)
    scale = load(a, frame * C + channel, channel < C) if BACKWARD else 0.0
    shift = load(b, frame * C + channel, channel < C) if BACKWARD else 0.0
    one = tl.zeros([ROWS, WIDE], tl.float32)
    two = tl.zeros([ROWS, WIDE], tl.float32)
    for row in range(part * ROWS, positions, ROWS * SPLIT):
        rows = row + tl.arange(0, ROWS)
        mask = (rows < positions)[:, None] & (channel < C)[None, :]
        at = (frame * positions + rows)[:, None] * C + channel[None, :]
        value = load(x, at, mask)
        if BACKWARD:
            z = value * scale[None, :] + shift[None, :]
            s = tl.sigmoid(z)
            d = load(g, at, mask) * s * (1 + z * (1 - s))
            one += value * d
            two += d
        else:
            one += value
            two += value * value
    out = (frame * SPLIT + part) * C + channel
    tl.store(first + out, tl.sum(one, 0), mask=channel < C)
    tl.store(second + out, tl.sum(two, 0), mask=channel < C)


@triton.jit
def apply_kernel(x, g, a, b, ds, dq, y, positions, C: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
                 BACKWARD: tl.constexpr):
    """silu(a*x + b); backward: g * silu'(a*x + b) * a + ds + 2*x*dq."""
    frame = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDE)
    mask = (rows < positions)[:, None] & (channel < C)[None, :]
    at = (frame * positions + rows)[:, None] * C + channel[None, :]
    scale = load(a, frame * C + channel, channel < C)
    value = load(x, at, mask)
    z = value * scale[None, :] + load(b, frame * C + channel, channel < C)[None, :]
    s = tl.sigmoid(z)
    if BACKWARD:
        out = load(g, at, mask) * s * (1 + z * (1 - s)) * scale[None, :]
        out += load(ds, frame * C + channel, channel < C)[None, :]
        out += 2 * value * load(dq, frame * C + channel, channel < C)[None, :]
    else:
        out = z * s
    tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)


def shape_of(x):
    batch, channels, frames, height, width = x.shape
    return batch * frames, height * width, channels


def sums(x, g, a, b, backward):
    frames, positions, channels = shape_of(x)
    first, second = torch.empty(2, frames, SPLIT, channels, device=x.device)
    sums_kernel[(frames, SPLIT)](x, g, a, b, first, second, positions, C=channels,
                                 WIDE=triton.next_power_of_2(channels), ROWS=ROWS, SPLIT=SPLIT, BACKWARD=backward)
    return first.sum(1), second.sum(1)


def apply(x, g, a, b, ds, dq, backward):
    frames, positions, channels = shape_of(x)
    y = torch.empty_like(x)
    apply_kernel[(frames, triton.cdiv(positions, ROWS))](
        x, g, a, b, ds, dq, y, positions, C=channels, WIDE=triton.next_power_of_2(channels), ROWS=ROWS,
        BACKWARD=backward)
    return y


class NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        x = x.contiguous(memory_format=torch.channels_last_3d)
        _, positions, channels = shape_of(x)
        each = channels // groups
        total, squares = (t.unflatten(1, (groups, each)) for t in sums(x, x, x, x, False))
        count = positions * each
        mean = total.sum(2, keepdim=True) / count
        rate = (squares.sum(2, keepdim=True) / count - mean * mean).clamp(min=0).add(eps).rsqrt()
        a = (rate * weight.float().unflatten(0, (groups, each))).contiguous()
        b = (bias.float().unflatten(0, (groups, each)) - mean * a).contiguous()
        ctx.save_for_backward(x, weight, mean, rate, a, b)
        ctx.count = count
        return apply(x, x, a, b, x, x, False)

    @staticmethod
    def backward(ctx, g):
        x, weight, mean, rate, a, b = ctx.saved_tensors
        g = g.contiguous(memory_format=torch.channels_last_3d)
        da, db = (t.view_as(a) for t in sums(x, g, a, b, True))
        da = da - mean * db  # b holds -mean * a
        dw, dbias = (da * rate).sum(0).flatten(), db.sum(0).flatten()
        drate = (da * weight.float().view(a.shape[1:])).sum(2, keepdim=True)
        dvariance = -0.5 * drate * rate ** 3
        dmean = -(a * db).sum(2, keepdim=True) - 2 * mean * dvariance
        ds, dq = ((d / ctx.count).expand_as(a).contiguous() for d in (dmean, dvariance))
        return apply(x, g, a, b, ds, dq, True), dw, dbias, None, None


def norm_silu(x, weight, bias, groups, eps):
    return NormSilu.apply(x, weight, bias, groups, eps)
