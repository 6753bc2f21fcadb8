#!/usr/bin/env python3
"""Fits the times by which linear layers on Hopper get their tiles: HOPPER_TILES of src/exec/cuda/ops/linear.rs.

    cargo bench --bench ops -- linear --tile all --json FILE    on the GPU
    python tools/fit_tiles.py FILE...

A tile has three times in nanoseconds, [start, step, end]; what they mean is said by Tile in
src/exec/cuda/ops/hopper.rs, and `nanoseconds`, `cost` and `fits` there must agree with `nanoseconds`, `work` and `fits`
here. They are fitted by least squares to the relative errors of the model; of a product that several files hold, the median counts.
Printed are the times with their errors, and for each product which tile was fastest, which one is chosen with the
fitted times and with those that the program had, and what each choice loses. It fails if the program chose other tiles
than its times give here: then the models have come apart.
Only the standard library is needed.
"""

import argparse
import json
import math
import pathlib
import statistics
import sys
from collections import defaultdict

# Inner dimension of one step, Tile::DEPTH.
DEPTH = 64
TIMES = ("start", "step", "end")
# The time of the end is looked for in such steps of nanoseconds first.
COARSE = 50


def nanoseconds(tile, times, rounds, steps):
    """As Tile::nanoseconds: `rounds` tiles, one after another, of `steps` steps in all."""
    start, step, end = times
    main = steps * step
    return start + (max(main, rounds * end // 4) + end if tile["in_turn"] else main + rounds * end)


def work(tile, products, multiprocessors):
    """As `cheapest` and `launch_hopper`: tiles that a block takes one after another, and their steps."""
    counts = units(tile, products)
    rounds = math.ceil(sum(counts) / clusters(tile, multiprocessors))
    steps = [math.ceil(math.ceil(k / DEPTH) / tile["split"]) for _, _, k in products]
    every = sum(count * of for count, of in zip(counts, steps))
    return rounds, math.ceil(rounds * every / max(sum(counts), 1))


def units(tile, products):
    """Tiles, or pairs of tiles, of each product."""
    return [math.ceil(m / (tile["rows"] * tile["cluster"])) * math.ceil(n / tile["columns"]) for m, n, _ in products]


def clusters(tile, multiprocessors):
    return multiprocessors // (tile["cluster"] * tile["split"])


def fits(tile, products, multiprocessors):
    """As Tile::fits."""
    few = sum(units(tile, products)) <= clusters(tile, multiprocessors)
    suit = all(m <= 2 * tile["rows"] * tile["cluster"] and k >= tile["split"] * DEPTH for m, _, k in products)
    return tile["split"] == 1 or (few and suit)


def cost(tile, times, products, multiprocessors):
    return nanoseconds(tile, times, *work(tile, products, multiprocessors))


def errors(tile, times, samples):
    """Relative errors of the model for samples (rounds, steps, measured nanoseconds)."""
    return [nanoseconds(tile, times, rounds, steps) / measured - 1 for rounds, steps, measured in samples]


def squares(tile, times, samples):
    return sum(error * error for error in errors(tile, times, samples))


def line(points):
    """The a, b >= 0 of the least squares of (a + b·x - y) / weight, for points (x, y, weight)."""
    w, x, y, xx, xy = (sum(values) for values in zip(*(
        (1 / s**2, x / s**2, y / s**2, x * x / s**2, x * y / s**2) for x, y, s in points)))
    determinant = w * xx - x * x
    if determinant > 1e-12 * w * xx:
        a, b = (y * xx - x * xy) / determinant, (w * xy - x * y) / determinant
        if a >= 0 and b >= 0:
            return a, b
    # At an edge: the better of the two.
    edges = [(max(y / w, 0.0), 0.0), (0.0, max(xy / xx, 0.0) if xx else 0.0)]
    return min(edges, key=lambda edge: sum(((edge[0] + edge[1] * x - y) / s)**2 for x, y, s in points))


def with_end(tile, end, samples):
    """The best times whose end is `end`, in whole nanoseconds."""
    best, step = None, math.inf
    # Which samples are bound by their ends depends on the step.
    for _ in range(20):
        points = []
        for rounds, steps, measured in samples:
            if not tile["in_turn"]:
                points.append((steps, measured - rounds * end, measured))
            elif step == math.inf or steps * step >= rounds * end // 4:
                points.append((steps, measured - end, measured))
            else:
                points.append((0, measured - end - rounds * end // 4, measured))
        start, fitted = line(points)
        found = [(round(start), whole, end) for whole in (math.floor(fitted), math.ceil(fitted))]
        found += [(shifted(tile, times, samples), *times[1:]) for times in found]
        best = min([*found, *([best] if best else [])], key=lambda times: squares(tile, times, samples))
        if fitted == step:
            break
        step = fitted
    return best


def shifted(tile, times, samples):
    """The best start beside the given step and end."""
    without = [(nanoseconds(tile, (0, *times[1:]), *sample[:2]), sample[2]) for sample in samples]
    return max(0, round(sum((y - rest) / y**2 for rest, y in without) / sum(1 / y**2 for _, y in without)))


def fit(tile, samples):
    """The [start, step, end] in whole nanoseconds."""
    def best(ends):
        return min((with_end(tile, end, samples) for end in ends), key=lambda times: squares(tile, times, samples))

    most = math.ceil(min(measured for _, _, measured in samples))
    _, _, end = best(range(0, most + COARSE, COARSE))
    return list(best(range(max(0, end - COARSE), end + COARSE + 1)))


class Sweep:
    """What the files hold: tiles by the name of their kernel, products and seconds by the name of their case."""

    def __init__(self, paths, multiprocessors):
        self.tiles, self.multiprocessors, self.device = None, multiprocessors, None
        self.products, self.chosen = {}, {}
        seconds = defaultdict(lambda: defaultdict(list))
        for path in paths:
            file = json.loads(path.read_text(encoding="utf-8"))
            self.same("device", file["device"], path)
            if "tiles" not in file:
                sys.exit(f"fit_tiles: {path} was not measured with --tile")
            self.same("tiles", {tile["kernel"]: tile for tile in file["tiles"]}, path)
            if multiprocessors is None:
                self.same("multiprocessors", file.get("multiprocessors"), path)
            for row in file["results"]:
                # What no such kernel computed, or not in one launch, says nothing of tiles.
                if len(row["kernels"]) != 1 or row["kernels"][0] not in self.tiles:
                    continue
                case, kernel = row["case"], row["kernels"][0]
                self.products[case] = row["products"]
                seconds[case][kernel].append(row["median_seconds"])
                if row["tile"] is None:
                    self.chosen[case] = kernel
        if not self.multiprocessors:
            sys.exit("fit_tiles: the files do not tell how many multiprocessors there are: --multiprocessors N")
        self.measured = {case: {kernel: 1e9 * statistics.median(values) for kernel, values in of_case.items()}
                         for case, of_case in seconds.items()}

    def same(self, name, value, path):
        present = getattr(self, name)
        if present is not None and present != value:
            sys.exit(f"fit_tiles: {path} cannot be read with the files before it: it has another value of {name}")
        setattr(self, name, value)

    def samples(self, kernel):
        """Case -> rounds, steps and nanoseconds of every product measured in a tile."""
        tile, of = self.tiles[kernel], self.measured.items()
        return {case: (*work(tile, self.products[case], self.multiprocessors), times[kernel])
                for case, times in of if kernel in times}

    def choice(self, case, times):
        """The kernel that `cheapest` takes: the first of equals."""
        f32_out = self.tiles[next(iter(self.measured[case]))]["f32_out"]
        kernels = [kernel for kernel, tile in self.tiles.items()
                   if tile["f32_out"] == f32_out and fits(tile, self.products[case], self.multiprocessors)]
        return min(kernels, key=lambda kernel: cost(self.tiles[kernel], times[kernel], self.products[case],
                                                    self.multiprocessors))


def short(kernel):
    return kernel.removeprefix("gemm_sm90_")


def print_times(sweep, present):
    """Prints the fitted times of every kernel, and returns them."""
    fitted = {}
    print(f"{'tile':<16}{'fitted':<22}{'present':<22}{'products':>8}{'mean error':>12}{'worst':>8}")
    for kernel, tile in sweep.tiles.items():
        samples = sweep.samples(kernel)
        distinct = {sample[:2] for sample in samples.values()}
        if len(distinct) < 3:
            fitted[kernel] = present[kernel]
            print(f"{short(kernel):<16}{'too few products':<22}{str(present[kernel]):<22}{len(samples):>8}")
            continue
        fitted[kernel] = times = fit(tile, list(samples.values()))
        sizes = dict(zip(samples, map(abs, errors(tile, times, samples.values()))))
        worst = max(sizes, key=sizes.get)
        print(f"{short(kernel):<16}{str(times):<22}{str(present[kernel]):<22}{len(samples):>8}"
              f"{statistics.mean(sizes.values()):>12.1%}{sizes[worst]:>8.1%}  {worst}")
        _, step, end = times
        if tile["in_turn"] and all(steps * step >= rounds * end // 4 for rounds, steps, _ in samples.values()):
            print(f"{'':<16}every product hides the ends of its tiles: only start + end is known")
    return fitted


def print_choices(sweep, present, fitted):
    print(f"\n{'fastest':<15}{'µs':>8}  {'fitted':<15}{'loses':>7}  {'present':<15}{'loses':>7}  product")
    losses = {"fitted": [], "present": []}
    for case, measured in sweep.measured.items():
        fastest = min(measured, key=measured.get)
        text = f"{short(fastest):<15}{measured[fastest] / 1e3:>8.2f}"
        for name, times in (("fitted", fitted), ("present", present)):
            kernel = sweep.choice(case, times)
            loss = measured[kernel] / measured[fastest] - 1 if kernel in measured else None
            text += f"  {short(kernel):<15}{'unknown' if loss is None else f'{loss:.1%}':>7}"
            if loss is not None:
                losses[name].append(loss)
        print(f"{text}  {case}")
    print()
    for name, values in losses.items():
        mean = math.exp(statistics.mean(map(math.log1p, values))) - 1
        print(f"{name} times: {len(values)} choices lose {mean:.2%} on average, {max(values):.1%} at worst")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--multiprocessors", type=int, metavar="N", help="instead of the number that the files tell")
    options = parser.parse_args()
    sweep = Sweep(options.files, options.multiprocessors)
    if not sweep.measured:
        sys.exit("fit_tiles: no product in these files was computed in a tile")
    present = {kernel: [tile[time] for time in TIMES] for kernel, tile in sweep.tiles.items()}
    print(f"{sweep.device}, {sweep.multiprocessors} multiprocessors\n")
    fitted = print_times(sweep, present)
    print_choices(sweep, present, fitted)
    others = [case for case, kernel in sweep.chosen.items() if sweep.choice(case, present) != kernel]
    if others:
        sys.exit("fit_tiles: the program chose another tile than its times give here, so that the models differ, for"
                 + "".join(f"\n  {case}" for case in others))
    print(f"the program chose as its times give here, {len(sweep.chosen)} products")


if __name__ == "__main__":
    main()
