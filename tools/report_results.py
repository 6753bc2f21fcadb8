"""The files in benches/results, and what every table says of them. Only the standard library is needed."""

import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "benches/results", ROOT / "docs/images"

PHASES = {"text": "text", "sampling": "transformer", "decoding": "VAE decode"}


def read(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def read_all(pattern):
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(pattern))]


def table(head, rows):
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]


def seconds_of(report):
    """Length of a clip: 8 frames to a latent, the first one alone, 24 a second."""
    return round((8 * (report["units"] - 1) + 1) / 24)


def key(report):
    """Sorts sd3 before miniflux, large before small, short before long; equal for the same clip."""
    return (report["family"] != "sd3", -report["height"], report["units"])


def clip_name(report):
    return f"{report['family']}-{report['variant']}, {seconds_of(report)} s"


def phases(report):
    return {phase["name"]: phase for phase in report["measured"]["phases"]}


def total(report):
    return sum(phase["seconds"] for phase in report["measured"]["phases"])


def gpu(report):
    """The name of a GPU without what stands behind it in the description of a backend."""
    return report["device"].split(" with ")[0]


def measured_with(report):
    return f"{report['device']}, driver {report['driver']}, commit {report['commit']}"


def torch_with(report):
    published = report.get("published") or {}
    code = "no published code" if not published else \
        f"published code {(published.get('commit') or 'sha256 ' + published['sources_sha256'])[:14]}"
    return (f"{report['device']}, driver {report['driver']}, PyTorch {report['torch']}, cuDNN {report['cudnn']}, "
            f"diffusers {report['diffusers']}, {code}, harness {report['commit']}, {report['date']}")


class Results:
    def __init__(self):
        self.clips = sorted(read_all("gpu-clip-*.json"), key=key)
        self.references = read_all("reference-*.json")
        self.ops, self.linear = read("gpu-ops.json"), read("gpu-linear-cublaslt.json")
        self.calls, self.plans = read("gpu-full-size.json"), read("plans.json")
        self.memory = sorted(read_all("gpu-memory-*.json"), key=lambda report: key(report["runs"][0]["report"]))
        self.tests = read("gpu-tests.json")
        self.soaks, self.startups = read_all("gpu-soak-*.json"), read_all("gpu-startup-*.json")

    def reference(self, clip, mode):
        """(what PyTorch took for the same clip on the same kind of GPU, the file it stands in)."""
        for report in self.references:
            for other in report["clips"]:
                same = all(other[k] == clip[k] for k in ("family", "variant", "width", "height", "units", "steps",
                                                         "video_steps"))
                if same and other["mode"] == mode and report["device"] == gpu(clip) and "sampling" in phases(other):
                    return other, report
        return None, None


def gib(size):
    return f"{size / 2**30:.1f}" if size else ""
