"""Training of the demo model's transformer and text encoders: the paper's three-stage flow matching.

Every step draws clips with one caption each. For each stage every clip gets its own unit (the latent frame to be
made), noise level, renoised start and corrupted history; the three stages share the captions' encoding. All samples
of a stage have one fixed token layout, in which frames that a unit does not have are masked out, so that one step is
one CUDA graph.
"""

import json
import math
import random
import time

import torch
from torch import nn
from torch.nn import functional as F

import configs
import data
import vae_training
import vocabulary
from reference.clip import Clip
from reference.mmdit import Mmdit
from reference.pipeline import IMAGE_SHIFT_SCALE, STAGES, VIDEO_SCALE, VIDEO_SHIFT, double, halve
from reference.schedule import Schedule
from reference.t5 import T5
from reference.tokens import ClipTokenizer, T5Tokenizer
from reference.transformer import rotary_table

FRAMES = 9  # latent frames of a clip: 65 video frames
TEXT = 24  # tokens of a caption in training
CAPTIONS = 3
LOW_SLOTS = [9, 8, 6]  # places for lowest-resolution history frames in each stage's layout
UNIT_WEIGHTS = [0.30, 0.14, 0.11, 0.10, 0.10, 0.09, 0.08, 0.04, 0.04]
STAGE_WEIGHTS = [0.7, 1.0, 1.6]
SCHEDULE = Schedule()


class Model(nn.Module):
    """Everything that is trained together."""

    def __init__(self, clip_size, t5_size):
        super().__init__()
        self.transformer = Mmdit(configs.transformer())
        self.clips = nn.ModuleList([Clip(configs.clip(clip_size, "quick_gelu"), True),
                                    Clip(configs.clip(clip_size, "gelu"), True)])
        self.t5 = T5(configs.t5(t5_size))
        self.start()

    def start(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.6 / math.sqrt(module.weight.shape[1]))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for encoder in self.clips:
            nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight, std=0.3)
            nn.init.normal_(encoder.text_model.embeddings.position_embedding.weight, std=0.1)
        nn.init.normal_(self.t5.shared.weight, std=0.5)
        nn.init.normal_(self.t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=0.1)
        for name, module in self.transformer.named_modules():
            if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
                nn.init.zeros_(module.weight)
        self.transformer.pos_embed.pos_embed.data.copy_(position_table(self.transformer.pos_embed.table_size, 128))
        self.transformer.pos_embed.pos_embed.requires_grad_(True)

    def text(self, clip_ids, t5_ids):
        """(text tokens [B, L, d], mask [B, L], pooled [B, P])."""
        mask = (t5_ids != 0)
        pooled = torch.cat([encoder(clip_ids[i]) for i, encoder in enumerate(self.clips)], -1)
        return self.transformer.context_embedder(self.t5(t5_ids, mask)), mask, pooled


def position_table(size, width):
    """A sine-cosine table over y and x, [1, size*size, width]; its frequencies suit a small grid."""
    rate = 64.0 ** (-torch.arange(width // 4) / (width // 4))
    angle = torch.arange(size)[:, None] * rate
    wave = torch.cat([angle.sin(), angle.cos()], -1)
    y = wave[:, None, :].expand(size, size, -1)
    x = wave[None, :, :].expand(size, size, -1)
    return torch.cat([y, x], -1).reshape(1, size * size, width)


# ----------------------------------------------------------------------------------------------- the pool


class Pool:
    """Latents of many clips in the transformer's scale, with the token ids of their captions."""

    def __init__(self, vae, tokens, count, seed, device):
        clips = data.draw_clips(count, seed, pairs=0.1, captions=CAPTIONS)
        self.latents = torch.empty(count, 16, FRAMES, 16, 16, dtype=torch.bfloat16, device=device)
        generator = torch.Generator(device).manual_seed(seed)
        for at in range(0, count, 64):
            pixels, _ = data.render(clips[at:at + 64], data.MAX_FRAMES, device)
            mean, logvar = vae_training.latent_moments(vae, pixels)
            noise = torch.randn(mean.shape, generator=generator, device=device)
            self.latents[at:at + 64] = to_model(mean + (logvar / 2).exp() * noise).to(torch.bfloat16)
        rng = random.Random(seed)
        texts = [t if rng.random() > 0.08 else vocabulary.add_filler(rng, t) for c in clips for t in c.captions]
        self.clip_ids, self.t5_ids = (t.to(device) for t in tokens(texts + [""]))  # the last row is the empty caption
        self.count = count


class RandomPool:
    """Stands in for a pool while the step is compiled."""

    def __init__(self, count, device):
        self.count = count
        self.latents = torch.randn(count, 16, FRAMES, 16, 16, device=device, dtype=torch.bfloat16)
        self.t5_ids = torch.ones(CAPTIONS * count + 1, TEXT, dtype=torch.long, device=device)
        self.clip_ids = torch.ones(2, CAPTIONS * count + 1, TEXT, dtype=torch.long, device=device)


def to_model(z):
    """Published latent scaling, from the VAE's to the transformer's."""
    shift, scale = IMAGE_SHIFT_SCALE["sd3"]
    return torch.cat([(z[:, :, :1] - shift) * scale, (z[:, :, 1:] - VIDEO_SHIFT) * VIDEO_SCALE], 2)


def to_vae(z):
    shift, scale = IMAGE_SHIFT_SCALE["sd3"]
    return torch.cat([z[:, :, :1] / scale + shift, z[:, :, 1:] / VIDEO_SCALE + VIDEO_SHIFT], 2)


class Tokens:
    def __init__(self, root):
        self.clips = [ClipTokenizer(root / "tokenizer"), ClipTokenizer(root / "tokenizer_2")]
        self.t5 = T5Tokenizer(root / "tokenizer_3")

    def __call__(self, texts):
        """CLIP ids [2, N, TEXT] and T5 ids [N, TEXT]; longer captions keep their end token."""
        def cut(ids, end):
            return ids[:TEXT] if end in ids[:TEXT] else ids[:TEXT - 1] + [end]

        clip = [[cut(t(text), t.end) for text in texts] for t in self.clips]
        return torch.tensor(clip), torch.tensor([cut(self.t5(text), 1) for text in texts])


# ----------------------------------------------------------------------------------------------- one step


def stage_sample(stage, latents, unit):
    """What one stage trains on: noisy input, target, timestep, and the corrupted history pieces.

    latents [B, 16, 9, 16, 16] clean, unit [B]. Returns (current [B,16,h,h], target, timestep [B],
    history [(piece [B, 16, n, h', h'], times [B, n], valid [B, n])]).
    """
    batch, device = len(unit), latents.device
    rows = torch.arange(batch, device=device)
    pyramid = [latents]
    while len(pyramid) < STAGES:
        pyramid.insert(0, halve(pyramid[0]))
    clean = pyramid[stage][rows, :, unit]
    noise = torch.randn_like(clean)
    start = noise
    if stage:
        upsampled = double(pyramid[stage - 1][rows, :, unit].unsqueeze(2)).squeeze(2)
        start = SCHEDULE.start[stage] * noise + (1 - SCHEDULE.start[stage]) * upsampled
    end = SCHEDULE.end[stage] * noise + (1 - SCHEDULE.end[stage]) * clean
    sigma = 1 - torch.randint(1000, (batch,), device=device) / 1000
    first, last = SCHEDULE.timesteps[stage]
    timestep = first + (1 - sigma) / 0.999 * (last - first)
    current = sigma[:, None, None, None] * start + (1 - sigma[:, None, None, None]) * end

    low = torch.arange(LOW_SLOTS[stage], device=device).clamp(max=FRAMES - 1).expand(batch, -1)
    pieces = [(pyramid[0][:, :, low[0]], low, low < (unit - stage)[:, None])]
    for level in range(1, stage + 1):
        time_of = unit - 1 - (stage - level)
        piece = pyramid[level][rows, :, time_of.clamp(min=0)].unsqueeze(2)
        pieces.append((piece, time_of[:, None], (time_of >= 0)[:, None]))
    return current, start - end, timestep, [(corrupt(p), t, v) for p, t, v in pieces]


def corrupt(piece):
    """Mix up to a third of noise into a piece of history (mostly little)."""
    ratio = torch.rand(piece.shape[0], 1, 1, 1, 1, device=piece.device).square() / 3
    return (1 - ratio) * piece + ratio * torch.randn_like(piece)


def stage_velocity(transformer, current, timestep, pieces, unit, text, text_mask, pooled):
    """The transformer in the fixed layout: text, history pieces, current frame. Returns [B, 16, h, h]."""
    grid = current.shape[2] // 2
    embed = transformer.pos_embed
    tokens, times, valid = [], [text_mask * 0], [text_mask]
    for clip, clip_times, clip_valid in pieces + [(current.unsqueeze(2), unit[:, None], unit[:, None] >= 0)]:
        side = clip.shape[3] // 2
        x = embed.patches(clip) + embed.positions((grid, grid), (side, side))
        tokens.append(x.flatten(1, 2))
        times.append(clip_times.repeat_interleave(side * side, 1))
        valid.append(clip_valid.repeat_interleave(side * side, 1))
    times, valid = torch.cat(times, 1), torch.cat(valid, 1)
    allowed = (times[:, :, None] >= times[:, None, :]) & valid[:, None, :]
    allowed = allowed | torch.eye(times.shape[1], dtype=torch.bool, device=times.device)
    mask = torch.zeros(allowed.shape, dtype=torch.bfloat16 if times.is_cuda else torch.float32, device=times.device)
    mask = mask.masked_fill(~allowed, float("-inf"))[:, None].expand(-1, transformer.heads, -1, -1)
    table = rotary_table(times[:, None].clamp(min=0), transformer.head_width)
    temb = transformer.time_text_embed(timestep, pooled)
    out = transformer.backbone(text, torch.cat(tokens, 1), temb, table, mask)[:, -grid * grid:]
    x = out.unflatten(1, (grid, grid)).unflatten(-1, (2, 2, -1))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def learning_rate(step, steps, peak, warm=300):
    if step < warm:
        return peak * (step + 1) / warm
    progress = max(0.0, step / steps - 0.4) / 0.6
    return peak * (0.005 + 0.995 * (0.5 + 0.5 * math.cos(math.pi * progress)))


class Trainer:
    def __init__(self, pool, sizes, device, batch=256, peak=1.5e-3, seed=0):
        torch.manual_seed(seed)
        self.pool, self.device, self.batch, self.peak, self.seed = pool, device, batch, peak, seed
        self.cuda = device != "cpu"
        self.model = Model(*sizes).to(device)
        self.parameters = list(self.model.parameters())
        self.ema = [p.detach().clone() for p in self.parameters]
        self.rate = torch.tensor(0.0, device=device)
        self.keep = torch.tensor(0.0, device=device)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.rate, betas=(0.9, 0.98), weight_decay=0.01,
                                           fused=self.cuda, capturable=self.cuda)
        self.sums = torch.zeros(STAGES, device=device)
        self.unit_table = torch.tensor(UNIT_WEIGHTS, device=device).cumsum(0)
        self.done, self.graph = 0, None
        if self.cuda:
            for block in self.model.transformer.transformer_blocks:
                block.compile(dynamic=False)

    def step(self):
        batch, device, pool = self.batch, self.device, self.pool
        pick = torch.randint(pool.count, (batch,), device=device)
        caption = CAPTIONS * pick + torch.randint(CAPTIONS, (batch,), device=device)
        caption = torch.where(torch.rand(batch, device=device) < 0.1, len(pool.t5_ids) - 1, caption)
        latents = pool.latents[pick].float()
        samples = []
        for stage in range(STAGES):
            unit = torch.searchsorted(self.unit_table, torch.rand(batch, device=device) * 0.9999)
            samples.append((unit, *stage_sample(stage, latents, unit)))
        losses = []
        with torch.autocast(device, torch.bfloat16, enabled=self.cuda):
            text, mask, pooled = self.model.text(pool.clip_ids[:, caption], pool.t5_ids[caption])
            for unit, current, target, timestep, pieces in samples:
                v = stage_velocity(self.model.transformer, current, timestep, pieces, unit, text, mask, pooled)
                losses.append((v.float() - target).square().mean())
        self.optimizer.zero_grad(set_to_none=True)
        sum(w * loss for w, loss in zip(STAGE_WEIGHTS, losses)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        torch._foreach_mul_(self.ema, self.keep)
        torch._foreach_add_(self.ema, torch._foreach_mul([p.detach() for p in self.parameters], 1 - self.keep))
        self.sums += torch.stack(losses).detach()

    def capture(self, log):
        began = time.time()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()
        torch.cuda.synchronize()
        log(json.dumps({"captured": "transformer", "seconds": round(time.time() - began, 1)}))

    def measure(self, log):
        """Capture the step and time it; returns seconds."""
        self.rate.fill_(1e-7)
        self.capture(log)
        began = time.time()
        for _ in range(10):
            self.graph.replay()
        torch.cuda.synchronize()
        return (time.time() - began) / 10

    def run(self, until, steps, log=print, every=1000):
        """Train up to step `until` of a schedule of `steps`."""
        if self.cuda and self.graph is None:
            self.measure(log)
        began, counted = time.time(), 0
        self.sums.zero_()
        while self.done < until:
            self.rate.fill_(learning_rate(self.done, steps, self.peak))
            self.keep.fill_(min(0.9996, (1 + self.done) / (20 + self.done)))
            self.graph.replay() if self.cuda else self.step()
            self.done += 1
            counted += 1
            if self.done % every == 0 or self.done == until:
                losses = [round(v / counted, 5) for v in self.sums.tolist()]
                self.sums.zero_()
                counted = 0
                log(json.dumps({"step": self.done, "loss": losses, "seconds": round(time.time() - began, 1)}))

    def averaged(self):
        """A plain copy of the model with its averaged weights."""
        model = Model(self.model.clips[0].text_model.embeddings.token_embedding.num_embeddings,
                      self.model.t5.shared.num_embeddings).to(self.device).eval()
        with torch.no_grad():
            for target, value in zip(model.parameters(), self.ema):
                target.copy_(value)
        return model

    def state(self):
        moments = self.optimizer.state_dict()["state"]
        return {"done": self.done, "model": [p.detach().cpu() for p in self.parameters],
                "ema": [p.cpu() for p in self.ema],
                "first": [moments[i]["exp_avg"].bfloat16().cpu() for i in range(len(self.parameters))],
                "second": [moments[i]["exp_avg_sq"].bfloat16().cpu() for i in range(len(self.parameters))]}

    def restore(self, state):
        """Go on from a saved state. To be called before the first step: it makes the optimizer's buffers."""
        self.done = state["done"]
        torch.manual_seed(self.seed + self.done)
        with torch.no_grad():
            for i, p in enumerate(self.parameters):
                p.copy_(state["model"][i])
                self.ema[i].copy_(state["ema"][i])
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(self.done), device=self.device),
                    "exp_avg": state["first"][i].to(self.device, torch.float32),
                    "exp_avg_sq": state["second"][i].to(self.device, torch.float32)}
