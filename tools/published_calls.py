"""Run the published implementation on a checkpoint, in f32 and in bf16, and record what it computes.

    python tools/published_calls.py --repo PYRAMID-FLOW --checkpoint DIR --out DIR [--calls 'transformer.*' vae.decode]

For every call OUT/<call>.safetensors gets the inputs (all of them exact in bf16) and `out`, computed in f32 with TF32
off; OUT/calls.json gets the relative error of the bf16 computation to it and its median time. `tests/full_size.rs`
reads both. Calls: transformer.stage{0,1,2}.units{N} (N units of history, guidance batch of two prompts of 37 and 128
tokens), t5.ids{37,128}, clip_l.ids{20,77}, clip_g.ids{20,77}, vae.decode (two latents), vae.encode (one image), and
run.{384,768}p: whole runs of the published pipeline from embeddings to latents, with the published guidance and few
steps. All noise of a run is among its inputs, so that f32 and bf16 see the same; its settings are metadata of its file.

"bf16" is what the published pipeline does: weights, latents and timesteps in bf16, under `torch.autocast`. "f32" is the
same code and the same (bf16) weights, widened. Attention in f32 on a GPU is PyTorch's memory-efficient kernel, which
splits each f32 into three TF32 parts. So in a whole run of the first the latents are rounded to bf16 after every step
and the timesteps before every call, and in one of the second nothing is. Between the two is a third run: the published
calls in bf16, with latents and timesteps in f32 around them. Its error, too, is in OUT/calls.json.

What differs from the published code, besides what tools/published_code.py lists:

* The text encoders are classes of `transformers` loaded as the published code loads them, with `eager` attention, the
  only one there was in the version it asks for. Token ids are random, so no tokenizer is needed.
* Tiling of the VAE is off: whole frames are compared.
"""

import argparse
import fnmatch
import gc
import json
import pathlib
import statistics
import time
import typing
import zlib

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from published_code import (VIDEO_GUIDANCE, assemble, block_noise, generate, give_noise, give_text, guidance,
                            import_published, in_bands)

STAGES, FACTOR, TEXT_TOKENS = 3, 8, 128
PROMPT_TOKENS = (37, 128)
TIMESTEPS = (900, 640, 308)  # one per stage, exact in bf16
RUN_STEPS, RUN_VIDEO_STEPS = [5, 5, 5], [3, 3, 3]  # of a whole run, per stage: first unit, others
GAMMA = 1 / 3


class Published:
    """Loads components of a checkpoint in bf16, as the published pipeline does."""

    def __init__(self, repo, checkpoint):
        self.module, self.checkpoint = import_published(repo), checkpoint
        config = json.loads((checkpoint / "diffusion_transformer_768p/config.json").read_text())
        self.family = "sd3" if config["_class_name"] == "PyramidDiffusionMMDiT" else "miniflux"

    def config(self, folder):
        return json.loads((self.checkpoint / folder / "config.json").read_text())

    def t5_folder(self):
        return "text_encoder_3" if self.family == "sd3" else "text_encoder_2"

    def transformer(self):
        name = "pyramid_mmdit" if self.family == "sd3" else "pyramid_flux"
        return self.module.build_pyramid_dit(name, str(self.checkpoint / "diffusion_transformer_768p"),
                                               torch.bfloat16, use_flash_attn=False, use_mixed_training=False)

    def vae(self):
        vae = self.module.CausalVideoVAE.from_pretrained(
            str(self.checkpoint / "causal_video_vae"), torch_dtype=torch.bfloat16, interpolate=False)
        vae.disable_tiling()
        for module in vae.modules():
            if isinstance(module, torch.nn.Conv3d):
                module.forward = in_bands(module)
        return vae

    def text(self, class_name, folder):
        import transformers
        model = getattr(transformers, class_name).from_pretrained(
            str(self.checkpoint / folder), dtype=torch.bfloat16, attn_implementation="eager")
        return model.to(torch.bfloat16)

    def t5(self):
        return self.text("T5EncoderModel", self.t5_folder())

    def clip_l(self):
        return self.text("CLIPTextModelWithProjection" if self.family == "sd3" else "CLIPTextModel", "text_encoder")

    def clip_g(self):
        return self.text("CLIPTextModelWithProjection", "text_encoder_2")


# The calls: inputs (all exact in bf16), and what to do with them

class Call(typing.NamedTuple):
    make: typing.Callable  # gives the inputs when they are needed: name -> tensor
    compute: typing.Callable  # of the model and the inputs
    settings: dict = {}  # of a whole run
    around: typing.Callable = None  # of a whole run: computes it with only the calls of the transformer in bf16


def history(units, stage):
    """(frames, stage) of the history clips, oldest first."""
    clips, level, covered = [], stage, min(units, 1)
    if units:
        clips.append((1, stage))
    while covered < units:
        level = max(level - 1, 0)
        clips.append((1, level) if level else (units - covered, 0))
        covered += clips[-1][0]
    return clips[::-1]


class Inputs:
    def __init__(self, name):
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(self, *shape, std=1.0):
        return (std * torch.randn(shape, generator=self.generator)).to(torch.bfloat16).float()

    def text(self, config):
        """Mask, embeddings and pooled embeddings of two prompts, the negative one first."""
        batch = len(PROMPT_TOKENS)
        mask = (torch.arange(TEXT_TOKENS)[None] < torch.tensor(PROMPT_TOKENS)[:, None]).long()
        return {"mask": mask, "embeds": self.normal(batch, TEXT_TOKENS, config["joint_attention_dim"]),
                "pooled": self.normal(batch, config["pooled_projection_dim"])}

    def block_noise(self, *shape):
        return block_noise(shape, GAMMA, self.generator).to(torch.bfloat16).float()

    def ids(self, low, high, count):
        return torch.randint(low, high, (1, count), generator=self.generator)

    def image(self, height, width):
        coarse = torch.randn((3, 1, height // 16, width // 16), generator=self.generator)
        smooth = F.interpolate(coarse, (height, width), mode="bilinear")
        fine = 0.1 * torch.randn((3, 1, height, width), generator=self.generator)
        return (smooth + fine).tanh().to(torch.bfloat16).float()[None]


def transformer_inputs(published, name, frame, stage, units):
    config, inputs = published.config("diffusion_transformer_768p"), Inputs(name)

    def clip(frames, level):
        shrink = FACTOR * 2 ** (STAGES - 1 - level)
        return inputs.normal(1, 16, frames, frame[0] // shrink, frame[1] // shrink)

    clips = [clip(*c) for c in history(units, stage)] + [clip(1, stage)]
    return {**{f"clip{i}": c for i, c in enumerate(clips)}, **inputs.text(config),
            "timestep": torch.full((len(PROMPT_TOKENS),), float(TIMESTEPS[stage]))}


def transformer_call(dit, x):
    clips = [x[f"clip{i}"] for i in range(sum(k.startswith("clip") for k in x))]
    sample = [torch.cat([clip] * len(x["mask"])) for clip in clips]
    return dit(sample=[sample], timestep_ratio=x["timestep"], encoder_hidden_states=x["embeds"],
               encoder_attention_mask=x["mask"], pooled_projections=x["pooled"])[0]


def run_settings(family, height, width, units):
    return {"height": height, "width": width, "temp": units, "num_inference_steps": RUN_STEPS,
            "video_num_inference_steps": RUN_VIDEO_STEPS, "guidance_scale": guidance(family, f"{height}p"),
            "video_guidance_scale": VIDEO_GUIDANCE, "first_generated_unit": 0}


def run_inputs(published, name, height, width, units):
    inputs = Inputs(name)
    latent = height // FACTOR, width // FACTOR
    out = {**inputs.text(published.config("diffusion_transformer_768p")),
           "noise.initial": inputs.normal(1, 16, units, *latent)}
    for i in range((STAGES - 1) * units):
        shrink = 2 ** (STAGES - 2 - i % (STAGES - 1))
        out[f"noise.block{i:03}"] = inputs.block_noise(1, 16, 1, *(n // shrink for n in latent))
    return out


def run_call(published, dit, x, settings):
    pipeline = assemble(published.module, published.family, dit)
    give_text(pipeline, x["embeds"], x["mask"], x["pooled"])
    left = give_noise(pipeline, x["noise.initial"], [x[n] for n in sorted(x) if n.startswith("noise.block")])
    out = generate(pipeline, *(settings[n] for n in (
        "height", "width", "temp", "num_inference_steps", "video_num_inference_steps", "guidance_scale",
        "video_guidance_scale")))
    if left:
        raise RuntimeError(f"the published pipeline left {len(left)} block noises")
    return out


class InBf16:
    """A transformer in bf16 that takes and gives f32, timesteps excepted: they stay as they are."""

    def __init__(self, dit):
        self.dit, self.config = dit, dit.config

    def parameters(self):
        """The pipeline takes its device and the type of the latents from the first of them."""
        yield torch.empty(0, dtype=torch.float32, device=next(self.dit.parameters()).device)

    def __call__(self, sample, encoder_hidden_states, pooled_projections, **others):
        velocities = self.dit(
            sample=[[clip.to(torch.bfloat16) for clip in clips] for clips in sample],
            encoder_hidden_states=encoder_hidden_states.to(torch.bfloat16),
            pooled_projections=pooled_projections.to(torch.bfloat16), **others)
        return [velocity.float() for velocity in velocities]


def t5_inputs(published, name, count):
    ids = Inputs(name).ids(3, published.config(published.t5_folder())["vocab_size"], TEXT_TOKENS)
    ids[:, count - 1], ids[:, count:] = 1, 0
    return {"ids": ids, "mask": (torch.arange(TEXT_TOKENS)[None] < count).long()}


def t5_call(model, x):
    # Padding is of no consequence to anything, and what stands there differs between implementations.
    return model(x["ids"], attention_mask=x["mask"])[0][:, :int(x["mask"].sum())]


def clip_inputs(published, name, folder, count):
    last = published.config(folder)["vocab_size"] - 1
    ids = Inputs(name).ids(0, last - 1, 77)
    ids[:, 0], ids[:, count - 1:] = last - 1, last
    return {"ids": ids}


def clip_call(model, x):
    out = model(x["ids"])
    return out[0] if hasattr(model, "text_projection") else out.pooler_output


def vae_decode(vae, x):
    # The published pipeline decodes in windows, the first of two latents: the same, but it keeps frames for the next.
    return vae.decode(x["latents"]).sample


def vae_encode(vae, x):
    return vae.encode(x["video"]).latent_dist.parameters


def all_calls(published, frame, units, runs):
    """Component -> {name: Call}."""
    latent = [n // FACTOR for n in frame]
    calls = {"transformer": {}, "vae": {
        "vae.decode": Call(lambda: {"latents": Inputs("vae.decode").normal(1, 16, 2, *latent, std=2.0)}, vae_decode),
        "vae.encode": Call(lambda: {"video": Inputs("vae.encode").image(*frame)}, vae_encode)}}
    for stage in range(STAGES):
        for n in units:
            name = f"transformer.stage{stage}.units{n}"
            make = (lambda name=name, stage=stage, n=n: transformer_inputs(published, name, frame, stage, n))
            calls["transformer"][name] = Call(make, transformer_call)
    for size in runs:
        name, settings = f"run.{size[0]}p", run_settings(published.family, *size)
        make = (lambda name=name, size=size: run_inputs(published, name, *size))
        compute = (lambda dit, x, settings=settings: run_call(published, dit, x, settings))
        around = (lambda dit, x, settings=settings: run_call(published, InBf16(dit), x, settings))
        calls["transformer"][name] = Call(make, compute, settings, around)
    clips = {"clip_l": "text_encoder"}
    if published.family == "sd3":
        clips["clip_g"] = "text_encoder_2"
    for component, folder in clips.items():
        calls[component] = {}
        for n in (20, 77):
            name = f"{component}.ids{n}"
            make = (lambda name=name, folder=folder, n=n: clip_inputs(published, name, folder, n))
            calls[component][name] = Call(make, clip_call)
    calls["t5"] = {f"t5.ids{n}": Call((lambda n=n: t5_inputs(published, f"t5.ids{n}", n)), t5_call)
                   for n in PROMPT_TOKENS}
    return calls


# Measuring

def run(model, compute, inputs, device, dtype, autocast):
    """The result in f32 on the CPU, and the call itself, to be timed."""
    x = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}

    def call():
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=autocast):
            return compute(model, x)

    return call().float().cpu(), call


def in_bf16(model, call, device):
    """Result and median seconds of a call; of a whole run, timed once, also the result with f32 around its calls."""
    out, again = run(model, call.compute, call.make(), device, torch.bfloat16, True)
    seconds = time_of(again, device, least=1 if call.settings else None)
    around = run(model, call.around, call.make(), device, torch.float32, True)[0] if call.around else None
    return out, seconds, around


def time_of(call, device, limit=1.0, most=15, least=None):
    """Median seconds of a call that ran once before."""
    times, least = [], least or (3 if device == "cuda" else 1)
    while len(times) < least or (len(times) < most and sum(times) < limit):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def relative_error(a, b):
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item()


def free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attempt(what, action):
    """What `action` returns, or the first line of what it failed with: one call must not take the others along."""
    try:
        return action(), None
    except RuntimeError as error:
        message = str(error).strip().split("\n")[0][:300]
    print(f"{what}: failed: {message}", flush=True)
    free()
    return None, message


def record(published, component, calls, out, device):
    """Runs the calls of one component, first in bf16, then in f32, and returns their entries."""
    start = time.time()
    model = getattr(published, component)().to(device).eval().requires_grad_(False)
    print(f"{component}: loaded in {time.time() - start:.1f} s", flush=True)
    entries, results = [], {}
    for name, call in calls.items():
        results[name] = attempt(f"{name} in bf16", lambda: in_bf16(model, call, device))
    model = model.float()
    free()
    for name, call in calls.items():
        inputs = call.make()
        start = time.time()
        exact, failed = attempt(
            f"{name} in f32", lambda: run(model, call.compute, inputs, device, torch.float32, False)[0])
        found, failed_too = results.pop(name)
        entry = {"name": name, "component": component}
        if exact is None or found is None:
            entries.append({**entry, "failed": failed or failed_too})
            continue
        rounded, seconds, around = found
        metadata = {key: json.dumps(value) for key, value in call.settings.items()}
        save_file({**inputs, "out": exact.contiguous()}, out / f"{name}.safetensors", metadata)
        entry.update(bf16_error=relative_error(rounded, exact), bf16_seconds=seconds,
                     rms=exact.double().square().mean().sqrt().item())
        if call.settings:
            entry["bf16_unit_errors"] = [relative_error(*pair) for pair in zip(rounded.unbind(2), exact.unbind(2))]
            entry["bf16_calls_error"] = relative_error(around, exact)
            print(f"{name}: error {entry['bf16_calls_error']:.3e} with f32 around the calls in bf16")
        print(f"{name}: bf16 error {entry['bf16_error']:.3e}, {seconds:.4f} s; rms {entry['rms']:.3f}; "
              f"f32 and saving {time.time() - start:.1f} s", flush=True)
        entries.append(entry)
    if device == "cuda":
        print(f"{component}: peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
        torch.cuda.reset_peak_memory_stats()
    return entries


def versions():
    import diffusers
    import transformers
    return {"torch": torch.__version__, "transformers": transformers.__version__, "diffusers": diffusers.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", type=pathlib.Path, required=True, help="a checkout of the published code")
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--calls", nargs="+", default=["*"], help="names or patterns of names")
    parser.add_argument("--frame", default="768x1280", help="height and width of the video, in pixels")
    parser.add_argument("--units", default="0,1,3,15", help="units of history of the transformer calls")
    parser.add_argument("--runs", nargs="*", default=["384x640x4", "768x1280x2"],
                        help="height and width, in pixels, and units of the whole runs")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    frame = [int(n) for n in options.frame.split("x")]
    units = [int(n) for n in options.units.split(",")]
    runs = [[int(n) for n in size.split("x")] for size in options.runs]
    options.out.mkdir(parents=True, exist_ok=True)
    published = Published(options.repo.resolve(), options.checkpoint.resolve())
    report = {"family": published.family, "checkpoint": str(published.checkpoint), "frame": frame, **versions(),
              "implementation": "jy0205/Pyramid-Flow; text encoders of transformers", "calls": []}
    start = time.time()
    for component, calls in all_calls(published, frame, units, runs).items():
        calls = {n: c for n, c in calls.items() if any(fnmatch.fnmatch(n, p) for p in options.calls)}
        if calls:
            report["calls"] += record(published, component, calls, options.out, device)
            (options.out / "calls.json").write_text(json.dumps(report, indent=1) + "\n")
            free()
    print(f"{len(report['calls'])} calls in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
