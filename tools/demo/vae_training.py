"""Training of the demo model's VAE: weighted L1 on pixels and their differences, plus a small KL term.

Clips are rendered once into the GPU's memory; every step draws random windows of them. On a GPU each kind of batch
is one captured CUDA graph that holds gathering, forward, backward and update.
"""

import json
import math
import time

import torch
from torch.nn import functional as F

import configs
import data
import vae_start
from reference import vae as reference_vae

# (clips, frames, crop): crops sit around an object. The last quarter of training uses whole frames only.
BATCHES = [(24, 9, 128), (48, 9, 64), (16, 17, 128), (32, 17, 64), (7, 41, 128)]
ORDER = [0, 1, 2, 3, 0, 4, 1, 2, 3, 4]
WHOLE_ORDER = [0, 2, 4, 2]
LATENT_NOISE = 0.1  # relative to a channel's standard deviation: decoding must not hang on the last digit
KL_WEIGHT = 3e-5
# The first latent frame spreads less than the later ones, in the ratio of the published scales; a channel may stray
# from it by a factor before it is held back.
FIRST_RATIO, FIRST_SLACK, FIRST_WEIGHT = math.log(1.8415 / 3.0986), 0.4, 0.01


def use_fast_norm():
    """Let the VAE run its norms through our own GPU kernels (it spends most of its time there otherwise)."""
    from fast_norm import norm_silu

    reference_vae.NormSilu.forward = lambda self, x: norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


class Pool:
    """Rendered clips on the device: pixels, and where the objects are."""

    def __init__(self, count, seed, device, frames=49):
        self.frames = frames
        clips = data.draw_clips(count, seed, pairs=0.15)
        self.pixels = torch.empty(count, frames, data.SIZE, data.SIZE, 3, dtype=torch.uint8, device=device)
        self.cover = torch.empty(count, frames, data.SIZE, data.SIZE, dtype=torch.uint8, device=device)
        for at in range(0, count, 64):
            pixels, cover = data.render(clips[at:at + 64], frames, device)
            self.pixels[at:at + 64], self.cover[at:at + 64] = pixels, (cover > 0).to(torch.uint8)
        self.centre = torch.tensor([[c.objects[0].x, c.objects[0].y] for c in clips], device=device)

    def window(self, count, frames, crop):
        """Random windows: pixels [B, 3, T, c, c] in [-1, 1] and weights [B, 1, T, c, c]."""
        device = self.pixels.device
        clip = torch.randint(len(self.pixels), (count, 1, 1, 1), device=device)
        start = torch.rand(count, device=device) * (self.frames - frames + 1)
        start = torch.where(torch.rand(count, device=device) < 0.3, torch.zeros_like(start), start)
        t = start.long().clamp(max=self.frames - frames)[:, None] + torch.arange(frames, device=device)
        corner = self.centre[clip.flatten()] - crop / 2 + 24 * torch.randn(count, 2, device=device)
        corner = corner.round().long().clamp(0, data.SIZE - crop)
        span = torch.arange(crop, device=device)
        x, y = (corner[:, i, None] + span for i in (0, 1))
        where = (clip, t[:, :, None, None], y[:, None, :, None], x[:, None, None, :])
        pixels = self.pixels[where].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        near = F.max_pool2d(self.cover[where].float(), 9, 1, 4)[:, None]
        return pixels, 1 + 3 * near


def loss_of(vae, pixels, weight):
    mean, logvar = vae.moments(pixels).float().chunk(2, 1)
    logvar = logvar.clamp(-30, 20)
    spread = mean.detach().std((0, 2, 3, 4), keepdim=True)
    std = (logvar.exp() + (LATENT_NOISE * spread).square()).sqrt()
    out = vae.decode(mean + std * torch.randn_like(mean)).float()
    error = out - pixels
    weight = weight / weight.mean()
    loss = (error.abs() * weight).mean()
    for axis in (3, 4):
        step = error.diff(dim=axis)
        loss = loss + 0.5 * (step.abs() * weight.narrow(axis, 1, step.shape[axis])).mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    ratio = (mean[:, :, :1].std((0, 2, 3, 4)) / mean[:, :, 1:].std((0, 2, 3, 4)).clamp(min=1e-4)).log()
    stray = F.relu((ratio - FIRST_RATIO).abs() - FIRST_SLACK).square().mean()
    return loss + KL_WEIGHT * kl + FIRST_WEIGHT * stray, error.detach().square().mean() / 4


def learning_rate(step, steps, peak=1e-3, warm=150):
    if step < warm:
        return peak * (step + 1) / warm
    progress = max(0.0, step / steps - 0.3) / 0.7
    return peak * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * progress)))


class Trainer:
    def __init__(self, device, seed=0, clips=3000):
        torch.manual_seed(seed)
        self.seed, self.done, self.steps = seed, 0, None
        self.device = device
        self.cuda = device != "cpu"
        self.pool = Pool(clips, seed + 1, device)
        self.vae = reference_vae.Vae(configs.vae()).to(device)
        vae_start.start(self.vae, self.pool.window(min(16, clips), 17, 128)[0])
        if self.cuda:
            self.vae.to(memory_format=torch.channels_last_3d)
        self.ema = [p.detach().clone() for p in self.vae.parameters()]
        self.rate = torch.tensor(0.0, device=device)
        self.optimizer = torch.optim.AdamW(self.vae.parameters(), lr=self.rate, betas=(0.9, 0.99), weight_decay=0.01,
                                           fused=self.cuda, capturable=self.cuda)
        self.sums = torch.zeros(2, device=device)
        self.graphs = {}
        self.stream = torch.cuda.Stream() if self.cuda else None  # one for all captures: autograd remembers it

    def step(self, batch):
        pixels, weight = self.pool.window(*batch)
        if self.cuda:
            pixels = pixels.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.cuda):
            loss, mse = loss_of(self.vae, pixels, weight)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step()
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.vae.parameters()], 0.001)
        self.sums += torch.stack([loss.detach(), mse])

    def capture(self, batch):
        """Record one step as a CUDA graph; the warm-up steps train too."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self.step(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.step(batch)
        self.graphs[batch] = graph

    def prepare(self, batches, log):
        """Capture every kind of batch; returns the mean time of a step in seconds."""
        self.rate.fill_(1e-6)
        took = {}
        for batch in batches:
            began = time.time()
            self.capture(batch)
            torch.cuda.synchronize()
            captured = time.time()
            for _ in range(3):
                self.graphs[batch].replay()
            torch.cuda.synchronize()
            took[batch] = (time.time() - captured) / 3
            log(json.dumps({"captured": batch, "seconds": round(captured - began, 1),
                            "step_ms": round(1000 * took[batch], 1)}))
        mixed, whole = (sum(took[batches[i]] for i in order) / len(order) for order in (ORDER, WHOLE_ORDER))
        return 0.75 * mixed + 0.25 * whole

    def run(self, steps, batches=BATCHES, log=print, seconds=None, save=None):
        """Train up to a number of steps, or as many as fit into some seconds (on a GPU). Every few hundred steps the
        loss is logged and `save` called with the state; a restored trainer goes on to the steps it was meant for."""
        each = self.prepare(batches, log) if self.cuda else None
        if self.steps is None:
            self.steps = int(seconds / each) if seconds and each else steps
        log(json.dumps({"vae_steps": self.steps, "from": self.done}))
        began, counted, every = time.time(), 0, max(1, min(500, self.steps // 4))
        self.sums.zero_()
        while self.done < self.steps:
            self.rate.fill_(learning_rate(self.done, self.steps))
            order = ORDER if self.done < 0.75 * self.steps else WHOLE_ORDER
            batch = batches[order[self.done % len(order)] % len(batches)]
            self.graphs[batch].replay() if self.cuda else self.step(batch)
            self.done += 1
            counted += 1
            if self.done % every == 0:
                loss, mse = (self.sums / counted).tolist()
                self.sums.zero_()
                counted = 0
                log(json.dumps({"vae_step": self.done, "loss": round(loss, 5), "psnr": round(-10 * math.log10(mse), 2),
                                "seconds": round(time.time() - began, 1)}))
                if save:
                    save(self.state())

    def state(self):
        moments = self.optimizer.state_dict()["state"]
        return {"done": self.done, "steps": self.steps,
                "model": [p.detach().cpu() for p in self.vae.parameters()], "ema": [p.cpu() for p in self.ema],
                "moments": [{k: v.cpu() for k, v in moments[i].items()} for i in range(len(self.ema))]}

    def restore(self, state):
        """Go on from a saved state. To be called before the first step: it makes the optimizer's buffers."""
        self.done, self.steps = state["done"], state["steps"]
        torch.manual_seed(self.seed + self.done)
        with torch.no_grad():
            for i, p in enumerate(self.vae.parameters()):
                p.copy_(state["model"][i])
                self.ema[i].copy_(state["ema"][i])
                # Where AdamW keeps its step count depends on its flavour.
                place = {"step": self.device if self.cuda else "cpu"}
                self.optimizer.state[p] = {k: v.to(place.get(k, p.device)).clone()
                                           for k, v in state["moments"][i].items()}

    def averaged(self):
        """The model with its averaged weights."""
        vae = reference_vae.Vae(configs.vae()).to(self.device).eval()
        with torch.no_grad():
            for target, value in zip(vae.parameters(), self.ema):
                target.copy_(value)
        return vae.to(memory_format=torch.channels_last_3d) if self.cuda else vae


@torch.no_grad()
def latent_moments(vae, pixels):
    """Posterior mean and logvar of u8 clips [N, T, 128, 128, 3]."""
    x = pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        mean, logvar = vae.moments(x).float().chunk(2, 1)
    return mean, logvar.clamp(-30, 20)


@torch.no_grad()
def fold_whitening(vae, device, clips=256, seed=99, frames=49):
    """Scale and shift each latent channel, inside quant_conv and post_quant_conv, so that the published constants
    bring the first latent frame and the later ones near zero mean and unit variance."""
    means = []
    drawn = data.draw_clips(clips, seed, pairs=0.1)
    for at in range(0, clips, 32):
        means.append(latent_moments(vae, data.render(drawn[at:at + 32], frames, device)[0])[0])
    z = torch.cat(means)
    first, later = z[:, :, 0], z[:, :, 1:]
    spread = [first.std((0, 2, 3)), later.std((0, 2, 3, 4))]
    gain = ((1.8415 / spread[0]) * (3.0986 / spread[1])).sqrt()
    middle = 0.25 * first.mean((0, 2, 3)) + 0.75 * later.mean((0, 2, 3, 4))
    shift = 0.25 * 0.1490 - 0.75 * 0.2343 - gain * middle
    out, back = vae.quant_conv.conv, vae.post_quant_conv.conv
    out.weight[:16] *= gain[:, None, None, None, None]
    out.bias[:16] = out.bias[:16] * gain + shift
    out.bias[16:] += 2 * gain.log()
    back.bias -= (back.weight[:, :, 0, 0, 0] * (shift / gain)).sum(1)
    back.weight /= gain[None, :, None, None, None]
    return {"first_std": spread[0].tolist(), "later_std": spread[1].tolist()}


@torch.no_grad()
def reconstruction(vae, device, count=64, seed=7, frames=49):
    """PSNR on held-out clips: all frames, the first frame, and inside the objects."""
    clips = data.draw_clips(count, seed, held_out="only")
    totals = torch.zeros(3, dtype=torch.double, device=device)
    weights = torch.zeros(3, dtype=torch.double, device=device)
    for at in range(0, count, 16):
        pixels, cover = data.render(clips[at:at + 16], frames, device)
        decoded = vae.decode(latent_moments(vae, pixels)[0])
        error = ((decoded.clamp(-1, 1) + 1) * 127.5 - pixels.permute(0, 4, 1, 2, 3).float()).square().mean(1)
        inside = F.max_pool2d((cover > 0).float(), 5, 1, 2)
        for i, w in enumerate((torch.ones_like(inside), (torch.arange(frames, device=device) == 0).float()
                               [None, :, None, None].expand_as(inside), inside)):
            totals[i] += (error * w).sum()
            weights[i] += w.sum()
    psnr = 10 * torch.log10(255 ** 2 / (totals / weights))
    return dict(zip(("all", "first", "inside"), (round(v, 2) for v in psnr.tolist())))
