"""Run the published implementation on a checkpoint, in f32 and in bf16, and record what it computes.

    python tools/published_calls.py --repo PYRAMID-FLOW --checkpoint DIR --out DIR [--calls 'transformer.*' vae.decode]

For every call OUT/<call>.safetensors gets the inputs (all of them exact in bf16) and `out`, computed in f32 with TF32
off; OUT/calls.json gets the relative error of the bf16 computation to it and its median time. `tests/full_size.rs`
reads both. Calls: transformer.stage{0,1,2}.units{N} (N units of history, guidance batch of two prompts of 37 and 128
tokens), t5.ids{37,128}, clip_l.ids{20,77}, clip_g.ids{20,77}, vae.decode (two latents), vae.encode (one image).

"bf16" is what the published pipeline does: weights, latents and timesteps in bf16, under `torch.autocast`. "f32" is the
same code and the same (bf16) weights, widened. Attention in f32 on a GPU is PyTorch's memory-efficient kernel, which
splits each f32 into three TF32 parts.

The published code is imported from a checkout (github.com/jy0205/Pyramid-Flow), unchanged but for this:

* IPython and tensorboardX, which are imported and not used here, are replaced by empty modules where they are missing;
  timm.models.layers and timm.models.hub are led to where later versions of timm keep them.
* The text encoders are classes of `transformers` loaded as the published code loads them, with `eager` attention, the
  only one there was in the version it asks for. Token ids are random, so no tokenizer is needed.
* Tiling of the VAE is off: whole frames are compared. A convolution whose input or output has more values than a
  32-bit index counts, which cuDNN may refuse, is computed in bands of rows: the same products and sums.
"""

import argparse
import fnmatch
import gc
import importlib
import importlib.machinery
import json
import math
import pathlib
import statistics
import sys
import time
import types
import zlib

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

STAGES, FACTOR, TEXT_TOKENS = 3, 8, 128
PROMPT_TOKENS = (37, 128)
TIMESTEPS = (900, 640, 308)  # one per stage, exact in bf16
LARGEST, BAND = (1 << 31) - 1, 1 << 30  # values a convolution takes or gives at once; in each of the bands otherwise


# The published code

def import_published(repo):
    def stand_in(name, **members):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(members)
        sys.modules[name] = module

    def missing(name):
        try:
            importlib.import_module(name)
        except ImportError:
            return True
        return False

    if missing("IPython"):
        stand_in("IPython", embed=None)
    if missing("tensorboardX"):
        stand_in("tensorboardX", SummaryWriter=None)
    for old, new in {"timm.models.layers": "timm.layers", "timm.models.hub": "timm.models"}.items():
        if missing(old):
            sys.modules[old] = importlib.import_module(new)
    sys.path.insert(0, str(repo))
    return importlib.import_module("pyramid_dit.pyramid_dit_for_video_gen_pipeline")


def in_bands(conv):
    """A forward for a Conv3d without padding that computes large convolutions in bands of rows."""
    kernel, stride = conv.kernel_size[1], conv.stride[1]

    def forward(x):
        rows = (x.shape[3] - kernel) // stride + 1
        output = conv.out_channels * x.shape[2] * rows * (x.shape[4] // conv.stride[2])
        largest = max(x.numel(), output)
        if largest <= LARGEST:
            return F.conv3d(x, conv.weight, conv.bias, conv.stride)
        band = math.ceil(rows / math.ceil(largest / BAND))
        parts = [F.conv3d(x[:, :, :, a * stride:(min(a + band, rows) - 1) * stride + kernel], conv.weight, conv.bias,
                          conv.stride) for a in range(0, rows, band)]
        return torch.cat(parts, 3)

    return forward


class Published:
    """Loads components of a checkpoint in bf16, as the published pipeline does."""

    def __init__(self, repo, checkpoint):
        self.pipeline, self.checkpoint = import_published(repo), checkpoint
        config = json.loads((checkpoint / "diffusion_transformer_768p/config.json").read_text())
        self.family = "sd3" if config["_class_name"] == "PyramidDiffusionMMDiT" else "miniflux"

    def config(self, folder):
        return json.loads((self.checkpoint / folder / "config.json").read_text())

    def t5_folder(self):
        return "text_encoder_3" if self.family == "sd3" else "text_encoder_2"

    def transformer(self):
        name = "pyramid_mmdit" if self.family == "sd3" else "pyramid_flux"
        return self.pipeline.build_pyramid_dit(name, str(self.checkpoint / "diffusion_transformer_768p"),
                                               torch.bfloat16, use_flash_attn=False, use_mixed_training=False)

    def vae(self):
        vae = self.pipeline.CausalVideoVAE.from_pretrained(
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
    batch = len(PROMPT_TOKENS)
    mask = (torch.arange(TEXT_TOKENS)[None] < torch.tensor(PROMPT_TOKENS)[:, None]).long()
    return {**{f"clip{i}": c for i, c in enumerate(clips)}, "mask": mask,
            "timestep": torch.full((batch,), float(TIMESTEPS[stage])),
            "embeds": inputs.normal(batch, TEXT_TOKENS, config["joint_attention_dim"]),
            "pooled": inputs.normal(batch, config["pooled_projection_dim"])}


def transformer_call(dit, x):
    clips = [x[f"clip{i}"] for i in range(sum(k.startswith("clip") for k in x))]
    sample = [torch.cat([clip] * len(x["mask"])) for clip in clips]
    return dit(sample=[sample], timestep_ratio=x["timestep"], encoder_hidden_states=x["embeds"],
               encoder_attention_mask=x["mask"], pooled_projections=x["pooled"])[0]


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


def all_calls(published, frame, units):
    """Component -> {name: (inputs, call)}; inputs are made when they are needed."""
    latent = [n // FACTOR for n in frame]
    calls = {"transformer": {}, "vae": {
        "vae.decode": (lambda: {"latents": Inputs("vae.decode").normal(1, 16, 2, *latent, std=2.0)}, vae_decode),
        "vae.encode": (lambda: {"video": Inputs("vae.encode").image(*frame)}, vae_encode)}}
    for stage in range(STAGES):
        for n in units:
            name = f"transformer.stage{stage}.units{n}"
            make = (lambda name=name, stage=stage, n=n: transformer_inputs(published, name, frame, stage, n))
            calls["transformer"][name] = (make, transformer_call)
    clips = {"clip_l": "text_encoder"}
    if published.family == "sd3":
        clips["clip_g"] = "text_encoder_2"
    for component, folder in clips.items():
        calls[component] = {}
        for n in (20, 77):
            name = f"{component}.ids{n}"
            make = (lambda name=name, folder=folder, n=n: clip_inputs(published, name, folder, n))
            calls[component][name] = (make, clip_call)
    calls["t5"] = {f"t5.ids{n}": ((lambda n=n: t5_inputs(published, f"t5.ids{n}", n)), t5_call) for n in PROMPT_TOKENS}
    return calls


# Measuring

def run(model, call, inputs, device, dtype):
    """The result in f32 on the CPU, and the median seconds of a call."""
    x = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = call(model, x)
        seconds = time_of(lambda: call(model, x), device) if dtype == torch.bfloat16 else None
    return out.float().cpu(), seconds


def time_of(call, device, limit=1.0, most=15):
    """Median seconds of a call that ran once before."""
    times, least = [], 3 if device == "cuda" else 1
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
    return (None, None), message


def record(published, component, calls, out, device):
    """Runs the calls of one component, first in bf16, then in f32, and returns their entries."""
    start = time.time()
    model = getattr(published, component)().to(device).eval().requires_grad_(False)
    print(f"{component}: loaded in {time.time() - start:.1f} s", flush=True)
    entries, results = [], {}
    for name, (make, call) in calls.items():
        results[name] = attempt(f"{name} in bf16", lambda: run(model, call, make(), device, torch.bfloat16))
    model = model.float()
    free()
    for name, (make, call) in calls.items():
        inputs = make()
        start = time.time()
        (exact, _), failed = attempt(f"{name} in f32", lambda: run(model, call, inputs, device, torch.float32))
        (rounded, seconds), failed_too = results.pop(name)
        entry = {"name": name, "component": component}
        if exact is None or rounded is None:
            entries.append({**entry, "failed": failed or failed_too})
            continue
        save_file({**inputs, "out": exact.contiguous()}, out / f"{name}.safetensors")
        entry.update(bf16_error=relative_error(rounded, exact), bf16_seconds=seconds,
                     rms=exact.double().square().mean().sqrt().item())
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
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    frame = [int(n) for n in options.frame.split("x")]
    units = [int(n) for n in options.units.split(",")]
    options.out.mkdir(parents=True, exist_ok=True)
    published = Published(options.repo.resolve(), options.checkpoint.resolve())
    report = {"family": published.family, "checkpoint": str(published.checkpoint), "frame": frame, **versions(),
              "implementation": "jy0205/Pyramid-Flow; text encoders of transformers", "calls": []}
    start = time.time()
    for component, calls in all_calls(published, frame, units).items():
        calls = {n: c for n, c in calls.items() if any(fnmatch.fnmatch(n, p) for p in options.calls)}
        if calls:
            report["calls"] += record(published, component, calls, options.out, device)
            (options.out / "calls.json").write_text(json.dumps(report, indent=1) + "\n")
            free()
    print(f"{len(report['calls'])} calls in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
