#!/usr/bin/env python3
"""How the demo model does at other settings, and the scores in the model card.

    python tools/demo_report.py settings PROMPTS.jsonl --out benches/results/demo-settings.json
    python tools/demo_report.py write

`settings` scores every combination of steps and guidance with tools/score_demo.py. `write` puts what
lies in benches/results/demo-{text,image,settings}.json between the markers of assets/demo/README.md
and docs/checks.md, so that no score is typed by hand. Only the standard library is needed.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches/results"
STEPS = (2, 5, 10, 20)
GUIDANCE = (1, 3, 5, 7)
ATTRIBUTES = ("colour", "shape", "motion")


def settings(args):
    """Score every cell of the table and write one JSON file."""
    cells = []
    for steps in STEPS:
        for guidance in GUIDANCE:
            options = ["--steps", steps, "--video-steps", steps, "--guidance", guidance, "--video-guidance", guidance]
            with tempfile.TemporaryDirectory() as folder:
                out = pathlib.Path(folder) / "scores.json"
                command = [sys.executable, ROOT / "tools/score_demo.py", args.prompts, "--out", out,
                           "--limit", args.limit, "--seconds", args.seconds,
                           "--pyraflow", args.pyraflow, "--judge", args.judge, "--", *options]
                subprocess.run([str(part) for part in command], check=True)
                report = json.loads(out.read_text(encoding="utf-8"))
            cells.append({"steps": steps, "guidance": guidance, "scores": report["scores"],
                          "seconds_per_clip": report["seconds_per_clip"]["median"]})
    whole = {"version": report["version"], "clips_per_cell": report["clips"], "seconds": args.seconds,
             "prompts": report["settings"]["prompts"], "cpus": report["settings"]["cpus"], "cells": cells}
    args.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def load(name):
    path = RESULTS / f"demo-{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def percent(share):
    return f"{100 * share:.0f} %"


def scores_section():
    """The scores as Markdown."""
    lines = ["| clips | on | colour | shape | motion | shuffled labels | seconds a clip |", "|---|---|---|---|---|---|---|"]
    notes = []
    for name in ("text", "text-gpu", "image", "image-gpu"):
        report = load(name)
        if report is None:
            continue
        what = "image to video" if report["settings"]["image"] else "text to video"
        right = " | ".join(percent(report["scores"][a]) for a in ATTRIBUTES)
        chance = ", ".join(percent(report["scores_of_shuffled_labels"][a]) for a in ATTRIBUTES)
        seconds = report["seconds_per_clip"]["median"]
        lines.append(f"| {what}, {report['clips']} of {report['settings']['seconds']:g} s | {device(report['settings'])} "
                     f"| {right} | {chance} | {seconds} |")
        if "first_frame_psnr" in report:
            psnr = report["first_frame_psnr"]
            values = [clip["first_frame_psnr"] for clip in report["verdicts"]]
            good = sum(v >= 25 for v in values)
            notes.append(f"First frame against the given image ({device(report['settings'])}): {psnr['mean']} dB on average, "
                         f"{psnr['least']} dB at least, 25 dB or more in {good} of {len(values)}.")
    notes.insert(0, "Prompts held out of training, default settings, scored by `tools/score_demo.py` with the independent "
                    "judge in `tests/judge`; seconds include starting the program.")
    return "\n".join([notes[0], "", *lines, "", *notes[1:]])


def device(settings):
    """What the clips were made on."""
    if "cuda" not in settings["options"]:
        return f"{settings['cpus']} CPU cores"
    return f"{settings['gpus'][0]}, {settings['jobs']} at a time"


def settings_section():
    """The table of settings as Markdown."""
    table = load("settings")
    if table is None:
        return ""
    cells = {(c["steps"], c["guidance"]): c for c in table["cells"]}
    lines = [f"Colour / shape / motion right, in per cent, of {table['clips_per_cell']} held-out clips of "
             f"{table['seconds']:g} s for each combination:", "",
             "| steps per stage | " + " | ".join(f"guidance {g}" for g in GUIDANCE) + " | seconds a clip |",
             "|---" * (len(GUIDANCE) + 2) + "|"]
    for steps in STEPS:
        row = [" / ".join(f"{100 * cells[steps, g]['scores'][a]:.0f}" for a in ATTRIBUTES) for g in GUIDANCE]
        lines.append(f"| {steps} | " + " | ".join(row) + f" | {cells[steps, GUIDANCE[0]]['seconds_per_clip']} |")
    return "\n".join(lines)


def put(path, name, text):
    """Replace what stands between the markers `name` of a Markdown file."""
    old = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.S)
    new, count = pattern.subn(lambda m: m[1] + text.strip() + "\n" + m[2], old)
    if count != 1:
        raise SystemExit(f"{path} has no markers for {name}")
    path.write_text(new, encoding="utf-8")


def write(_):
    put(ROOT / "assets/demo/README.md", "scores", scores_section() + "\n\n" + settings_section())
    put(ROOT / "docs/checks.md", "scores", scores_section())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    table = commands.add_parser("settings", help="score every combination of steps and guidance")
    table.add_argument("prompts", type=pathlib.Path)
    table.add_argument("--out", type=pathlib.Path, required=True)
    table.add_argument("--limit", type=int, default=8, help="prompts per combination (default 8)")
    table.add_argument("--seconds", type=float, default=1.0, help="length of a clip (default 1)")
    table.add_argument("--pyraflow", type=pathlib.Path, default=ROOT / "target/release/pyraflow")
    table.add_argument("--judge", type=pathlib.Path, default=ROOT / "target/release/examples/judge")
    table.set_defaults(run=settings)
    commands.add_parser("write", help="put the scores into the documents").set_defaults(run=write)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
