"""Seconds from the start of the command line to the first kernel, with files that the system has in memory.

    python tools/startup.py --pyraflow target/release/pyraflow --model DIR --out FILE

DIR is a checkpoint folder with tokenizers. The first run may convert weights and reads every file once; those after it
are measured. Each makes the shortest video there is, one frame of one step a stage: what comes before the first kernel
(looking for the GPU, loading kernels, mapping and checking weights, tokenizing, planning the text encoders, the first
uploads) does not depend on the length.
"""

import argparse
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time


def run(options, folder):
    """What the program says of itself, and seconds as seen from outside."""
    command = [options.pyraflow, "generate", options.prompt, "--model", options.model, "--json", "--device", options.device,
               "--units", "1", "--steps", "1", "--video-steps", "1", "--seed", "1", "--overwrite", "--force",
               "--output", str(pathlib.Path(folder) / "frame.png"), *shlex.split(options.generate)]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"startup: {done.stderr.strip()}")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    started, ended = (next(e for e in events if e["event"] == name) for name in ("start", "done"))
    return started["device"], {"start_to_first_kernel": ended["start_to_first_kernel"],
                               "seconds": ended["seconds"], "wall_seconds": time.monotonic() - start}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pyraflow", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompt", default="a red circle moves to the right")
    parser.add_argument("--generate", default="", help="more arguments of `pyraflow generate`")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        device, first = run(options, folder)
        runs = [run(options, folder)[1] for _ in range(options.repeats)]
    sizes = [path.stat().st_size for path in pathlib.Path(options.model).rglob("*.safetensors")]
    told = subprocess.run([options.pyraflow, "doctor", "--json"], capture_output=True, text=True, check=True)
    doctor = json.loads(told.stdout)
    result = {"tool": "startup", "commit": os.environ.get("PYRAFLOW_COMMIT"), "device": device,
              "driver": (doctor.get("driver") or {}).get("version"), "model": pathlib.Path(options.model).name,
              "checkpoint_bytes": sum(sizes), "first": first, "runs": runs}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if device.startswith("CPU"):
        print(f"{device}: no kernels")
        return
    waits = [run["start_to_first_kernel"] for run in runs]
    print(f"start to first kernel: {statistics.median(waits):.2f} s, {max(waits):.2f} s at most "
          f"(the first time {first['start_to_first_kernel']:.2f} s)")


if __name__ == "__main__":
    sys.exit(main())
