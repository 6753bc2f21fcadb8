#!/usr/bin/env python3
"""Scores the built-in demo model: does `pyraflow generate` show what the prompt says?

    python tools/demo/data.py --render 112 --held-out only --seed 5 --out /tmp/held-out
    cargo build --release --bin pyraflow --example judge
    python tools/score_demo.py /tmp/held-out/labels.jsonl --out text.json
    python tools/score_demo.py /tmp/held-out/labels.jsonl --image --out image.json

A line of the prompts is {"caption", "shape", "colour", "motion"}. With --image each clip starts
from an image: the line's "image" (a PNG file), or the first frame of its "file" (a .npy clip); both
relative to the prompts. Options after -- go to `pyraflow generate`: `-- --steps 5 --guidance 3`.

Clips are made (one after the other, unless --jobs says otherwise) with the command a user would type, written as PNG frames and
judged by `examples/judge.rs`. With --work DIR they are kept there, and a run that was stopped goes
on where it was. The result is one JSON file: shares of right answers, confusion counts, a verdict
for each prompt, the settings and the time that a clip takes.

Only the standard library is needed. Exit code 1: something failed, or a score is below what
--require asks for.
"""

import argparse
import ast
import concurrent.futures
import json
import os
import pathlib
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
ATTRIBUTES = ("colour", "shape", "motion")


def first_frame(path):
    """(width, height, RGB bytes) of the first frame of a .npy clip of bytes, frames x height x width x 3."""
    with open(path, "rb") as file:
        magic = file.read(8)
        if magic[:6] != b"\x93NUMPY":
            raise ValueError(f"{path} is not a NumPy file")
        (length,) = struct.unpack("<H", file.read(2)) if magic[6] == 1 else struct.unpack("<I", file.read(4))
        header = ast.literal_eval(file.read(length).decode("latin-1"))
        shape = header["shape"]
        if header["descr"] != "|u1" or header["fortran_order"] or len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"{path} is not a clip of bytes, frames x height x width x 3")
        return shape[2], shape[1], file.read(shape[1] * shape[2] * 3)


def write_png(path, width, height, rgb):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + rgb[3 * width * y:3 * width * (y + 1)] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))


def read_prompts(path, limit):
    """The lines of the prompts that show one object, at most `limit`."""
    prompts = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            prompt = json.loads(line)
            missing = {"caption", *ATTRIBUTES} - prompt.keys()
            if missing:
                raise ValueError(f"{path} line {number} has no {', '.join(sorted(missing))}")
            if len(prompt.get("objects", [0])) == 1:
                prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts[:limit]


def start_image(prompt, prompts_path, target):
    """The image that a prompt's clip starts from, as a PNG file at `target`."""
    folder = prompts_path.parent
    if "image" in prompt:
        shutil.copyfile(folder / prompt["image"], target)
    elif "file" in prompt:
        write_png(target, *first_frame(folder / prompt["file"]))
    else:
        raise ValueError(f"--image: the prompt {prompt['caption']!r} has neither an image nor a file")


def generate(command, image, folder):
    """Runs `command` unless `folder` holds what it made of the same program and image; returns the seconds it took."""
    record = folder / "made.json"
    program = os.stat(command[0])
    source = {"command": command, "program": [program.st_size, program.st_mtime_ns],
              "image": zlib.crc32(image.read_bytes()) if image else None}
    if record.exists():
        made = json.loads(record.read_text(encoding="utf-8"))
        if made["source"] == source:
            return made["seconds"]
        record.unlink()
    for old in folder.glob("frame*.png"):
        old.unlink()
    begin = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = time.monotonic() - begin
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\nended with code {done.returncode}:\n{done.stdout[-2000:]}")
    record.write_text(json.dumps({"source": source, "seconds": seconds}), encoding="utf-8")
    return seconds


def make_clips(args, prompts, work):
    """Makes a clip of every prompt and seed; returns their labels, which the judge reads, and their seconds."""
    labels, tasks = [], []
    for prompt in prompts:
        for seed in args.seeds:
            name = f"clip{len(labels):04d}"
            folder = work / name
            folder.mkdir(parents=True, exist_ok=True)
            label = {"file": name, "caption": prompt["caption"], "seed": seed}
            label.update((a, prompt[a]) for a in ATTRIBUTES)
            command = [str(args.pyraflow), "generate", prompt["caption"], "--seconds", str(args.seconds),
                       "--seed", str(seed), "-o", str(folder / "frame.png"), "-y", *args.options]
            image = None
            if args.image:
                # Beside the frames, not among them.
                image = work / f"{name}.start.png"
                start_image(prompt, args.prompts, image)
                label["image"] = image.name
                command += ["--image", str(image)]
            tasks.append((command, image, folder))
            labels.append(label)
    times = []
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for label, seconds in zip(labels, pool.map(lambda task: generate(*task), tasks)):
            times.append(seconds)
            print(f"{len(times)}/{len(labels)}  {seconds:.1f} s  {label['caption']}", file=sys.stderr, flush=True)
    return labels, times


def devices(program):
    """The GPUs and the driver that `pyraflow doctor` sees, if any."""
    done = subprocess.run([program, "doctor", "--json"], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    driver = (found.get("driver") or {}).get("version")
    return {"gpus": [gpu["name"] for gpu in found.get("gpus", [])], "driver": driver}


def judge(program, labels, work):
    """The judge's line for each clip, its summary, and the shares that shuffled labels get."""
    path = work / "labels.jsonl"
    path.write_text("".join(json.dumps(label) + "\n" for label in labels), encoding="utf-8")

    def lines(*options):
        done = subprocess.run([program, *options, "--labels", path], stdout=subprocess.PIPE, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    *verdicts, summary = lines()
    (shuffled,) = lines("--quiet", "--shuffle")
    return verdicts, summary, {a: shuffled[a] for a in ATTRIBUTES}


def result(args, labels, times, verdicts, summary, shuffled):
    version = subprocess.run([args.pyraflow, "--version"], stdout=subprocess.PIPE, text=True, check=True)
    clips = []
    for label, verdict, seconds in zip(labels, verdicts, times, strict=True):
        clip = {"caption": label["caption"], "seed": label["seed"], "seconds": round(seconds, 2)}
        clip["wanted"] = {a: label[a] for a in ATTRIBUTES}
        clip["seen"] = {a: verdict[a] for a in ATTRIBUTES}
        clip.update((k, verdict[k]) for k in ("first_frame_psnr", "measures") if k in verdict)
        clips.append(clip)
    report = {
        "version": version.stdout.strip(),
        "settings": {"image": args.image, "seconds": args.seconds, "seeds": args.seeds, "options": args.options,
                     "prompts": args.prompts.name, "cpus": len(os.sched_getaffinity(0)), "jobs": args.jobs,
                     **devices(args.pyraflow), "commit": os.environ.get("PYRAFLOW_COMMIT")},
        "clips": len(clips),
        "scores": {a: round(summary[a], 4) for a in (*ATTRIBUTES, "all")},
        "scores_of_shuffled_labels": {a: round(s, 4) for a, s in shuffled.items()},
        "seconds_per_clip": {"median": round(statistics.median(times), 2), "most": round(max(times), 2)},
    }
    if args.image:
        psnr = [clip["first_frame_psnr"] for clip in clips]
        report["first_frame_psnr"] = {"mean": round(statistics.mean(psnr), 2), "least": round(min(psnr), 2)}
    report["confusion"] = summary["confusion"]
    report["verdicts"] = clips
    return report


def requirement(text):
    """NAME=VALUE, as "shape=0.9" or "first_frame_psnr=25"."""
    name, _, value = text.partition("=")
    if name not in (*ATTRIBUTES, "all", "first_frame_psnr"):
        raise argparse.ArgumentTypeError(f"unknown score {name!r}")
    return name, float(value)


def missed(report, requirements):
    """A line for each requirement that the scores do not meet; for PSNR the worst clip counts."""
    values = dict(report["scores"])
    if "first_frame_psnr" in report:
        values["first_frame_psnr"] = report["first_frame_psnr"]["least"]
    return [f"{name} is {values.get(name)}, less than {least}" for name, least in requirements
            if values.get(name, float("-inf")) < least]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=pathlib.Path, help="JSON lines with caption, shape, colour, motion")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the JSON file for the result")
    parser.add_argument("--image", action="store_true", help="image to video")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a clip (default 2)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="each prompt is made with each seed")
    parser.add_argument("--limit", type=int, help="only the first so many prompts")
    parser.add_argument("--jobs", type=int, default=1, help="clips that are made at a time (default 1)")
    parser.add_argument("--work", type=pathlib.Path, help="keep the clips here and take up what is there")
    parser.add_argument("--require", type=requirement, nargs="+", default=[], metavar="NAME=VALUE",
                        help="fail below this: colour, shape, motion, all (shares), first_frame_psnr (dB)")
    parser.add_argument("--pyraflow", type=pathlib.Path, default=ROOT / "target/release/pyraflow")
    parser.add_argument("--judge", type=pathlib.Path, default=ROOT / "target/release/examples/judge")
    command_line, options = sys.argv[1:], []
    if "--" in command_line:
        split = command_line.index("--")
        command_line, options = command_line[:split], command_line[split + 1:]
    args = parser.parse_args(command_line)
    args.options = options
    return args


def main():
    args = arguments()
    prompts = read_prompts(args.prompts, args.limit)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or pathlib.Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        labels, times = make_clips(args, prompts, work)
        report = result(args, labels, times, *judge(args.judge, labels, work))
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in report.items() if k not in ("confusion", "verdicts")}, indent=1))
    problems = missed(report, args.require)
    for problem in problems:
        print(f"score_demo: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        sys.exit(f"score_demo: {error}")
