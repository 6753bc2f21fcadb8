#!/usr/bin/env python3
"""Writes the tables and charts of README.md and of docs/{checks,performance,memory}.md from the files in benches/results.

    python tools/report.py            rewrite what stands between the markers, and docs/images/*.svg
    python tools/report.py --check    fail if documents or charts are not what the files say
    python tools/report.py --plans target/release/pyraflow    write plans.json anew first

gpu-ops.json and gpu-linear-cublaslt.json are what `cargo bench --bench ops -- --json FILE` measured (the second with the
backend that uses cuBLASLt), gpu-full-size.json what `cargo test --release --test full_size -- --json FILE` did,
gpu-clip-*.json what `pyraflow bench --model NAME --seconds N --json FILE` did, reference-*.json what
tools/bench_reference.py did (there need not be any: then nothing is said of PyTorch that the others do not hold),
gpu-memory-*.json what tools/gpu_memory.py did, gpu-tests.json what tools/gpu_test_results.py did, gpu-startup-*.json
what tools/startup.py did, gpu-soak-*.json what `pyraflow bench --clips N --json FILE` did, and plans.json holds what `pyraflow plan --json` states: operations, and times
for cards that were not measured. Only the standard library is needed.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys

import report_charts
from report_memory import cards, memory, memory_links, memory_runs, soak, startup
from report_results import (IMAGES, PHASES, RESULTS, ROOT, Results, clip_name, gib, gpu, key, measured_with, phases,
                            seconds_of, table, torch_with)

MARKERS = re.compile(r"<!-- report: (?P<name>[a-z-]+) -->\n.*?<!-- end report -->", re.DOTALL)

# Dense bf16 matrix products a second, from NVIDIA's data sheets.
PEAK = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12}

# Case of the bench: what a reader calls it.
OPS = {
    "attention/packed/text30+110-history15-stage2-96x160-h24x64": "attention, sd3, last stage with 15 units of history",
    "attention/packed/text30+110-history15-stage2-96x160-h30x64": "attention, miniflux, the same",
    "attention/last-block/history15-96x160-h24x64": "attention of the current frame alone",
    "linear/store/m20000-n1536+1536+1536-k1536": "linear 1536 → 3·1536 + bias, 20,000 rows",
    "linear/heads-64/m20000-n1536+1536+1536-k1536": "the same, heads of queries and keys normed and rotated",
    "linear/gelu_tanh/m20000-n6144-k1536": "linear 1536 → 6144 + bias, GELU",
    "linear/gated-6/m20000-n1536-k6144": "linear 6144 → 1536 + bias, gate, residual",
    "conv3d/k3/2+2x192x320-c512-512": "conv3d 3×3×3, 512 channels, two windows",
    "conv3d/k3-residual/4x384x640-c256-256": "conv3d 3×3×3, 256 channels + residual",
    "conv3d/k3-space/4x384x640-c256-1024": "conv3d 3×3×3, 256 → 1024, shuffled into space",
    "conv3d/k3-residual/8x768x1280-c128-128": "conv3d 3×3×3, 128 channels + residual",
    "layer_norm_modulate/m20000-n1536-g6": "layer norm, scale and shift, 20,000 rows",
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

# Cards for which times are predicted: limit, GB/s of the bus, TFLOP/s as reached, GB/s of memory.
CARDS = [("12 GB on PCIe 4.0 x16", "11.5G", None, 25, 60, 450), ("12 GB on PCIe 4.0 x8", "11.5G", None, 12, 60, 450),
         ("8 GB on PCIe 4.0 x16", "7.5G", None, 25, 40, 250), ("8 GB on PCIe 4.0 x8", "7.5G", None, 12, 40, 250),
         ("8 GB on PCIe 4.0 x16", "7.5G", "4G", 25, 40, 250), ("6 GB on PCIe 4.0 x16", "5.5G", "4G", 25, 40, 250)]

WHOSE = {"eager": "published PyTorch", "tuned": "tuned PyTorch"}


# Tables of docs/checks.md

def gpu_tests(results):
    """What tools/gpu-tests found."""
    report = results.tests
    worst = max(ratio for op in report["ops"].values() for ratio in op["largest_ratio"].values())
    cases = sum(op["cases"] for op in report["ops"].values())
    rows = [[name.replace("gpu_ops-", "gpu_ops, "), "; ".join(lines)]
            for name, lines in [*report["tests"].items(), *report["sanitizer"].items()]]
    return [f"{report['gpu_and_driver']}, commit {report['commit']}: over {cases} cases of {len(report['ops'])} ops the largest error is "
            f"{worst:.2f} times what rounding to bf16 costs ({report['allowed_ratio']} is allowed).", "",
            *table(["program", "result"], rows)]


def ops(results):
    report = results.ops
    by_case = {row["case"]: row for row in report["results"]}
    copy = report["copy_gbytes_per_second"]
    rows = []
    for case, name in OPS.items():
        row = by_case[case]
        rate = (f"{row['flops'] / row['median_seconds'] / 1e12:.0f} TFLOP/s" if row["flops"] else
                f"{row['gbytes_per_second']:.0f} GB/s, {row['share_of_copy_rate']:.0%} of a copy")
        rows.append([name, f"{row['median_seconds'] * 1e3:.3f} ms", rate])
    return [f"Single ops by our own kernels on one {measured_with(report)}, medians of {report['repeats']} runs with "
            f"the cache flushed in between; a copy on the device moves {copy:.0f} GB/s:", "",
            *table(["op", "time", "rate"], rows)]


def run_name(run):
    """What a reader calls a whole run of the full-size comparison."""
    steps = sum(run["steps"]) + (run["units"] - 1) * sum(run["video_steps"])
    return f"whole run to latents, {run['units']} units of {run['height']}p, {steps} steps"


def worst_run(runs):
    """What is said of whole runs, if there are any."""
    if not runs:
        return ""
    whole, narrow = max(row["ratio"] for row in runs), max(row["run"]["calls_ratio"] for row in runs)
    return (f", over whole runs {whole:.2f}, and {narrow:.2f} of the error of the published calls in bf16 with latents and "
            f"timesteps in f32 around them")


def calls(results, chosen=CALLS):
    report = results.calls
    single = [row["ratio"] for row in report["results"] if "run" not in row]
    runs = [row for row in report["results"] if "run" in row]
    rows = []
    for family in ("sd3", "miniflux"):
        for row in report["results"]:
            name = row["call"] if chosen is None else run_name(row["run"]) if "run" in row else chosen.get(row["call"])
            if row["family"] != family or name is None:
                continue
            ours, theirs = row["seconds"] * 1e3, row["published_seconds"] * 1e3
            rows.append([f"{family}: {name}", f"{ours:.1f} ms", f"{theirs:.1f} ms", f"{theirs / ours:.1f}×",
                         f"{row['ratio']:.2f}"])
    return [f"Single calls with random checkpoints of the published size against the published PyTorch code in bf16, same "
            f"weights, inputs and machine ({report['gpu_and_driver']}, commit {report['commit']}). The error is against "
            f"an f32 computation, as a share of what the published code's is; over all {len(single)} calls it "
            f"is {max(single):.2f} at most{worst_run(runs)}:", "", *table(["call", "pyraflow", "published", "faster", "error"], rows)]


def clips(results):
    modes = [m for m in WHOSE if any(results.reference(clip, m)[0] for clip in results.clips)]
    head = ["model", "text", "transformer", "VAE decode", "device memory", *(WHOSE[m] for m in modes), "measured with"]
    rows = []
    for report in results.clips:
        found = phases(report)
        peak = max(phase["memory"] or 0 for phase in found.values()) / 2**30
        rows.append([clip_name(report), *(f"{found[p]['seconds']:.{2 if p == 'text' else 1}f} s" for p in PHASES),
                     f"{peak:.1f} GiB", *(beside(results, report, m) for m in modes), measured_with(report)])
    return ["Clips at 24 fps, published steps, random weights, without encoding the file (`pyraflow bench --model NAME`):",
            "", *table(head, rows), *(["", *reference_notes(results)] if modes else [])]


def beside(results, clip, mode):
    """What PyTorch takes for the transformer and for the decoder, if each was measured."""
    other, _ = results.reference(clip, mode)
    if other is None:
        return "not measured"
    ours, theirs = phases(clip), phases(other)
    parts = [f"{PHASES[p]} {theirs[p]['seconds']:.1f} s, {theirs[p]['seconds'] / ours[p]['seconds']:.1f}×"
             for p in ("sampling", "decoding") if p in theirs]
    return "; ".join(parts)


def reference_notes(results):
    lines = ["PyTorch: text, transformer and VAE decode in full frames, the same sizes, steps and text lengths:", ""]
    for report in results.references:
        lines.append(f"* {report['family']}: {torch_with(report)}")
    return lines


def rates(results):
    """One sentence on single kernels and one step."""
    by_case = {row["case"]: row for row in results.ops["results"]}
    chosen = [by_case[case] for case in OPS]

    def span(op, value, unit):
        found = sorted(value(row) for row in chosen if row["op"] == op)
        return f"{found[0]:.0f}–{found[-1]:.0f} {unit}" if round(found[0]) != round(found[-1]) else f"{found[0]:.0f} {unit}"

    def flops(row):
        return row["flops"] / row["median_seconds"] / 1e12

    norms = [f"{name.replace('_', ' ')} {by_op['share_of_copy_rate']:.0%}" for by_op in chosen
             if "norm" in (name := by_op["op"])]
    step = next(row for row in results.calls["results"]
                if (row["family"], row["call"]) == ("sd3", "transformer.stage2.units15"))
    return (f"Single kernels ({measured_with(results.ops)}): attention {span('attention', flops, 'TFLOP/s')}, 3-D convolutions "
            f"{span('conv3d', flops, 'TFLOP/s')}, linear layers {span('linear', flops, 'TFLOP/s')}; of the rate of a copy: "
            f"{', '.join(norms)}. One transformer step of the last stage of 768p with 15 units of history takes "
            f"{step['seconds'] * 1e3:.0f} ms, the published code {step['published_seconds'] * 1e3:.0f} ms "
            f"({results.calls['gpu_and_driver']}, commit {results.calls['commit']}).")


def summary(results):
    return [*clips(results), "", rates(results), "", *memory(results, 5)]


def checks(results):
    lines = [*ops(results), "", *calls(results), "", *clips(results)]
    return [*lines, "", "![seconds of a clip by phase](images/clips.svg)", "",
            "Where the time goes, how it grows and how far it is from the machine's own limits: "
            "[docs/performance.md](performance.md)."]


# Tables of docs/performance.md

def phase_table(results):
    """Time, operations and floor of every phase, PyTorch beside it."""
    modes = [m for m in WHOSE if any(results.reference(clip, m)[0] for clip in results.clips)]
    rows = []
    for report in results.clips:
        found, peak = phases(report), PEAK.get(gpu(report))
        others = [phases(results.reference(report, m)[0] or {"measured": {"phases": []}}) for m in modes]
        for name, title in PHASES.items():
            phase = found[name]
            floor = phase["flops"] / peak if peak else None
            rows.append([
                clip_name(report), title, f"{phase['seconds']:.2f} s", f"{phase['flops'] / 1e15:.3f}",
                f"{phase['flops'] / phase['seconds'] / 1e12:.0f}", f"{floor:.2f} s" if peak else "",
                f"{floor / phase['seconds']:.0%}" if peak else "", gib(phase["memory"]),
                *(cell for other in others for cell in
                  ((f"{other[name]['seconds']:.2f} s ({how(other[name])})", gib(other[name]["memory"])) if name in other
                   else ("not measured", "")))])
    head = ["clip", "phase", "time", "PFLOP", "TFLOP/s", "floor", "share", "GiB",
            *(cell for m in modes for cell in (WHOSE[m], "GiB"))]
    return [*table(head, rows), "", *(f"* {clip_name(r)}: {measured_with(r)}" for r in results.clips),
            *([""] + reference_notes(results) if modes else [])]


def how(phase):
    return {"calls": "sum of its calls", "whole": "run whole"}.get(phase.get("method"), "median call")


def op_table(results):
    """What each kind of op takes in the graphs of the last unit."""
    lines = []
    for report in results.clips:
        rows, peak, graphs = [], PEAK.get(gpu(report)), {}
        for op in report["measured"]["ops"]:
            graphs.setdefault(op["graph"], []).append(op)
        for graph, found in graphs.items():
            whole = sum(op["seconds"] for op in found)
            kept = [op for op in found if op["seconds"] / whole >= 0.005]
            for op in kept:
                rate = op["flops"] / op["seconds"]
                rows.append([graph, op["op"], str(op["nodes"]), f"{op['seconds'] * 1e3:.2f} ms",
                             f"{op['seconds'] / whole:.0%}", f"{op['flops'] / 1e12:.2f}" if op["flops"] else "",
                             f"{rate / 1e12:.0f}" if op["flops"] else "",
                             f"{rate / peak:.0%}" if op["flops"] and peak else "",
                             f"{op['bytes'] / 1e9:.2f}" if "bytes" in op else "",
                             f"{op['floor'] / op['seconds']:.0%}" if op.get("floor") else ""])
                graph = ""
            rest = whole - sum(op["seconds"] for op in kept)
            rows.append(["", "all others", "", f"{rest * 1e3:.2f} ms", f"{rest / whole:.1%}", *[""] * 5])
        ceilings, note = report["measured"].get("ceilings"), ""
        if ceilings:
            note = (f"; floors by what was measured in the same run: a large product {ceilings['flops'] / 1e12:.0f} TFLOP/s, "
                    f"a copy {ceilings['bytes'] / 1e9:.0f} GB/s")
        lines += [f"**{clip_name(report)}** ({measured_with(report)}{note})", "",
                  *table(["graph", "op", "nodes", "time", "of the graph", "TFLOP", "TFLOP/s", "of the peak", "GB",
                          "of its floor"], rows), ""]
    return lines[:-1]


def kernel_table(results):
    """Every chosen kernel against its own floor: operations at the peak or bytes at the rate of a copy."""
    rows = []
    for report, by in ((results.ops, ""), (results.linear, " (cuBLASLt)")):
        peak, copy = PEAK.get(gpu(report)), report["copy_gbytes_per_second"] * 1e9
        for row in report["results"]:
            name = OPS.get(row["case"])
            if name is None or peak is None or (by and "gated" in row["case"]):
                continue  # gated layers stay with our own kernels
            by_flops, by_bytes = row["flops"] / peak, row["bytes"] / copy
            floor = max(by_flops, by_bytes)
            rows.append([list(OPS).index(row["case"]), name + by, f"{row['median_seconds'] * 1e3:.3f} ms",
                         f"{row['flops'] / 1e12:.3f}" if row["flops"] else "", f"{row['bytes'] / 1e9:.3f}",
                         f"{floor * 1e3:.3f} ms", "products" if by_flops > by_bytes else "memory",
                         f"{floor / row['median_seconds']:.0%}"])
    rows = [row[1:] for row in sorted(rows, key=lambda row: (row[0], row[1]))]
    return [*table(["kernel", "time", "TFLOP", "GB", "floor", "set by", "share"], rows), "",
            f"* own kernels: {measured_with(results.ops)}; a copy moves {results.ops['copy_gbytes_per_second']:.0f} GB/s",
            f"* cuBLASLt: {measured_with(results.linear)}; a copy moves {results.linear['copy_gbytes_per_second']:.0f} GB/s"]


def gemm_table(results):
    """Every linear layer of the bench: our kernels and the library."""
    theirs = {row["case"]: row for row in results.linear["results"]}
    rows = []
    for row in results.ops["results"]:
        other = theirs.get(row["case"])
        if row["op"] != "linear" or other is None or "gated" in row["case"]:
            continue  # the library has no gate
        rows.append([row["case"].removeprefix("linear/").replace("|", " and "), f"{row['median_seconds'] * 1e6:.0f} µs",
                     f"{other['median_seconds'] * 1e6:.0f} µs", f"{row['flops'] / row['median_seconds'] / 1e12:.0f}",
                     f"{other['median_seconds'] / row['median_seconds']:.2f}"])
    return table(["layer", "own", "cuBLASLt", "own TFLOP/s", "own rate to cuBLASLt's"], rows)


def growth_table(results):
    """Operations, and seconds if every operation took what it takes in the 5 s clip of 768p."""
    plans = sorted(results.plans["plans"], key=key)
    # Runs without a limit of tools/gpu_memory.py are clips, too.
    measured = results.clips + [first for first, run in memory_runs(results) if run["limit"] is None]
    rows = []
    for family in ("sd3", "miniflux"):
        base = next((c for c in results.clips if (c["family"], c["variant"], seconds_of(c)) == (family, "768p", 5)), None)
        ground = next((p for p in plans if base and key(p) == key(base)), None)
        for plan in plans:
            if plan["family"] != family or ground is None:
                continue
            clip = next((c for c in measured if key(c) == key(plan)), None)
            row = [f"{family}-{plan['variant']}, {plan['seconds']} s"]
            for name in ("sampling", "decoding"):
                share = plan["flops"][name] / ground["flops"][name]
                row += [f"{plan['flops'][name] / 1e15:.2f}", f"{share:.2f}×",
                        f"{phases(base)[name]['seconds'] * share:.1f} s",
                        f"{phases(clip)[name]['seconds']:.1f} s" if clip else ""]
            rows.append(row)
    head = ["clip", "transformer PFLOP", "to 5 s of 768p", "predicted", "measured", "VAE PFLOP", "to 5 s of 768p",
            "predicted", "measured"]
    bases = [c for c in results.clips if (c["variant"], seconds_of(c)) == ("768p", 5)]
    return [*table(head, rows), "", f"* operations: `{results.plans['command']}`, commit {results.plans['commit']}",
            *(f"* rate: {clip_name(c)}, {measured_with(c)}" for c in bases),
            *(f"* {clip_name(c)}: {measured_with(c)}" for c in measured if seconds_of(c) == 10)]


def reference_table(results):
    """Every case of tools/bench_reference.py."""
    lines = []
    for report in results.references:
        rows = {}
        for case in report["cases"]:
            where = (case.get("variant", ""), case["name"])
            label = case["mode"] + "".join([f", {case['attention']}" if "attention" in case else "",
                                            ", graph" if case.get("graph") else ""])
            if "seconds" in case:
                error = f", {case['error_to_eager']:.1e}" if "error_to_eager" in case else ""
                text = f"{label}: {case['seconds'] * 1e3:.1f} ms{error}"
            elif "failed" in case or "skipped" in case:
                text = f"{label}: {case.get('failed') or 'skipped: ' + case['skipped']}"[:160].replace("|", "/")
            else:
                continue
            rows.setdefault(where, []).append(text)
        lines += [f"**{report['family']}** ({torch_with(report)})", "",
                  *table(["size", "case", "time, and relative error to eager"],
                         [[size, name, "<br>".join(texts)] for (size, name), texts in rows.items()]), ""]
    return lines[:-1] or ["No result file of PyTorch's whole clips is in `benches/results`."]


SECTIONS = {"summary": summary, "gpu-tests": gpu_tests, "checks": checks, "memory": memory, "memory-links": memory_links,
            "cards": cards, "soak": soak, "startup": startup, "gemm": gemm_table, "phases": phase_table,
            "ops": op_table, "kernels": kernel_table, "growth": growth_table,
            "calls": lambda results: calls(results, None), "reference": reference_table}
DOCUMENTS = ("README.md", "docs/checks.md", "docs/performance.md", "docs/memory.md")


# Charts

def charts(results):
    rows = []
    for clip in results.clips:
        entries = [("pyraflow", clip)] + [(WHOSE[m], results.reference(clip, m)[0]) for m in WHOSE]
        for who, report in entries:
            if report:
                values = [phases(report).get(p, {"seconds": 0})["seconds"] for p in PHASES]
                if all(p in phases(report) for p in PHASES):
                    rows.append((f"{clip_name(clip)}: {who}", values, f"{sum(values):.1f} s"))
    names = ", ".join(sorted({gpu(c) for c in results.clips}))
    yield "clips.svg", report_charts.stacked(f"Seconds of a clip by phase ({names})", list(PHASES.values()), rows, "s")
    rows, kinds = [], ["linear", "attention", "conv3d", "group_norm", "all others"]
    for clip in results.clips:
        graphs = {}
        for op in clip["measured"]["ops"]:
            values = graphs.setdefault(op["graph"], dict.fromkeys(kinds, 0.0))
            values[op["op"] if op["op"] in kinds else kinds[-1]] += op["seconds"] * 1e3
        for graph, values in graphs.items():
            short = graph.replace(" of the last unit", "").replace("decoding one latent", "one latent")
            rows.append((f"{clip['family']}-{clip['variant']}, {short}", list(values.values()), f"{sum(values.values()):.0f} ms"))
    yield "ops.svg", report_charts.stacked("Milliseconds of a call by kind of op, last unit of 5 s", kinds, rows, "ms")


def write_plans(pyraflow):
    """The operations of clips of the published sizes, as the program states them."""
    commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    plans = []
    for family in ("sd3", "miniflux"):
        for variant in ("384p", "768p"):
            for seconds in (5, 10):
                command = [pyraflow, "plan", "--model", f"{family}-{variant}", "--seconds", str(seconds), "--json", "--force"]
                plan = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                plans.append({"family": family, "variant": variant, "seconds": seconds,
                              **{k: plan[k] for k in ("width", "height", "units")},
                              "flops": {phase["name"]: phase["flops"] for phase in plan["phases"]}})
    predicted = []
    for model in ("sd3-384p", "sd3-768p", "miniflux-768p"):
        for name, limit, host, link, tflops, bandwidth in CARDS:
            command = [pyraflow, "plan", "--model", model, "--seconds", "5", "--json", "--max-vram", limit, "--link", str(link),
                       "--tflops", str(tflops), "--bandwidth", str(bandwidth), *(["--max-host", host] if host else [])]
            plan = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            predicted.append({"card": name, "model": model, "limit": limit, "max_host": host, "link": link, "tflops": tflops,
                              "bandwidth": bandwidth, "disk": plan["machine"]["disk"] / 1e9,
                              "phases": [{k: phase[k] for k in ("name", "device_bytes", "pinned_bytes", "scratch_bytes", "predicted")}
                                         for phase in plan["phases"]]})
    result = {"commit": commit.stdout.strip(), "command": "pyraflow plan --model NAME --seconds N --json", "plans": plans,
              "cards": predicted}
    (RESULTS / "plans.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--plans", metavar="PYRAFLOW", help="write plans.json with this program first")
    args = parser.parse_args()
    if args.plans:
        write_plans(args.plans)
    results, written, used = Results(), {}, set()
    for name in DOCUMENTS:
        def fill(match):
            used.add(match["name"])
            body = "\n".join(SECTIONS[match["name"]](results))
            return f"<!-- report: {match['name']} -->\n{body}\n<!-- end report -->"

        written[ROOT / name] = MARKERS.sub(fill, (ROOT / name).read_text(encoding="utf-8"))
    if missing := set(SECTIONS) - used:
        return f"report: no document has the markers of {', '.join(sorted(missing))}"
    written.update({IMAGES / name: svg for name, svg in charts(results)})
    if args.check:
        stale = [str(path.relative_to(ROOT)) for path, text in written.items()
                 if not path.exists() or path.read_text(encoding="utf-8") != text]
        return f"report: not what benches/results say: {', '.join(stale)}" if stale else None
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")
    return None


if __name__ == "__main__":
    sys.exit(main())
