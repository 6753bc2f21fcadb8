"""Compare this implementation with recorded tensors of the published one.

    python tools/reference/check_goldens.py [DIR]      (default: tests/goldens)

Prints one line per comparison; exits with 1 when a bound is exceeded.
"""

import json
import pathlib
import re
import sys

import torch
from safetensors import safe_open
from safetensors.torch import load_file

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from reference.checkpoint import load_into, read_config  # noqa: E402
from reference.pipeline import Noise, Pipeline  # noqa: E402
from reference.schedule import Schedule  # noqa: E402
from reference.vae import Vae  # noqa: E402

SINGLE, RUN = 1e-5, 2e-5


class Report:
    def __init__(self):
        self.failed = self.done = 0

    def close(self, name, ours, golden, bound):
        error = ((ours.double() - golden.double()).norm() / golden.double().norm()).item()
        self.line(name, error < bound and ours.shape == golden.shape, f"relative error {error:.1e} (bound {bound:.0e})")

    def frames(self, name, ours, golden):
        gap = (ours.int() - golden.int()).abs()
        share = (gap > 0).float().mean().item()
        self.line(name, gap.max() <= 1 and share <= 1e-3, f"largest difference {gap.max()}, {share:.4%} of values")

    def line(self, name, good, text):
        self.done += 1
        self.failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {name}: {text}", flush=True)


def metadata(path):
    with safe_open(path, "pt") as file:
        raw = file.metadata() or {}
    plain = ("prompt", "prompt_suffix", "negative", "negative_prompt", "checkpoint", "variant")
    return {k: v if k in plain else json.loads(v) for k, v in raw.items()}


def check_schedule(root, report):
    golden = json.loads((root / "scheduler.json").read_text())
    schedule = Schedule()
    ours = torch.tensor([schedule.start, schedule.end])
    theirs = torch.tensor([[golden[k][str(i)] if isinstance(golden[k], dict) else golden[k][i] for i in range(3)]
                           for k in ("start_sigmas", "end_sigmas")])
    report.close("schedule", ours, theirs, 1e-6)


def check_vae(root, report):
    path = root / "vae.safetensors"
    meta, golden = metadata(path), load_file(path)
    folder = root / meta["checkpoint"] / "causal_video_vae"
    vae = load_into(Vae(read_config(folder)), folder)
    tile = meta["tile_sample_min_size"]
    encode, decode = meta["encode_windows"], meta["decode_windows"]
    cases = {
        "image.moments": lambda: vae.moments(golden["image"]),
        "image.moments_tiled": lambda: vae.moments_tiled(golden["image"], tile),
        "video.moments": lambda: vae.moments(golden["video"]),
        "video.moments (streamed)": lambda: vae.moments(golden["video"], encode),
        "z.decoded": lambda: vae.decode(golden["z"]),
        "z.decoded (streamed)": lambda: vae.decode(golden["z"], decode),
        "z.decoded_tiled": lambda: vae.decode_tiled(golden["z"], tile, decode),
        "z_first.decoded": lambda: vae.decode(golden["z_first"]),
    }
    for name, run in cases.items():
        report.close(f"vae {name}", run(), golden[name.split(" ")[0]], SINGLE)


def check_tokens(root, family, pipeline, report):
    """Our tokenizers are for plain text only, so only prompts of letters and simple punctuation are compared."""
    entries = [e for e in json.loads((root / "tokens.json").read_text()) if re.fullmatch(r"[A-Za-z0-9 ,.]*", e["prompt"])]
    good = 0
    for entry in entries:
        t5 = entry.get("t5_flux", entry["t5"]) if family == "flux" else entry["t5"]
        clip = [entry["clip_l"]] if family == "flux" else [entry["clip_l"], entry["clip_g"]]
        good += pipeline.tokens(entry["prompt"]) == (clip, t5)
    report.line(f"{family} tokens", 0 < good == len(entries), f"{good} of {len(entries)} prompts")


def check_family(root, family, report):
    folder = root / family
    variant = metadata(folder / "transformer.safetensors")["variant"]
    pipeline = Pipeline(folder, variant)
    if (root / "tokens.json").exists():
        check_tokens(root, family, pipeline, report)
    meta, golden = metadata(folder / "text.safetensors"), load_file(folder / "text.safetensors")
    for name, prompt in {"prompt": meta["prompt"], "negative": meta["negative"], "empty": ""}.items():
        embeds, mask, pooled = pipeline.encode_text(prompt)
        report.line(f"{family} text {name}.mask", torch.equal(mask, golden[f"{name}.mask"]), "equal or not")
        keep = mask[0].bool()
        report.close(f"{family} text {name}.embeds", embeds[:, keep], golden[f"{name}.embeds"][:, keep], SINGLE)
        report.close(f"{family} text {name}.pooled", pooled, golden[f"{name}.pooled"], SINGLE)
    golden = load_file(folder / "transformer.safetensors")
    for case in ("first_low", "low", "mid", "full"):
        clips = [golden[f"{case}.clip{i}"] for i in range(9) if f"{case}.clip{i}" in golden]
        out = pipeline.transformer(clips, golden[f"{case}.timestep"], golden["prompt_embeds"], golden["prompt_mask"],
                                   golden["pooled"])
        report.close(f"{family} transformer {case}", out, golden[f"{case}.out"], SINGLE)
    for run in ("t2v", "i2v", "t2i", "t2v_no_guidance", "t2v_linear_guidance"):
        if (folder / f"{run}.safetensors").exists():
            check_run(pipeline, folder / f"{run}.safetensors", f"{family} {run}", report)


def check_run(pipeline, path, name, report):
    meta, golden = metadata(path), load_file(path)
    noise = Noise(replay={k[6:]: v for k, v in golden.items() if k.startswith("noise.")})
    linear = (meta["alpha"], meta["min_guidance_scale"]) if meta.get("use_linear_guidance") else None
    latents, record = pipeline.generate(
        meta["prompt"] + meta["prompt_suffix"], meta["negative_prompt"], meta["temp"], meta["height"], meta["width"],
        meta["num_inference_steps"], meta.get("video_num_inference_steps", meta["num_inference_steps"]),
        meta["guidance_scale"], meta["video_guidance_scale"], noise, golden.get("image_u8"), linear)
    for key, value in record.items():
        if key in golden:
            report.close(f"{name} {key}", value, golden[key], RUN)
    report.close(f"{name} latents", latents, golden["latents"], RUN)
    if "frames" in golden:
        frames = pipeline.decode(latents, meta["tiling"])[:: meta["frame_stride"]]
        report.frames(f"{name} frames", frames[: len(golden["frames"])], golden["frames"])


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "tests/goldens")
    report = Report()
    with torch.no_grad():
        if (root / "scheduler.json").exists():
            check_schedule(root, report)
        if (root / "vae.safetensors").exists():
            check_vae(root, report)
        for family in ("sd3", "flux"):
            if (root / family / "transformer.safetensors").exists():
                check_family(root, family, report)
    print(f"{report.done - report.failed} of {report.done} comparisons hold")
    sys.exit(1 if report.failed or not report.done else 0)


if __name__ == "__main__":
    main()
