"""Text (and image) to video: checkpoint folders, guidance, history, stages, units, decoding."""

import pathlib

import torch
from torch.nn import functional as F

from .checkpoint import load_into, read_config
from .clip import Clip
from .flux import Flux
from .mmdit import Mmdit
from .schedule import GAMMA, STAGES, Schedule
from .t5 import T5
from .tokens import ClipTokenizer, T5Tokenizer
from .vae import Vae

VIDEO_SHIFT, VIDEO_SCALE = -0.2343, 1 / 3.0986
IMAGE_SHIFT_SCALE = {"sd3": (0.1490, 1 / 1.8415), "flux": (-0.04, 1 / 1.8726)}


def text_part(folder):
    config = read_config(folder)
    if config["model_type"] == "t5":
        return load_into(T5(config), folder)
    return load_into(Clip(config, config["architectures"] == ["CLIPTextModelWithProjection"]), folder)


def follow(path):
    """A folder; where it is a small file that names one (a symbolic link in some checkouts), the folder named."""
    return path.parent / path.read_text().strip() if path.is_file() else path


class Noise:
    """Noise in the order in which a run asks for it: drawn from a seed and recorded, or played back.

    `replay` maps the recorded names to tensors: initial, block000, block001, ..., posterior.
    """

    def __init__(self, seed=0, replay=None):
        self.generator = torch.Generator().manual_seed(seed)
        self.replay, self.record, self.blocks = replay, {}, 0

    def take(self, name, draw):
        self.record[name] = self.replay[name].float() if self.replay else draw()
        return self.record[name]

    def normal(self, name, shape):
        return self.take(name, lambda: torch.randn(shape, generator=self.generator))

    def block(self, shape):
        """Noise whose 2x2 blocks have covariance (1 + gamma) I - gamma 11^T; at gamma 1/3 each sums to 0."""
        name, self.blocks = f"block{self.blocks:03d}", self.blocks + 1

        def draw():
            batch, channels, frames, height, width = shape
            e = torch.randn(batch, channels, frames, height // 2, width // 2, 4, generator=self.generator)
            e = (1 + GAMMA) ** 0.5 * (e - e.mean(-1, keepdim=True))
            return e.unflatten(-1, (2, 2)).permute(0, 1, 2, 3, 5, 4, 6).flatten(5).flatten(3, 4)

        return self.take(name, draw)


def halve(x):
    """2x2 means over height and width."""
    return F.avg_pool3d(x, (1, 2, 2))


def double(x):
    return x.repeat_interleave(2, 3).repeat_interleave(2, 4)


def history(done, stage):
    """The clips a unit sees at a stage, oldest first. done: finished latents [B, 16, u, h, w]."""
    left = done.shape[2]
    if left == 0:
        return []
    pyramid = [done]
    while len(pyramid) < STAGES:
        pyramid.insert(0, halve(pyramid[0]))
    level = stage
    clips = [pyramid[level][:, :, left - 1:left]]
    left -= 1
    while left:
        level = max(level - 1, 0)
        take = 1 if level else left
        clips.insert(0, pyramid[level][:, :, left - take:left])
        left -= take
    return clips


class Pipeline:
    """A checkpoint folder of either family, in f32 on the CPU unless moved."""

    def __init__(self, folder, variant):
        folder = pathlib.Path(folder)
        config = read_config(folder / variant)
        self.family = "flux" if config["_class_name"] == "PyramidFluxTransformer" else "sd3"
        self.transformer = load_into((Flux if self.family == "flux" else Mmdit)(config), folder / variant)
        self.vae = load_into(Vae(read_config(folder / "causal_video_vae")), folder / "causal_video_vae")
        names = ["text_encoder", "text_encoder_2"] + (["text_encoder_3"] if self.family == "sd3" else [])
        parts = [text_part(folder / name) for name in names]
        self.clips, self.t5 = parts[:-1], parts[-1]
        homes = [follow(folder / name.replace("text_encoder", "tokenizer")) for name in names]
        self.clip_tokenizers, self.t5_tokenizer = [ClipTokenizer(h) for h in homes[:-1]], T5Tokenizer(homes[-1])
        self.schedule = Schedule()

    def tokens(self, text):
        """Ids for each CLIP encoder, and ids for T5."""
        return [tokenizer(text) for tokenizer in self.clip_tokenizers], self.t5_tokenizer(text)

    def encode_text(self, text):
        """(embeddings [1, 128, d], mask [1, 128], pooled [1, P])."""
        clip_ids, t5_ids = self.tokens(text)
        t5_ids = torch.tensor([t5_ids])
        mask = (torch.arange(t5_ids.shape[1])[None] <= (t5_ids == 1).int().argmax(-1, keepdim=True)).long()
        pooled = torch.cat([clip(torch.tensor([ids])) for clip, ids in zip(self.clips, clip_ids)], -1)
        return self.t5(t5_ids, mask), mask, pooled

    def velocity(self, clips, timestep, text, guidance):
        """Guided velocity; text = (embeddings, mask, pooled), negative first when guided."""
        batch = text[0].shape[0]
        v = self.transformer([c.expand(batch, -1, -1, -1, -1) for c in clips], torch.full((batch,), timestep), *text)
        return v[:1] + guidance * (v[1:] - v[:1]) if batch == 2 else v

    def run_unit(self, done, start, text, steps, guidance, noise, record):
        """One latent frame through the three stages."""
        unit, x = done.shape[2], start
        for stage in range(STAGES):
            if stage:
                alpha, beta = self.schedule.renoise(stage)
                x = double(x)
                x = alpha * x + beta * noise.block(x.shape)
            past = history(done, stage)
            timesteps, sigmas = self.schedule.steps(stage, steps[stage])
            for k, timestep in enumerate(timesteps):
                v = self.velocity(past + [x], float(timestep), text, guidance)
                x = x + float(sigmas[k + 1] - sigmas[k]) * v
            record[f"unit{unit}.stage{stage}"] = x
        return x

    @torch.no_grad()
    def generate(self, prompt, negative, frames, height, width, steps, video_steps, guidance, video_guidance, noise,
                 image=None, linear_guidance=None):
        """Latents [1, 16, T, h, w] in the transformer's scale, and the latents after each unit and stage.

        `image` is u8 [H, W, 3] or None; `linear_guidance` is (alpha, minimum) or None.
        """
        encoded = [self.encode_text(p) for p in ([negative, prompt] if guidance > 0 else [prompt])]
        text = tuple(torch.cat(parts) for parts in zip(*encoded))
        small = halve(halve(noise.normal("initial", (1, 16, frames, height // 8, width // 8))) * 2) * 2
        record = {}
        done = torch.zeros(1, 16, 0, height // 8, width // 8)
        if image is not None:
            pixels = torch.as_tensor(image).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
            mean, logvar = self.vae.moments_tiled(pixels).chunk(2, 1)
            z = mean + (logvar.clamp(-30, 20) / 2).exp() * noise.normal("posterior", mean.shape)
            shift, scale = IMAGE_SHIFT_SCALE[self.family]
            done = (z - shift) * scale
        first = done.shape[2]
        for unit in range(first, frames):
            g = video_guidance if unit or image is not None else guidance
            if linear_guidance:
                g = max(guidance - linear_guidance[0] * unit, linear_guidance[1])
            unit_steps = steps if unit == 0 or image is not None else video_steps
            start = small[:, :, unit - first:unit - first + 1]
            done = torch.cat([done, self.run_unit(done, start, text, unit_steps, g, noise, record)], 2)
        return done, record

    @torch.no_grad()
    def decode(self, latents, tile=256):
        """Frames u8 [T, H, W, 3]."""
        shift, scale = IMAGE_SHIFT_SCALE[self.family]
        z = torch.cat([latents[:, :, :1] / scale + shift, latents[:, :, 1:] / VIDEO_SCALE + VIDEO_SHIFT], 2)
        pixels = self.vae.decode_tiled(z, tile, windows=(2, 1))
        return (pixels * 127.5 + 127.5).clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 3, 0)
