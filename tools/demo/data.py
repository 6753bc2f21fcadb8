"""Procedural clips for the demo model: coloured shapes that move, with captions.

A clip is 128x128 pixels at 24 frames a second, up to 65 frames. One object (sometimes two) of one of four
shapes and eight colours follows one of eight motions on a dark grey background. Some (shape, colour, motion)
combinations are held out: they never occur in training, and the model is scored on them.

Everything is drawn from one seed, in torch, on any device. Run as a program it writes clips with their labels:

    python tools/demo/data.py --render 100 --seed 1 --out DIR [--frames 49] [--held-out any|only|never]
"""

import argparse
import json
import math
import pathlib
import random
from dataclasses import dataclass, field

import numpy as np
import torch

SIZE = 128
MAX_FRAMES = 65

SHAPES = ["circle", "square", "triangle", "star"]
COLOURS = {
    "red": (225, 35, 35),
    "orange": (240, 140, 20),
    "yellow": (240, 225, 40),
    "green": (40, 190, 60),
    "cyan": (40, 215, 225),
    "blue": (45, 80, 235),
    "purple": (155, 50, 215),
    "white": (238, 238, 238),
}
COLOUR_NAMES = list(COLOURS)
MOTIONS = ["right", "left", "up", "down", "grows", "shrinks", "spins", "bounces"]
BACKGROUNDS = ["plain", "checkered", "striped", "shaded"]

SHAPE_WORDS = {
    "circle": ["circle", "circle", "circle", "disc", "ball"],
    "square": ["square", "square", "square", "box"],
    "triangle": ["triangle"],
    "star": ["star"],
}
MOTION_WORDS = {  # (one object, two objects)
    "right": [("moves to the right", "move to the right"), ("moves right", "move right"),
              ("moves from left to right", "move from left to right"), ("slides to the right", "slide to the right"),
              ("goes right", "go right")],
    "left": [("moves to the left", "move to the left"), ("moves left", "move left"),
             ("moves from right to left", "move from right to left"), ("slides to the left", "slide to the left"),
             ("goes left", "go left")],
    "up": [("moves up", "move up"), ("goes up", "go up"), ("rises", "rise"), ("moves upwards", "move upwards"),
           ("floats up", "float up")],
    "down": [("moves down", "move down"), ("goes down", "go down"), ("falls", "fall"),
             ("moves downwards", "move downwards"), ("sinks down", "sink down")],
    "grows": [("grows", "grow"), ("gets bigger", "get bigger"), ("becomes larger", "become larger"),
              ("expands", "expand")],
    "shrinks": [("shrinks", "shrink"), ("gets smaller", "get smaller"), ("becomes smaller", "become smaller")],
    "spins": [("spins", "spin"), ("rotates", "rotate"), ("spins around", "spin around"),
              ("turns around", "turn around")],
    "bounces": [("bounces", "bounce"), ("bounces up and down", "bounce up and down"),
                ("jumps up and down", "jump up and down")],
}
BACKGROUND_WORDS = {
    "plain": ["", "", " on a plain background", " on a dark background", " on a grey background"],
    "checkered": [" on a checkered background", " over a checkered background"],
    "striped": [" on a striped background", " over a striped background"],
    "shaded": [" on a shaded background", " over a shaded background"],
}

# Two objects stay in their own half of the picture, so they never move sideways.
PAIR_MOTIONS = ["up", "down", "grows", "shrinks", "spins", "bounces"]


def is_allowed(shape, motion):
    """A circle that spins looks still, so it is never asked for."""
    return not (shape == "circle" and motion == "spins")


def is_held_out(shape, colour, motion):
    """One colour for every (shape, motion): an eighth of all combinations is never trained on."""
    code = 3 * SHAPES.index(shape) + COLOUR_NAMES.index(colour) + 5 * MOTIONS.index(motion)
    return is_allowed(shape, motion) and code % 8 == 7


def held_out_combinations():
    return [(s, c, m) for s in SHAPES for c in COLOUR_NAMES for m in MOTIONS if is_held_out(s, c, m)]


@dataclass
class Object:
    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass
class Clip:
    """What a clip shows. `objects` has one or two entries, the left one first; all share the motion."""

    objects: list
    motion: str
    background: str
    grey: float
    captions: list = field(default_factory=list)

    @property
    def held_out(self):
        return any(is_held_out(o.shape, o.colour, self.motion) for o in self.objects)


def noun(rng, obj, plain):
    word = obj.shape if plain else rng.choice(SHAPE_WORDS[obj.shape])
    colour = obj.colour if plain else rng.choice({"purple": ["purple", "purple", "violet"]}.get(obj.colour, [obj.colour]))
    article = "an" if colour == "orange" else "a"
    return f"{article} {colour} {word}"


def caption(rng, clip, plain=False):
    """One sentence for a clip; `plain` gives the most usual wording."""
    pair = len(clip.objects) == 2
    words = MOTION_WORDS[clip.motion]
    motion = (words[0] if plain else rng.choice(words))[pair]
    where = BACKGROUND_WORDS[clip.background][0] if plain else rng.choice(BACKGROUND_WORDS[clip.background])
    nouns = [noun(rng, o, plain) for o in clip.objects]
    if pair:
        subject = f"{nouns[0]} and {nouns[1]}"
        if not plain and rng.random() < 0.3:
            subject = f"{nouns[0]} on the left and {nouns[1]} on the right"
    else:
        subject = nouns[0]
    style = 0 if plain else rng.random()
    if style < 0.75:
        text = f"{subject} {motion}{where}"
    elif style < 0.85 and where:
        text = f"{where.strip()}, {subject} {motion}"
    elif style < 0.93:
        text = f"a video of {subject} that {motion}{where}"
    elif not pair:
        text = f"the {subject.split(' ', 1)[1]} {motion}{where}"
    else:
        text = f"{subject} {motion}{where}"
    return text + ("." if not plain and rng.random() < 0.2 else "")


def start_of(rng, motion, pair_side=None):
    """Centre and radius of an object in the first frame, so that it stays in the picture for all frames."""
    if pair_side is not None:
        x = (33 if pair_side == 0 else 95) + rng.uniform(-3, 3)
        y = {"up": rng.uniform(92, 100), "down": rng.uniform(28, 36), "bounces": rng.uniform(84, 94)}.get(
            motion, rng.uniform(52, 76))
        radius = {"grows": 14, "shrinks": 28}.get(motion, rng.uniform(21, 25))
        return x, y, radius
    radius = {"grows": rng.uniform(16, 19), "shrinks": rng.uniform(41, 44)}.get(motion, rng.uniform(24, 30))
    free = rng.uniform(40, 88)
    if motion == "right":
        return rng.uniform(28, 36), free, radius
    if motion == "left":
        return rng.uniform(92, 100), free, radius
    if motion == "up":
        return free, rng.uniform(92, 100), radius
    if motion == "down":
        return free, rng.uniform(28, 36), radius
    if motion == "bounces":
        return free, rng.uniform(84, 94), radius
    if motion == "spins":
        return free, rng.uniform(40, 88), radius
    return rng.uniform(52, 76), rng.uniform(52, 76), radius


def draw_clip(rng, held_out="never", pairs=0.1, captions=3):
    """Draw one clip. `held_out`: "never" (training), "only" (scoring) or "any"."""
    while True:
        pair = held_out != "only" and rng.random() < pairs
        motion = rng.choice(PAIR_MOTIONS if pair else MOTIONS)
        objects = []
        for side in range(2 if pair else 1):
            shape, colour = rng.choice(SHAPES), rng.choice(COLOUR_NAMES)
            objects.append(Object(shape, colour, *start_of(rng, motion, side if pair else None)))
        if pair and objects[0].colour == objects[1].colour:
            continue
        if not all(is_allowed(o.shape, motion) for o in objects):
            continue
        background = rng.choices(BACKGROUNDS, weights=[0.61, 0.13, 0.13, 0.13])[0]
        clip = Clip(objects, motion, background, rng.choice([28.0, 40.0, 52.0]))
        if held_out != "any" and clip.held_out != (held_out == "only"):
            continue
        clip.captions = [caption(rng, clip) for _ in range(captions)]
        return clip


def draw_clips(count, seed, **options):
    rng = random.Random(seed)
    return [draw_clip(rng, **options) for _ in range(count)]


# ---------------------------------------------------------------------------------------------- drawing


def trajectory(clip, obj, frames):
    """x, y, radius and angle of an object in every frame, each [frames]."""
    t = torch.arange(frames, dtype=torch.float32)
    still = torch.zeros(frames)
    x, y, radius, angle = obj.x + still, obj.y + still, obj.radius + still, still
    slow = 0.55 if len(clip.objects) == 2 else 1.0
    if clip.motion == "right":
        x = x + t
    elif clip.motion == "left":
        x = x - t
    elif clip.motion == "up":
        y = y - t
    elif clip.motion == "down":
        y = y + t
    elif clip.motion == "grows":
        radius = radius + 0.4 * slow * t
    elif clip.motion == "shrinks":
        radius = radius - 0.4 * slow * t
    elif clip.motion == "spins":
        angle = angle + math.radians(3.0) * t
    elif clip.motion == "bounces":
        y = y - 36.0 * torch.sin(math.pi * t / 24.0).abs()
    return torch.stack([x, y, radius, angle])


def polygon(shape):
    """Corners of a shape of radius 1, clockwise on the screen (y down), or None for the circle."""
    def ring(n, radii, turn):
        return [(radii[i % len(radii)] * math.sin(turn + 2 * math.pi * i / n),
                 -radii[i % len(radii)] * math.cos(turn + 2 * math.pi * i / n)) for i in range(n)]

    if shape == "square":
        return ring(4, [1.12], math.pi / 4)
    if shape == "triangle":
        return ring(3, [1.2], 0.0)
    if shape == "star":
        return ring(10, [1.2, 0.5], 0.0)
    return None


def polygon_distance(px, py, corners):
    """Signed distance (negative inside) of points to a closed polygon with the given corners."""
    distance = torch.full_like(px, 1e9)
    inside = torch.zeros_like(px, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        ex, ey = bx - ax, by - ay
        along = (((px - ax) * ex + (py - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        distance = torch.minimum(distance, (px - ax - along * ex) ** 2 + (py - ay - along * ey) ** 2)
        crosses = (ay > py) != (by > py)
        inside ^= crosses & (px < ax + ex * (py - ay) / (ey if ey else 1e-9))
    distance = distance.sqrt()
    return torch.where(inside, -distance, distance)


def paint_background(clips, device):
    """[N, 1, 128, 128, 3], values 0..255."""
    ys, xs = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    patterns = torch.stack([
        torch.zeros(SIZE, SIZE),
        (((xs // 16) + (ys // 16)) % 2) * 18.0 - 9.0,
        ((xs // 16) % 2) * 18.0 - 9.0,
        (ys - 63.5) / 63.5 * 16.0,
    ]).to(device)
    kind = torch.tensor([BACKGROUNDS.index(c.background) for c in clips], device=device)
    grey = torch.tensor([c.grey for c in clips], device=device)
    return (patterns[kind] + grey[:, None, None])[:, None, :, :, None].expand(-1, 1, -1, -1, 3)


def render(clips, frames=MAX_FRAMES, device="cpu", first=0):
    """Draw clips: pixels [N, T, 128, 128, 3] u8 and the coverage of all objects [N, T, 128, 128] f32 in 0..1."""
    ys, xs = torch.meshgrid(torch.arange(SIZE, device=device) + 0.5, torch.arange(SIZE, device=device) + 0.5,
                            indexing="ij")
    pixels = paint_background(clips, device).expand(-1, frames, -1, -1, -1)
    total = torch.zeros(len(clips), frames, SIZE, SIZE, device=device)
    for slot in range(2):
        for shape in SHAPES:
            rows = [i for i, c in enumerate(clips) if len(c.objects) > slot and c.objects[slot].shape == shape]
            if not rows:
                continue
            objects = [clips[i].objects[slot] for i in rows]
            path = torch.stack([trajectory(clips[i], o, first + frames)[:, first:] for i, o in zip(rows, objects)])
            x, y, radius, angle = path.to(device)[..., None, None].unbind(1)
            dx, dy = (xs - x) / radius, (ys - y) / radius
            px = dx * angle.cos() + dy * angle.sin()
            py = dy * angle.cos() - dx * angle.sin()
            corners = polygon(shape)
            distance = (px * px + py * py).sqrt() - 1 if corners is None else polygon_distance(px, py, corners)
            cover = (0.5 - distance * radius).clamp(0, 1)
            colour = torch.tensor([COLOURS[o.colour] for o in objects], dtype=torch.float32, device=device)
            index = torch.tensor(rows, device=device)
            painted = pixels[index] + cover[..., None] * (colour[:, None, None, None, :] - pixels[index])
            pixels = pixels.index_copy(0, index, painted)
            total.index_copy_(0, index, torch.maximum(total[index], cover))
    return (pixels + 0.5).clamp(0, 255).to(torch.uint8), total


def label(clip, name):
    return {
        "file": name,
        "caption": clip.captions[0],
        "shape": clip.objects[0].shape,
        "colour": clip.objects[0].colour,
        "motion": clip.motion,
        "background": clip.background,
        "objects": [{"shape": o.shape, "colour": o.colour, "x": round(o.x, 2), "y": round(o.y, 2),
                     "radius": round(o.radius, 2)} for o in clip.objects],
        "held_out": clip.held_out,
    }


def main():
    parser = argparse.ArgumentParser(description="Render labelled clips of the demo data set.")
    parser.add_argument("--render", type=int, required=True, metavar="N", help="number of clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--held-out", choices=["any", "only", "never"], default="any")
    parser.add_argument("--pairs", type=float, default=0.0, help="share of clips with two objects")
    args = parser.parse_args()
    if not 1 <= args.frames <= MAX_FRAMES:
        parser.error(f"--frames must be 1 to {MAX_FRAMES}")
    args.out.mkdir(parents=True, exist_ok=True)
    clips = draw_clips(args.render, args.seed, held_out=args.held_out, pairs=args.pairs)
    with open(args.out / "labels.jsonl", "w", encoding="utf-8") as labels:
        for i, clip in enumerate(clips):
            name = f"clip{i:05d}.npy"
            np.save(args.out / name, render([clip], args.frames)[0][0].numpy())
            labels.write(json.dumps(label(clip, name)) + "\n")


if __name__ == "__main__":
    main()
