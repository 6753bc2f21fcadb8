#!/usr/bin/env python3
"""Times on PyTorch what `pyraflow bench` times, in bf16, with random weights of the published size.

    python tools/bench_reference.py sd3 --repo PYRAMID-FLOW --out reference-sd3.json
    python tools/bench_reference.py miniflux --out reference-miniflux.json        # tools/reference instead
    ... --sizes 768p 384p --seconds 5 --modes eager tuned --whole eager --limit 540

`eager` is the published code from a checkout (github.com/jy0205/Pyramid-Flow) as it is, but for what
tools/published_*.py list; without `--repo` it is tools/reference. `tuned` is
tools/reference/tuned.py: the same weights with what PyTorch offers to make them fast (attention without masked pairs,
torch.compile, CUDA graphs, channels-last convolutions); its results are compared with those of `eager`.

No checkpoint is read: weights are drawn on the device as tools/random_checkpoint.py draws them (of one seed, so both
modes have the same). Time does not depend on the values; text has the lengths that `pyraflow bench` takes.

Cases: the text encoders (prompt of 128 and 77 tokens), one transformer call per stage with N units of history
(both guidance halves), VAE encode and decode (full frames, and the published tilings), and whole clips: text,
sampling and decoding apart, with the peak of device memory. A clip's sampling is run as a whole (`--whole MODE`), or it
is the sum of every distinct call (median) times its steps, plus for `eager` what the published driver takes besides
its calls, measured on the first two units; `method` says which. Calls run once before they are timed; medians. A case that fails is
recorded with what it failed with, one that would start after `--limit` seconds as skipped. The file is written after
every case. The names of its fields are those of `pyraflow bench --json` where they mean the same.
"""

import argparse
import itertools
import json
import pathlib
import sys
import time

import torch
import torch._dynamo

import published_pipeline
from published_calls import Inputs, free, history, relative_error, time_of
from published_code import VIDEO_GUIDANCE, block_noise, guidance
from published_pipeline import TEXT_TOKENS, Driver, Published, own_module, text_inputs
from reference.pipeline import double, halve
from reference.pipeline import history as seen
from reference.schedule import GAMMA, STAGES, Schedule
from reference.tuned import KINDS, Call, Tuned, tune_vae

SIZES = {"768p": (768, 1280), "384p": (384, 640), "tiny": (64, 128)}
STEPS, VIDEO_STEPS = [20, 20, 20], [10, 10, 10]
TIMESTEPS = (900.0, 640.0, 308.0)


class Bench:
    """What all cases share: options, the report, and eager results that tuned ones are compared with."""

    def __init__(self, options):
        self.options, self.family, self.device = options, options.family, options.device
        self.gpu, self.start = options.device == "cuda", time.monotonic()
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        self.scale = "tiny" if "tiny" in options.sizes else "full"
        self.published = None
        if options.repo:
            self.published = Published(options.repo.resolve(), self.family, self.scale, self.device, self.dtype)
        self.config = published_pipeline.configs(self.family, self.scale)["transformer"][0]
        self.eager_results, self.medians = {}, {}
        self.report = {**published_pipeline.header(options), "cases": []}

    def save(self):
        self.report["clips"] = clips(self)
        self.options.out.write_text(json.dumps(self.report, indent=1) + "\n")

    def late(self):
        return time.monotonic() - self.start > self.options.limit

    def case(self, mode, name, action, **fields):
        """Runs `action`, which returns more fields, and records them or why there are none."""
        entry, result = {"name": name, "mode": mode, "implementation": self.implementation(mode), **fields}, None
        if self.late():
            entry["skipped"] = f"{self.options.limit} s were over"
        else:
            began = time.monotonic()
            try:
                self.reset_peak()
                with torch.no_grad(), torch.autocast(self.device, self.dtype, self.gpu, cache_enabled=False):
                    result = action()
                entry.update(result)
            except Exception as error:  # whatever it is, the other cases go on
                text = str(error).strip().split("\n")
                entry["failed"] = f"{type(error).__name__}: {text[0]}"[:400]
            entry["took"] = round(time.monotonic() - began, 2)
        self.report["cases"].append(entry)
        self.save()
        free()
        words = {k: v for k, v in entry.items() if k in ("seconds", "error_to_eager", "failed", "skipped", "took", "method")}
        print(f"{time.monotonic() - self.start:6.1f} s  {mode} {fields.get('variant', '')} {name}: {words}", flush=True)
        return result

    def implementation(self, mode):
        return "published" if mode == "eager" and self.published else f"tools/reference{', tuned' * (mode == 'tuned')}"

    def timed(self, call):
        """Median seconds of a call and the peak of device memory since it was reset. It runs once before."""
        call()
        self.sync()
        seconds = time_of(call, self.device, self.options.time_each)
        return {"seconds": seconds, **self.peak()}

    def once(self, call):
        """(result, wall-clock seconds and the peak of device memory)."""
        self.sync()
        began = time.perf_counter()
        result = call()
        self.sync()
        return result, {"seconds": time.perf_counter() - began, **self.peak()}

    def compare(self, name, mode, out):
        """Keeps an eager result; the error of a tuned one to it."""
        out = out.detach().float().cpu()
        if mode == "eager":
            self.eager_results[name] = out
            return {}
        return {"error_to_eager": relative_error(out, self.eager_results[name])} if name in self.eager_results else {}

    def sync(self):
        if self.gpu:
            torch.cuda.synchronize()

    def reset_peak(self):
        if self.gpu:
            free()
            torch.cuda.reset_peak_memory_stats()

    def peak(self):
        if not self.gpu:
            return {"memory": None}
        return {"memory": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}

    def build(self, mode, component):
        if mode == "eager" and self.published:
            return self.published.build(component)
        return own_module(self.family, component, self.scale, self.device, self.dtype)

    def captured(self, call):
        """The call as a CUDA graph, and where there is no GPU the call itself."""
        if not self.gpu:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()

        def replay():
            graph.replay()
            return out

        return replay


# Text

def text_encoders(bench):
    return ["t5", "clip_l"] + (["clip_g"] if bench.family == "sd3" else [])


def text(bench, mode):
    for name in text_encoders(bench):
        def action(name=name):
            model, inputs = bench.build(mode, name), Inputs(name)
            if name == "t5":
                mask = torch.ones(1, TEXT_TOKENS, dtype=torch.long, device=bench.device)
                ids = inputs.ids(3, 600, TEXT_TOKENS).to(bench.device)
                ids[:, -1] = 1
                plain = (lambda: model(ids, attention_mask=mask)[0]) if mode == "eager" and bench.published else \
                    (lambda: model(ids, mask))
            else:
                ids = inputs.ids(0, 500, 77).to(bench.device)
                ids[:, -1] = ids.max() + 1
                plain = (lambda: pooled_of(model(ids))) if mode == "eager" and bench.published else (lambda: model(ids))
            call = bench.captured(plain) if mode == "tuned" else plain
            measured = {**bench.timed(call), **bench.compare(name, mode, call())}
            bench.medians[mode, name] = measured
            return measured

        bench.case(mode, f"{name}.ids{128 if name == 't5' else 77}", action, component="text")


def pooled_of(out):
    return out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output


def text_phase(bench, mode):
    """Prompt and negative prompt, one after the other."""
    parts = [bench.medians.get((mode, name)) for name in text_encoders(bench)]
    if None in parts:
        return []
    memory = max((p["memory"] or 0 for p in parts), default=0)
    return [{"name": "text", "seconds": 2 * sum(p["seconds"] for p in parts), "memory": memory or None}]


# The transformer

class Eager:
    """The transformer as it is; `prepare` gives a call for one stage of one unit."""

    def __init__(self, bench, model):
        self.model, self.published = model, bench.published is not None
        self.embeds, self.mask, self.pooled = text_inputs(bench.config, bench.device, bench.dtype)

    def prepare(self, clips):
        past = clips[:-1]
        if not self.published:
            return lambda x, t: self.model([c.expand(2, -1, -1, -1, -1) for c in past + [x]], t.expand(2), self.embeds,
                                           self.mask, self.pooled)
        twice = [torch.cat([c] * 2) for c in past]
        return lambda x, t: self.model(
            sample=[twice + [torch.cat([x] * 2)]], timestep_ratio=t.expand(2).to(x.dtype),
            encoder_hidden_states=self.embeds, encoder_attention_mask=self.mask, pooled_projections=self.pooled)[0]


class Fast:
    """The tuned transformer. A way is a kind of attention, and whether the call is captured as a CUDA graph."""

    def __init__(self, bench, model):
        self.tuned = Tuned(model, bench.options.compile)
        self.text = text_inputs(bench.config, bench.device, bench.dtype)
        self.all_ways = list(itertools.product(KINDS, (True, False) if bench.gpu else (False,)))
        self.chosen = {}  # (latent height of the video, stage) -> way

    def way(self, stage):
        return self.chosen.get((self.height, stage), self.all_ways[0])

    def prepare(self, clips, way=None):
        stage = next((s for s in range(STAGES) if clips[-1].shape[3] << (STAGES - 1 - s) == self.height), 0)
        kind, graph = way or self.way(stage)
        call = Call(self.tuned, clips, *self.text, kind)
        return call.capture(clips[-1], torch.tensor(TIMESTEPS[stage], device=clips[-1].device)) if graph else call


def clips_of(bench, size, stage, units):
    height, width = SIZES[size]
    inputs = Inputs(f"{size}.stage{stage}.units{units}")

    def clip(frames, level):
        shrink = 8 << (STAGES - 1 - level)
        return inputs.normal(1, 16, frames, height // shrink, width // shrink).to(bench.device, bench.dtype)

    return [clip(*c) for c in history(units, stage)] + [clip(1, stage)]


def single_calls(bench, mode, runner, size):
    height, width = SIZES[size]
    fields = {"component": "transformer", "variant": size, "height": height, "width": width}
    runner.height = height // 8
    # The longest history first: it says which way a stage goes.
    for units, stage in itertools.product(sorted(bench.options.units, reverse=True), range(STAGES)):
        name, costs = f"transformer.stage{stage}.units{units}", {}
        ways = [None] if mode == "eager" else runner.all_ways if units == max(bench.options.units) else [runner.way(stage)]
        for way in ways:
            def action():
                clips = clips_of(bench, size, stage, units)
                timestep = torch.tensor(TIMESTEPS[stage], device=bench.device)
                prepare = (lambda: runner.prepare(clips, way)) if way else (lambda: runner.prepare(clips))
                prepare()(clips[-1], timestep)  # compiles
                call, made = bench.once(prepare)
                measured = bench.timed(lambda: call(clips[-1], timestep))
                return {**measured, "preparing_seconds": made["seconds"],
                        **bench.compare((name, size), mode, call(clips[-1], timestep))}

            more = {"attention": way[0], "graph": way[1]} if way else {}
            if result := bench.case(mode, name, action, **fields, **more):
                costs[way] = result["seconds"] * VIDEO_STEPS[stage] + result["preparing_seconds"]
        if len(ways) > 1 and costs:
            runner.chosen[runner.height, stage] = min(costs, key=costs.get)


def sample(bench, runner, size, units):
    """Latents of a clip, by a driver of our own around `runner`."""
    height, width = (n // 8 for n in SIZES[size])
    schedule, dtype, device = Schedule(), bench.dtype, bench.device
    generator = torch.Generator(device).manual_seed(1)
    noise = torch.randn(1, 16, units, height, width, generator=generator, device=device)
    small, done = halve(halve(noise) * 2) * 2, torch.zeros(1, 16, 0, height, width, device=device, dtype=dtype)
    for unit in range(units):
        x = small[:, :, unit:unit + 1].to(dtype)
        strength = guidance(bench.family, size) if unit == 0 else VIDEO_GUIDANCE
        for stage in range(STAGES):
            if stage:
                alpha, beta = schedule.renoise(stage)
                x = double(x)
                x = alpha * x + beta * block_noise(x.shape, GAMMA, generator, device).to(dtype)
            call = runner.prepare(seen(done, stage) + [x])
            timesteps, sigmas = schedule.steps(stage, (VIDEO_STEPS if unit else STEPS)[stage])
            for k, timestep in enumerate(timesteps):
                v = call(x, torch.tensor(float(timestep), device=device))
                x = x + float(sigmas[k + 1] - sigmas[k]) * (v[:1] + strength * (v[1:] - v[:1]))
        done = torch.cat([done, x], 2)
    return done


def from_calls(bench, runner, size, units, driver):
    """Seconds of sampling from every distinct call."""
    total, first_two, preparing = 0.0, 0.0, 0.0
    for unit in range(units):
        for stage in range(STAGES):
            if bench.late():
                raise TimeoutError(f"{bench.options.limit} s were over at unit {unit}")
            clips = clips_of(bench, size, stage, unit)
            timestep = torch.tensor(TIMESTEPS[stage], device=bench.device)
            call, made = bench.once(lambda: runner.prepare(clips))
            measured = bench.timed(lambda: call(clips[-1], timestep))
            part = measured["seconds"] * (VIDEO_STEPS if unit else STEPS)[stage]
            total += part
            preparing += made["seconds"] if driver is None else 0.0
            first_two += part if unit < 2 else 0.0
            del call, clips
    result = {"method": "calls", "preparing_seconds": preparing}
    if driver is None and isinstance(runner, Fast):
        result["ways"] = [dict(zip(("attention", "graph"), runner.way(stage))) for stage in range(STAGES)]
    if driver is not None:
        _, measured = bench.once(lambda: whole(bench, driver, size, 2))
        result["overhead_per_unit"] = max(measured["seconds"] - first_two, 0.0) / 2
        preparing = result["overhead_per_unit"] * units
    return {**result, "seconds": total + preparing, **bench.peak()}


def whole(bench, driver, size, units):
    return driver.generate(*SIZES[size], units, STEPS, VIDEO_STEPS, guidance(bench.family, size), VIDEO_GUIDANCE)


def sampling(bench, mode, runner, size, seconds, as_whole):
    """Records the sampling of a clip, run as a whole or from its calls."""
    units, driver = units_of(bench, seconds), None
    height, width = SIZES[size]
    fields = {"component": "clip", "variant": size, "height": height, "width": width, "units": units}
    if mode == "eager" and bench.published:
        driver = Driver(bench.published, transformer=runner.model)
    runner.height = height // 8

    def run():
        if not as_whole:
            return from_calls(bench, runner, size, units, driver)
        clip = (lambda: whole(bench, driver, size, units)) if driver else (lambda: sample(bench, runner, size, units))
        latents, measured = bench.once(clip)
        return {"method": "whole", **measured, "finite": bool(latents.isfinite().all())}

    if result := bench.case(mode, "sampling", run, **fields):
        bench.medians[mode, "sampling", size, seconds] = result
    if driver and seconds == bench.options.seconds[0]:
        bench.case(mode, "block noise of one unit, the published loop",
                   lambda: {"seconds": driver.loop_seconds(*SIZES[size])}, **fields)


def units_of(bench, seconds):
    """Latent frames of a clip: 24 frames a second, 8 to a latent, and the first frame."""
    return 2 if bench.scale == "tiny" else round(seconds * 3) + 1


def transformer(bench, mode):
    built = []
    bench.case(mode, "build the transformer", lambda: built.append(bench.build(mode, "transformer")) or {})
    if not built:
        return
    runner = (Eager if mode == "eager" else Fast)(bench, built[0])
    at_once = mode == "eager" and mode in bench.options.whole
    lengths = bench.options.seconds if "clips" in bench.options.cases else []
    for size in bench.options.sizes:
        if "calls" in bench.options.cases:
            single_calls(bench, mode, runner, size)
        for seconds in lengths:
            sampling(bench, mode, runner, size, seconds, at_once)
    # The calls of the tuned one are what brings compiled kernels and plans before the whole run, which replaces their sum.
    if mode == "tuned" and mode in bench.options.whole:
        for size, seconds in itertools.product(bench.options.sizes, lengths):
            sampling(bench, mode, runner, size, seconds, True)


# The VAE

def vae(bench, mode):
    built = []
    bench.case(mode, "build the VAE", lambda: built.append(bench.build(mode, "vae")) or {})
    if not built:
        return
    model = tune_vae(built[0], bench.options.compile) if mode == "tuned" else built[0]
    published = mode == "eager" and bench.published is not None
    for size in bench.options.sizes:
        height, width = SIZES[size]
        fields = {"component": "vae", "variant": size, "height": height, "width": width}
        image = Inputs("vae.encode").image(height, width).to(bench.device, bench.dtype)
        latents = Inputs("vae.decode").normal(1, 16, 2, height // 8, width // 8).to(bench.device, bench.dtype)

        def encode():
            return model.encode(image).latent_dist.parameters if published else model.moments(image)

        def decode_two():
            if published:
                return model.decode(latents, temporal_chunk=True, window_size=1).sample
            return model.decode(latents, windows(mode))

        for name, call in (("vae.encode", encode), ("vae.decode", decode_two)):
            bench.case(mode, name, lambda: {**bench.timed(call), **bench.compare((name, size), mode, call())}, **fields)
        for seconds in bench.options.seconds if "clips" in bench.options.cases else []:
            decode_clip(bench, mode, model, size, seconds, fields)


def windows(mode):
    return (1, 1) if mode == "tuned" else (2, 1)


def decode_clip(bench, mode, model, size, seconds, fields):
    """A clip's latents to frames in the memory of the host, in full frames and in the published tilings."""
    units, height, width = units_of(bench, seconds), *SIZES[size]
    latents = Inputs("clip").normal(1, 16, units, height // 8, width // 8).to(bench.device, bench.dtype)
    published = mode == "eager" and bench.published is not None
    ways = {"full frames": None}
    if published:
        ways.update({"tiles of 256": True, "tiles of 512": False})

    def run(z, save_memory):
        if not published:
            return (model.decode(z, windows(mode)).mul(127.5).add(127.5).clamp(0, 255).byte()).cpu()
        model.enable_tiling(save_memory is not None)
        return Driver(bench.published, vae=model).decode(z, save_memory is not False)

    for way, save_memory in ways.items():
        def action():
            run(latents[:, :, :3], save_memory)
            return {"method": "whole", **bench.once(lambda: run(latents, save_memory))[1]}

        result = bench.case(mode, f"decoding, {way}", action, **{**fields, "component": "clip"}, units=units)
        if result:
            bench.medians[mode, "decoding", size, seconds, way] = result
    if published:
        model.disable_tiling()


# Clips, put together from their phases

def clips(bench):
    """An entry for every clip of which sampling or decoding is known."""
    entries = []
    for mode, size, seconds in itertools.product(*(getattr(bench.options, n) for n in ("modes", "sizes", "seconds"))):
        decoded = {k[-1]: v for k, v in bench.medians.items() if k[:4] == (mode, "decoding", size, seconds)}
        phases = [("sampling", bench.medians.get((mode, "sampling", size, seconds))),
                  ("decoding", decoded.pop("full frames", None))]
        phases = [{"name": name, **phase} for name, phase in phases if phase]
        if phases:
            height, width = SIZES[size]
            entries.append({
                "mode": mode, "implementation": bench.implementation(mode), "family": bench.family, "variant": size,
                "width": width, "height": height, "units": units_of(bench, seconds), "steps": STEPS,
                "video_steps": VIDEO_STEPS, "guidance": guidance(bench.family, size),
                "measured": {"phases": text_phase(bench, mode) + phases}, "decoding_in_tiles": decoded})
    return entries


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=["sd3", "miniflux"])
    parser.add_argument("--repo", type=pathlib.Path, help="a checkout of the published code; else tools/reference")
    parser.add_argument("--repo-commit", help="its commit, where it is no git checkout")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["768p", "384p"])
    parser.add_argument("--seconds", nargs="+", type=float, default=[5.0], help="lengths of the clips")
    parser.add_argument("--cases", nargs="+", choices=["text", "calls", "clips", "vae"],
                        default=["text", "calls", "clips", "vae"])
    parser.add_argument("--modes", nargs="+", choices=["eager", "tuned"], default=["eager", "tuned"])
    parser.add_argument("--whole", nargs="*", choices=["eager", "tuned"], default=[], help="run sampling as a whole")
    parser.add_argument("--units", type=lambda s: [int(n) for n in s.split(",")], default=[0, 1, 3, 15])
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--time-each", type=float, default=0.5, help="seconds to repeat a call for")
    parser.add_argument("--limit", type=float, default=1e9, help="start no case after so many seconds")
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = Bench(options)
    bench.save()
    parts = ((text, {"text"}), (vae, {"vae"}), (transformer, {"calls", "clips"}))
    for mode, (run, wanted) in itertools.product(options.modes, parts):
        if wanted & set(options.cases):
            # Eager first: should a tuned case break the device, the others are done.
            torch.backends.cudnn.benchmark = mode == "tuned"
            torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is; `compiled` tells
            run(bench, mode)
            free()
            bench.report["compiled"] = dict(torch._dynamo.utils.counters["frames"])
            bench.save()
    failed = [c["name"] for c in bench.report["cases"] if "failed" in c]
    print(f"{len(bench.report['cases'])} cases, {len(failed)} failed, {time.monotonic() - bench.start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
