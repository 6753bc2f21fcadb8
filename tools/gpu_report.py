#!/usr/bin/env python3
"""Writes the GPU tables of README.md from the files in benches/results.

    python tools/gpu_report.py            rewrite the part between the markers
    python tools/gpu_report.py --check    fail if it is not what the files say

gpu-ops.json is what `cargo bench --bench ops -- --json FILE` measured, gpu-full-size.json what
`cargo test --release --test full_size -- --json FILE` did, gpu-clip-NAME.json what `pyraflow bench
--model NAME --seconds 5 --json FILE` did. Only the standard library is needed.
"""

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches/results"
BEGIN, END = "<!-- gpu -->", "<!-- end gpu -->"

# Case of the bench: what a reader calls it.
OPS = {
    "attention/packed/text30+110-history15-stage2-96x160-h24x64": "attention, sd3, last stage with 15 units of history",
    "attention/packed/text30+110-history15-stage2-96x160-h30x64": "attention, miniflux, the same",
    "attention/last-block/history15-96x160-h24x64": "attention of the current frame alone",
    "linear/store/m20000-n1536+1536+1536-k1536": "linear 1536 → 3·1536 + bias, 20,000 rows",
    "linear/gelu_tanh/m20000-n6144-k1536": "linear 1536 → 6144 + bias, GELU",
    "linear/gated-6/m20000-n1536-k6144": "linear 6144 → 1536 + bias, gate, residual",
    "conv3d/k3/2+2x192x320-c512-512": "conv3d 3×3×3, 512 channels, two windows",
    "conv3d/k3-residual/4x384x640-c256-256": "conv3d 3×3×3, 256 channels + residual",
    "conv3d/k3-space/4x384x640-c256-1024": "conv3d 3×3×3, 256 → 1024, shuffled into space",
    "conv3d/k3-residual/8x768x1280-c128-128": "conv3d 3×3×3, 128 channels + residual",
    "layer_norm_modulate/m20000-n1536-g6": "layer norm, scale and shift, 20,000 rows",
    "head_norm_rope/m20000-h24-from0": "RMS norm of heads + rotary positions",
    "group_norm/8x768x1280-c128-g32-silu": "group norm + SiLU, 8 frames of 768p",
}

# Call of the full-size comparison: what a reader calls it.
CALLS = {
    "transformer.stage0.units15": "transformer, first stage, 15 units of history",
    "transformer.stage1.units15": "transformer, second stage",
    "transformer.stage2.units0": "transformer, last stage, no history",
    "transformer.stage2.units15": "transformer, last stage, 15 units",
    "vae.decode": "VAE, 2 latents to 9 frames of 768p",
    "vae.encode": "VAE, an image of 768p to its latent",
    "t5.ids128": "T5-XXL, 128 tokens",
    "clip_g.ids77": "CLIP-G, 77 tokens",
}


def read(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def ops(report):
    by_case = {row["case"]: row for row in report["results"]}
    copy = report["copy_gbytes_per_second"]
    lines = [f"Single ops by our own kernels on one {report['device']} (driver {report['driver']}, commit {report['commit']}), medians of "
             f"{report['repeats']} runs with the cache flushed in between; a copy on the device moves {copy:.0f} GB/s:", "",
             "| op | time | rate |", "|---|---|---|"]
    for case, name in OPS.items():
        row = by_case[case]
        rate = (f"{row['tflops']:.0f} TFLOP/s" if row["flops"] else
                f"{row['gbytes_per_second']:.0f} GB/s, {row['share_of_copy_rate']:.0%} of a copy")
        lines.append(f"| {name} | {row['median_seconds'] * 1e3:.3f} ms | {rate} |")
    return lines


def calls(report):
    gpu, worst = report["gpu_and_driver"], max(row["ratio"] for row in report["results"])
    lines = [f"Single calls with random checkpoints of the published size against the published PyTorch code in bf16, same "
             f"weights, inputs and machine ({gpu}, commit {report['commit']}). The error is against an f32 computation, as a "
             f"share of what the published code's is; over all {len(report['results'])} calls it is {worst:.2f} at most:", "",
             "| call | pyraflow | published | faster | error |", "|---|---|---|---|---|"]
    for family in ("sd3", "miniflux"):
        for row in report["results"]:
            name = CALLS.get(row["call"])
            if row["family"] != family or name is None:
                continue
            ours, theirs = row["seconds"] * 1e3, row["published_seconds"] * 1e3
            lines.append(f"| {family}: {name} | {ours:.1f} ms | {theirs:.1f} ms | {theirs / ours:.1f}× | {row['ratio']:.2f} |")
    return lines


def clips():
    lines = ["Clips of 5 s at 24 fps, published steps, random weights, without encoding the file (`pyraflow bench --model NAME`):", "",
             "| model | text | transformer | VAE decode | device memory | measured with |", "|---|---|---|---|---|---|"]
    for name in ("sd3-768p", "sd3-384p", "miniflux-768p"):
        report = read(f"gpu-clip-{name}.json")
        text, sampling, decoding = report["measured"]["phases"]
        peak = max(phase["memory"] for phase in report["measured"]["phases"]) / 2**30
        lines.append(f"| {name} | {text['seconds']:.2f} s | {sampling['seconds']:.1f} s | {decoding['seconds']:.1f} s | {peak:.1f} GiB "
                     f"| {report['device']}, driver {report['driver']}, commit {report['commit']} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        return f"gpu_report: {path} lacks the markers {BEGIN} and {END}"
    table = "\n".join([*ops(read("gpu-ops.json")), "", *calls(read("gpu-full-size.json")), "", *clips()])
    new = f"{before}{BEGIN}\n{table}\n{END}{after}"
    if args.check:
        return None if new == text else "gpu_report: README.md is not what benches/results say"
    path.write_text(new, encoding="utf-8")
    return None


if __name__ == "__main__":
    sys.exit(main())
