"""The pictures of a result: bars of all cases, heat maps of the linear layers, a roofline, curves over V."""

import itertools
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from facts import DTYPES, MODES, PROVIDERS, grids, rows, vocabularies

EAGER, HUGE, CHUNKED, OURS = "#4477aa", "#ee6677", "#ccbb44", "#228833"
BASELINES = {
    "vs_eager": ("PyTorch eager", EAGER),
    "vs_huge_pages": ("PyTorch eager with huge pages", HUGE),
    "vs_chunked": ("PyTorch's chunked operator", CHUNKED),
}
COLORS = {"eager": EAGER, "chunked": CHUNKED, "regfast": OURS}


def draw_grids(result: dict, path: Path) -> None:
    """A heat map for each kind of call: red where regfast is slower, blue where it is faster."""
    found = grids(result)
    places = [[i, min(i + 1, len(found) - 1)] for i in range(0, len(found), 2)]  # the last of an odd number is wide
    figure, every = plt.subplot_mosaic(places, figsize=(13, 2.9 * len(places)), layout="constrained")
    for i, grid in enumerate(found):
        axes = every[i]
        rows = sorted({n for n, _, _ in grid.ratio})
        layers = list(dict.fromkeys((d, v) for _, d, v in grid.ratio))
        values = [[math.log2(grid.ratio.get((n, *layer), math.nan)) for layer in layers] for n in rows]
        # From half the speed to twice at least, white where both are level.
        most = max(1.0, *(abs(math.log2(ratio)) for ratio in grid.ratio.values()))
        axes.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
        for y, n in enumerate(rows):
            for x, layer in enumerate(layers):
                if (n, *layer) in grid.ratio:
                    ratio, share = grid.ratio[n, *layer], grid.share[n, *layer]
                    color = "white" if abs(math.log2(ratio)) > 0.7 * most else "black"
                    axes.text(x, y, f"{ratio:.2f}x\n{share:.0%}", ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(range(len(layers)), [f"{d} to {v}" for d, v in layers], fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.set_title(f"{grid.title}: geometric mean {grid.geometric_mean():.2f}x", fontsize=9)
        axes.set_ylabel("rows", fontsize=8)
    figure.suptitle("How many times longer the other takes, and regfast's share of the float32 FMA peak", fontsize=11)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_roofline(result: dict, path: Path) -> None:
    """GFLOP/s of each case over its FLOPs per byte, under the measured bandwidths and FMA peak."""
    machine = result["machine"]
    peak, rates = machine["fma_gflop_s"]["all"], {row["level"]: row["read"] for row in machine["bandwidth_gb_s"]}
    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    groups: dict[str, list[tuple[float, float]]] = {}
    for case in result["cases"]:
        moved = case["bytes_read"] + case["bytes_written"]
        if not case["flops"] or not moved:
            continue
        at = case["flops"] / moved, case["flops"] / case["median_s"]["regfast"] / 1e9
        if at[1] < min(peak, at[0] * min(rates.values())) / 100:  # what a call costs, not what a kernel does
            continue
        kind = ", ".join(filter(None, [case["op"], MODES[case["mode"]], DTYPES[case["dtype"]]]))
        groups.setdefault(kind, []).append(at)
    span = [x for points in groups.values() for x, _ in points]
    low, high = min(span) / 2, max(span) * 2
    for (level, rate), style in zip(rates.items(), (":", "--", "-"), strict=False):
        ends = [low, peak / rate], [low * rate, peak]
        axes.plot(*ends, color="grey", linewidth=1, linestyle=style, label=f"{level}, {rate:.0f} GB/s")
    roof = [peak / max(rates.values()), high], [peak, peak]
    axes.plot(*roof, color="black", linewidth=1, label=f"float32 FMA, {peak:.0f} GFLOP/s")
    for marker, (kind, points) in zip(itertools.cycle("osD^v<>Pp*X"), groups.items(), strict=False):
        axes.scatter(*zip(*points, strict=True), marker=marker, s=24, alpha=0.7, label=kind)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel("FLOPs per byte that must be moved")
    axes.set_ylabel("GFLOP/s")
    figure.legend(fontsize=7, loc="outside right upper")
    axes.set_title(f"regfast on {machine['cpu']}, {machine['threads']} threads, {machine['isa']}", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_vocabularies(result: dict, path: Path) -> None:
    """Time and peak memory of the linear layer with its cross-entropy over the number of classes."""
    machine, cases = result["machine"], vocabularies(result)
    n, d, _ = next(iter(cases.values()))["shape"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name, color in COLORS.items():
        seconds = {v: case["median_s"][name] for v, case in cases.items() if name in case["median_s"]}
        mib = {v: case["peak_bytes"][name] / 2**20 for v, case in cases.items() if name in case["peak_bytes"]}
        for axes, values in ((left, seconds), (right, mib)):
            axes.plot(list(values), list(values.values()), marker="o", color=color, label=PROVIDERS[name])
    left.set_ylabel("seconds, forward + backward")
    right.set_ylabel("MiB at most, over inputs and gradients")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(list(cases), list(cases))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_xlabel("classes V")
        axes.legend(fontsize=8)
    figure.suptitle(
        f"linear_cross_entropy of {n} x {d} in float32 on {machine['cpu']}, {machine['threads']} threads", fontsize=11
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_cases(result: dict, path: Path) -> None:
    """Horizontal bars of time(PyTorch) / time(regfast) on a log scale, for each way in which PyTorch can do it."""
    found = rows(result)[::-1]
    figure, axes = plt.subplots(figsize=(12, 1.6 + 0.3 * len(found)), layout="constrained")
    for y, row in enumerate(found):
        bars = [(getattr(row, field), color) for field, (_, color) in BASELINES.items() if getattr(row, field)]
        height = 0.8 / len(bars)
        for i, (ratio, color) in enumerate(bars):
            at = y + 0.4 - height * (i + 0.5)
            axes.barh(at, ratio - 1, height, left=1, color=color)  # from 1, so that slower points to the left
            text = f" {ratio:.2f}x " if ratio < 10 else f" {ratio:.1f}x "
            axes.text(ratio, at, text, va="center", ha="left" if ratio >= 1 else "right", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    ratios = [getattr(row, field) for row in found for field in BASELINES if getattr(row, field)]
    low, high = min(ratios), max(ratios)
    axes.set_xlim(min(0.7, low * 0.75), max(2, high * 1.5))
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(found)), [row.label for row in found], fontsize=8)
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("time of PyTorch / time of regfast (right of 1: regfast is faster)")
    shown = [style for field, style in BASELINES.items() if any(getattr(row, field) for row in found)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=color, label=name) for name, color in shown]
    machine = result["machine"]
    title = f"regfast on {machine['cpu']}, {machine['threads']} threads, {machine['isa']}"
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    figure.legend(handles=handles, loc="outside upper right", fontsize=8, ncols=len(handles))
    figure.savefig(path, dpi=110)
    plt.close(figure)
