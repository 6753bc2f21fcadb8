"""Runs of one video within several limits of GPU memory: what they take in memory and time, as seen from outside.

    python tools/gpu_memory.py --pyraflow target/release/pyraflow --model sd3-768p --limits 12G 8G 6G 5G --out FILE
    python tools/gpu_memory.py … --model DIR --weights             # a checkpoint folder and its weights
    python tools/gpu_memory.py … --links 25 12                     # each limit on slower buses, too
    python tools/gpu_memory.py … --bench="--size 384p --seconds 5" # more arguments of `pyraflow bench`
    PYRAFLOW_SCRATCH=DIR python tools/gpu_memory.py … --bench="--seconds 5 --max-host 4G" # within a limit of host memory, too

The first run has no limit; the others must give the same bits. nvidia-smi is asked 50 times a second how much of the
GPU is used: with nothing else running that is the process's own, the driver's context included. The times that
`pyraflow plan` predicts are those for the rates of the first run and the bus of the run, so that its model can be
judged; the rate of an unslowed bus is measured by none of these runs and taken from --own-link.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
import tempfile
import threading
import time


class Watch:
    """The largest memory that nvidia-smi reports in MiB, while in use."""

    def __enter__(self):
        self.peak = 0
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "20"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.thread = threading.Thread(target=self.read)
        self.thread.start()
        return self

    def read(self):
        for line in self.process.stdout:
            if line.strip().isdigit():
                self.peak = max(self.peak, int(line))

    def __exit__(self, *_):
        self.process.kill()
        self.thread.join()


def bench(options, limit, link, folder):
    """One run; what `pyraflow bench` wrote of it, with what was seen from outside."""
    out = pathlib.Path(folder) / "run.json"
    out.unlink(missing_ok=True)
    command = [options.pyraflow, "bench", "--model", options.model, "--json", str(out), *shlex.split(options.bench)]
    command += ["--weights"] * options.weights + (["--max-vram", limit] if limit else [])
    command += ["--link", str(link)] if link else []
    start = time.monotonic()
    with Watch() as watch:
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"limit": limit, "link": link, "failed": done.stderr.strip(), "exit_code": done.returncode}
    report = json.loads(out.read_text())
    report["measured"].pop("ops")
    return {"limit": limit, "link": link, "wall_seconds": time.monotonic() - start,
            "peak_device_mib": watch.peak, "report": report}


def predicted(options, run, rates):
    """The phases as `pyraflow plan` sees them on a machine with these rates."""
    flops, memory, link = rates
    command = [options.pyraflow, "plan", "--model", options.model, "--json", *shlex.split(options.bench), "--max-vram",
               run["limit"], "--tflops", str(flops / 1e12), "--bandwidth", str(memory / 1e9), "--link", str(link)]
    done = subprocess.run(command, capture_output=True, text=True)
    return json.loads(done.stdout)["phases"] if done.returncode == 0 else done.stderr


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pyraflow", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", action="store_true")
    parser.add_argument("--limits", nargs="+", required=True)
    parser.add_argument("--links", nargs="*", type=float, default=[], help="GB/s each way")
    parser.add_argument("--bench", default="", help="more arguments")
    parser.add_argument("--own-link", type=float, default=40, help="GB/s each way of the bus as it is")
    parser.add_argument("--memory-rate", type=float, default=3500, help="GB/s of the GPU's memory")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for limit in [None, *options.limits]:
            for link in [None, *(options.links if limit else [])]:
                runs.append(bench(options, limit, link, folder))
                run = runs[-1]
                print(f"{limit or 'no limit':>8} {f'{link} GB/s' if link else '':>10} ", end="")
                if "failed" in run:
                    print(run["failed"])
                    continue
                phases = {p["name"]: p for p in run["report"]["measured"]["phases"]}
                if limit:
                    first = {p["name"]: p for p in runs[0]["report"]["measured"]["phases"]}
                    flops = first["decoding"]["flops"] / first["decoding"]["seconds"]
                    rates = (flops, options.memory_rate * 1e9, link or options.own_link)
                    run["rates"], run["predicted"] = rates, predicted(options, run, rates)
                print(f"{run['peak_device_mib']:>7} MiB ", end="")
                print("  ".join(f"{name} {p['seconds']:.2f} s" for name, p in phases.items()), flush=True)
    digests = {run["report"]["measured"]["digest"] for run in runs if "failed" not in run}
    result = {"tool": "gpu_memory", "model": pathlib.Path(options.model).name, "arguments": options.bench,
              "weights": "checkpoint" if options.weights else "random", "same_bits": len(digests) == 1, "runs": runs}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print("the same bits in every run" if len(digests) == 1 else "RUNS DIFFER")
    return 0 if len(digests) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
