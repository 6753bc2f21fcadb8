"""What tools/gpu-tests found, from the logs that it left, as one small result file.

    tools/gpu-tests --log-dir TESTS && tools/gpu-tests --sanitize --log-dir SANITIZE
    PYRAFLOW_COMMIT=... python tools/gpu_test_results.py TESTS SANITIZE --out benches/results/gpu-tests.json

The commit is the one that was built: PYRAFLOW_COMMIT, or what git says of the sources. Only the standard library is
needed.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys

# The closing line of the ops' harness, of libtest and of the sanitizer.
CLOSING = re.compile(r"^(?:\d+ passed, |test result: |=+ (?:ERROR|RACECHECK) SUMMARY: )")


def commit():
    if found := os.environ.get("PYRAFLOW_COMMIT"):
        return found
    folder = pathlib.Path(__file__).resolve().parent
    git = subprocess.run(["git", "-C", folder, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return git.stdout.strip() or None


def closing_lines(folder):
    """Name of each log -> its closing lines."""
    found = {}
    for log in sorted(folder.glob("*.log")):
        lines = [line.strip("= ") for line in log.read_text(encoding="utf-8").splitlines() if CLOSING.match(line)]
        if not lines:
            sys.exit(f"gpu_test_results: {log} has no closing line: did it end?")
        found[log.stem] = lines
    return found


def ops(report):
    """Cases of each op, and for each set of kernels the largest error as a multiple of what rounding to bf16 costs."""
    found = {}
    for case in report["results"]:
        entry = found.setdefault(case["op"], {"cases": 0, "largest_ratio": {}})
        entry["cases"] += 1
        for output in case["outputs"]:
            for kernels, measured in output["gpu"].items():
                if (ratio := measured["ratio"]) is not None:
                    entry["largest_ratio"][kernels] = max(ratio, entry["largest_ratio"].get(kernels, 0.0))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=pathlib.Path)
    parser.add_argument("sanitize", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args()
    report = json.loads((options.tests / "gpu_ops.json").read_text(encoding="utf-8"))
    result = {"tool": "gpu_test_results", "gpu_and_driver": report["gpu"], "commit": commit(),
              "allowed_ratio": report["allowed_ratio"], "ops": ops(report),
              "tests": closing_lines(options.tests), "sanitizer": closing_lines(options.sanitize)}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
