"""A quick judge and a batched sampler, to watch training. The real judge is a separate program."""

import torch

import data
import transformer_training
from reference.pipeline import GAMMA, STAGES, double, halve, history

SCHEDULE = transformer_training.SCHEDULE


def block_noise(shape, generator):
    batch, channels, frames, height, width = shape
    e = torch.randn(batch, channels, frames, height // 2, width // 2, 4, generator=generator, device=generator.device)
    e = (1 + GAMMA) ** 0.5 * (e - e.mean(-1, keepdim=True))
    return e.unflatten(-1, (2, 2)).permute(0, 1, 2, 3, 5, 4, 6).flatten(5).flatten(3, 4)


@torch.no_grad()
def sample(model, tokens, prompts, frames, steps, guidance, seed, device, first=None, video_guidance=None):
    """Latents [N, 16, T, 16, 16] in the transformer's scale for a batch of prompts; `first` [N, 16, 1, 16, 16] given
    makes it image to video."""
    generator = torch.Generator(device).manual_seed(seed)
    count = len(prompts)
    clip_ids, t5_ids = (t.to(device) for t in tokens([""] * count + prompts))
    text = model.text(clip_ids, t5_ids)
    transformer = model.transformer
    embed, transformer.context_embedder = transformer.context_embedder, torch.nn.Identity()
    small = halve(halve(torch.randn(count, 16, frames, 16, 16, generator=generator, device=device)) * 2) * 2
    done = torch.zeros(count, 16, 0, 16, 16, device=device) if first is None else first
    given = done.shape[2]
    for unit in range(given, frames):
        x = small[:, :, unit - given:unit - given + 1]
        g = guidance if unit == 0 else (video_guidance or guidance)
        for stage in range(STAGES):
            if stage:
                alpha, beta = SCHEDULE.renoise(stage)
                x = double(x)
                x = alpha * x + beta * block_noise(x.shape, generator)
            past = [torch.cat([c, c]) for c in history(done, stage)]
            timesteps, sigmas = SCHEDULE.steps(stage, steps)
            for k, timestep in enumerate(timesteps):
                t = torch.full((2 * count,), float(timestep), device=device)
                with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
                    v = transformer(past + [torch.cat([x, x])], t, *text).float()
                v = v[:count] + g * (v[count:] - v[:count])
                x = x + float(sigmas[k + 1] - sigmas[k]) * v
        done = torch.cat([done, x], 2)
    transformer.context_embedder = embed
    return done


@torch.no_grad()
def frames_of(vae, latents):
    """u8 [N, T, 128, 128, 3]."""
    z = transformer_training.to_vae(latents)
    with torch.autocast(z.device.type, torch.bfloat16, enabled=z.is_cuda):
        parts = [vae.decode(z[i:i + 8]).float() for i in range(0, len(z), 8)]
    pixels = torch.cat(parts)
    return (pixels * 127.5 + 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)


AREAS = {"circle": 3.1416, "square": 2 * 1.12 ** 2, "triangle": 1.299 * 1.2 ** 2, "star": 10 * 0.5 * 1.2 * 0.5 * 0.5878}
PERIODS = {"circle": 1.0, "square": 90.0, "triangle": 120.0, "star": 72.0}
TURNS = 12


def best_shape(mask):
    """(shape, overlap) of the template that overlaps a mask best, at its centroid and area, over all angles."""
    device = mask.device
    area = mask.sum()
    ys, xs = torch.meshgrid(torch.arange(128, device=device) + 0.5, torch.arange(128, device=device) + 0.5,
                            indexing="ij")
    x, y = (xs * mask).sum() / area, (ys * mask).sum() / area
    best = []
    for shape in data.SHAPES:
        radius = (area / AREAS[shape]).sqrt()
        dx, dy = (xs - x) / radius, (ys - y) / radius
        turns = 1 if shape == "circle" else TURNS
        angle = (torch.arange(turns, device=device) * PERIODS[shape] / turns * torch.pi / 180)[:, None, None]
        px, py = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
        corners = data.polygon(shape)
        inside = (px * px + py * py < 1) if corners is None else data.polygon_distance(px, py, corners) < 0
        best.append(((inside & mask).sum((1, 2)) / (inside | mask).sum((1, 2))).max())
    overlap, index = torch.stack(best).max(0)
    return data.SHAPES[index.item()], overlap.item()


@torch.no_grad()
def judge(frames):
    """(shape, colour, motion) seen in a clip u8 [T, 128, 128, 3] of one object."""
    x = frames.float()
    masks = x.amax(-1) > 115
    area = masks.sum((1, 2)).float()
    if area.min() < 60:
        return None, None, None
    chosen = x[masks]
    table = torch.tensor(list(data.COLOURS.values()), dtype=torch.float32, device=x.device)
    colour = data.COLOUR_NAMES[(chosen.median(0).values - table).norm(dim=1).argmin()]
    span = torch.arange(128, device=x.device) + 0.5
    cx = (masks.sum(1) * span).sum(1) / area
    cy = (masks.sum(2) * span).sum(1) / area
    votes = [best_shape(masks[t]) for t in (0, len(masks) // 3, 2 * len(masks) // 3, len(masks) - 1)]
    names = [v[0] for v in votes]
    shape = max(data.SHAPES, key=lambda s: sum(v[1] for v in votes if v[0] == s))
    if names.count(shape) < 3:
        shape = None
    n = max(2, len(masks) // 8)
    dx, dy = (cx[-n:].mean() - cx[:n].mean()).item(), (cy[-n:].mean() - cy[:n].mean()).item()
    growth = (area[-n:].mean() / area[:n].mean()).item()
    if (cy.max() - cy.min()) > 20 and abs(dy) < 0.65 * (cy.max() - cy.min()) and cy.diff().sign().diff().abs().sum() > 2:
        motion = "bounces"
    elif max(abs(dx), abs(dy)) > 15:
        motion = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
    elif growth > 1.5 or growth < 0.67:
        motion = "grows" if growth > 1 else "shrinks"
    elif shape is not None and (masks[0] ^ masks[len(masks) // 2]).sum() + (masks[0] ^ masks[4 * len(masks) // 5]).sum() \
            > 0.12 * area[0]:
        motion = "spins"
    else:
        motion = None
    return shape, colour, motion


def score(model, vae, tokens, device, repeats=2, frames=7, steps=10, guidance=2.5, seed=5, image=False, limit=None):
    """Shares of held-out clips with the right shape, colour and motion, and the frames."""
    clips = data.draw_clips(2000, seed, held_out="only")
    wanted, chosen = {}, []
    for clip in clips:
        key = (clip.objects[0].shape, clip.objects[0].colour, clip.motion)
        if wanted.setdefault(key, 0) < repeats:
            wanted[key] += 1
            chosen.append(clip)
    chosen = chosen[:limit]
    prompts = [c.captions[0] for c in chosen]
    first = None
    if image:
        import vae_training
        mean, _ = vae_training.latent_moments(vae, data.render(chosen, 1, device)[0])
        first = transformer_training.to_model(mean)
    made = frames_of(vae, sample(model, tokens, prompts, frames, steps, guidance, seed, device, first))
    seen = [judge(f) for f in made]
    right = [[a == b for a, b in zip(s, (c.objects[0].shape, c.objects[0].colour, c.motion))] for s, c in zip(seen, chosen)]
    shares = [round(sum(r[i] for r in right) / len(right), 3) for i in range(3)]
    return dict(zip(("shape", "colour", "motion"), shares)), made, list(zip(prompts, seen))
