"""Tables of docs/memory.md. Only the standard library is needed."""

import statistics

from report_results import PHASES, clip_name, gpu, measured_with, phases, seconds_of, table


def memory_runs(results):
    """Every run of tools/gpu_memory.py that was not on a slowed bus, with the run without a limit before it."""
    for report in results.memory:
        first = report["runs"][0]
        for run in report["runs"]:
            if run["link"] is None and "failed" not in run:
                yield first["report"], run


def with_limits_of_host(head, rows, at):
    """A table with the columns of the host's limit and of the scratch file from column `at` on, if any row says something in them."""
    cells = ["host limit", "scratch file"]
    if any(row[at] != "none" for row in rows):
        return table([*head[:at], *cells, *head[at:]], rows)
    return table(head, [row[:at] + row[at + len(cells):] for row in rows])


def host_cells(limit, scratch):
    """The host's limit in bytes or None, and the bytes of the scratch file."""
    return [f"{limit / 2**30:g}G" if limit else "none", f"{scratch / 2**30:.1f} GiB"]


def memory(results, shortest=0):
    """What limits cost, seen from outside, in clips of so many seconds or more."""
    rows = []
    for first, run in memory_runs(results):
        if seconds_of(first) < shortest:
            continue
        found, full = phases(run["report"]), phases(first)
        whole = {name: phase["seconds"] + phase["loading"] for name, phase in found.items()}
        host = max(phase["host_memory"] for phase in found.values()) / 2**30
        # Older files know neither a limit of the host nor a scratch file.
        scratch = max(phase.get("scratch", 0) for phase in found.values())
        rows.append([clip_name(first), run["limit"] or "none", *host_cells(run["report"].get("max_host"), scratch),
                     f"{run['peak_device_mib'] / 1024:.2f} GiB", f"{host:.1f} GiB",
                     f"{found['sampling']['seconds']:.1f} s", f"{found['decoding']['seconds']:.1f} s",
                     f"{sum(p['seconds'] for p in found.values()) / sum(p['seconds'] for p in full.values()):.2f}×",
                     f"{sum(whole.values()):.1f} s"])
    same = all(report["same_bits"] for report in results.memory)
    with_what = sorted({measured_with(first) for first, _ in memory_runs(results)})
    return [f"`--max-vram` on one {'; '.join(with_what)}. GPU memory is what nvidia-smi showed at most, driver and context "
            f"included; host memory is that of the process without mapped files, pinned memory included. All limits of a clip "
            f"{'gave the same bits' if same else 'DID NOT GIVE THE SAME BITS'}:", "",
            *with_limits_of_host(["clip", "limit", "GPU memory", "host memory", "transformer", "VAE decode",
                                  "time against no limit", "with loading"], rows, 2)]


def memory_links(results):
    """What was predicted for slowed buses, and what was measured."""
    rows = []
    for report in results.memory:
        for run in report["runs"]:
            if run.get("predicted") is None:
                continue
            found = phases(run["report"])
            for plan in run["predicted"]:
                name, guess = plan["name"], plan["predicted"]["seconds"]
                if name != "text":
                    cells = host_cells(run["report"].get("max_host"), found[name].get("scratch", 0))
                    rows.append([clip_name(run["report"]), run["limit"], *cells, f"{run['link'] or 'as it is'}", PHASES[name],
                                 f"{found[name]['seconds']:.2f} s", f"{guess:.2f} s",
                                 f"{guess / found[name]['seconds'] - 1:+.0%}"])
    return [*with_limits_of_host(["clip", "limit", "bus, GB/s each way", "phase", "measured", "predicted", "off by"], rows, 2), "",
            "Rows with a scratch file are predicted for a disk of 2 GB/s; the file cache of the machine, which had room for all of it, was faster."]


def cards(results):
    """What `pyraflow plan` predicts for cards that nobody measured."""
    rows = []
    for card in results.plans["cards"]:
        found = {phase["name"]: phase["predicted"] for phase in card["phases"]}
        pinned = max(phase["pinned_bytes"] for phase in card["phases"]) / 2**30
        scratch = max(phase.get("scratch_bytes", 0) for phase in card["phases"])
        host = float(card["max_host"].removesuffix("G")) * 2**30 if card.get("max_host") else None
        whole, resident = (sum(p[key] for p in found.values()) for key in ("seconds", "resident_seconds"))
        rows.append([f"{card['model']}, 5 s", card["card"], card["limit"], *host_cells(host, scratch), f"{card['link']}, {card['tflops']}, {card['bandwidth']}",
                     f"{found['sampling']['seconds']:.0f} s", f"{found['decoding']['seconds']:.0f} s", f"{pinned:.1f} GiB",
                     f"{whole / resident:.2f}×"])
    head = ["clip", "card", "limit", "GB/s of the bus, TFLOP/s, GB/s of memory", "transformer", "VAE decode", "pinned host memory",
            "time against no limit"]
    disks = sorted({f"{card['disk']:g}" for card in results.plans["cards"] if card.get("max_host")})
    return [*with_limits_of_host(head, rows, 3), *(["", f"The scratch file is on a disk of {' or '.join(disks)} GB/s each way."] if disks else [])]


def units_cell(phase):
    """The most that is in use after any unit of a phase, and how much less it is after another."""
    used = phase.get("memory_of_units")
    return f"{max(used) / 2**30:.2f} GiB, {(max(used) - min(used)) / 2**20:.0f} MiB" if used else ""


def soak(results):
    """Memory from unit to unit and from clip to clip."""
    rows = []
    for first, run in memory_runs(results):
        if first["units"] > 8:
            found = phases(run["report"])
            scratch = max(phase.get("scratch", 0) for phase in found.values())
            rows.append([clip_name(first), run["limit"] or "none", *host_cells(run["report"].get("max_host"), scratch), str(first["units"]),
                         *(units_cell(found[name]) for name in ("sampling", "decoding"))])
    lines = with_limits_of_host(["clip", "limit", "units", "transformer: most, variation", "VAE decode: most, variation"], rows, 2)
    for report in results.soaks:
        clips = report["memory_after_clips"]
        free, host = ([clip[name] / 2**20 for clip in clips] for name in ("device_free", "host_anonymous"))
        lines += ["", f"{len(clips)} clips of {report['width']}x{report['height']} in one process within "
                  f"{report['max_vram'] / 2**30:.0f} GiB ({measured_with(report)}): between clips the GPU memory in use varies by "
                  f"{max(free) - min(free):.0f} MiB, that of the host is {host[1]:.0f} MiB after the second and "
                  f"{host[-1]:.0f} MiB after the last."]
    return lines


def startup(results):
    """Seconds from the command line to the first kernel."""
    lines = []
    for report in results.startups:
        waits = [run["start_to_first_kernel"] for run in report["runs"]]
        lines.append(f"From the start of the program to the first kernel: {statistics.median(waits):.2f} s, "
                     f"{max(waits):.2f} s at most of {len(waits)}, with a checkpoint folder of {report['checkpoint_bytes'] / 1e9:.1f} GB, converted "
                     f"weights included, in the system's file cache ({measured_with(report)}).")
    return lines
