"""Turns pytest-benchmark's JSON into bench/results/<machine>.json, a table, a plot and README.md's table."""

import argparse
import itertools
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
MODES = {"fwd": "forward", "bwd": "backward", "fwd_bwd": "forward + backward", "step": "training step"}
DTYPES = {"float32": "", "bfloat16": "bf16", "float16": "fp16"}
ENVIRONMENTS = {
    "avx512_no_bf16": "oneDNN held to plain AVX-512",
    "avx2": "all held to AVX2",
    "chunked": "against PyTorch's chunks",
}
BUSY = 0.1  # CPUs that others may use before a result is called disturbed
EAGER, HUGE = "#4477aa", "#ee6677"
CURVES = {"eager": ("PyTorch", EAGER), "chunked": ("PyTorch's chunks", HUGE), "regfast": ("regfast", "#228833")}


@dataclass
class Row:
    label: str
    regfast: float  # seconds
    eager: float
    vs_eager: float  # how many times longer the other takes
    headline: bool
    vs_huge_pages: float | None = None
    vs_compile: float | None = None
    vs_jax: float | None = None
    share: float | None = None
    bound: str = ""


def compact(raw: dict) -> dict:
    """The machine and each case's stored facts, without the raw samples and without the host's name."""
    cases = [entry["extra_info"] for entry in raw["benchmarks"]]
    return {"machine": raw["machine_info"]["regfast"], "date": raw["datetime"][:10], "cases": rounded(cases)}


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def describe(case: dict) -> str:
    shape = " x ".join(map(str, case["shape"]))
    extra = [case["label"], DTYPES[case["dtype"]], "cold caches" if case["cold"] else ""]
    return ", ".join([f"{case['op']} {shape}", MODES[case["mode"]], *filter(None, extra)])


def rows(result: dict) -> list[Row]:
    """One row per case, and one more for each environment that stands for another CPU."""
    found = []
    for case in result["cases"]:
        if case.get("grid"):
            continue
        label, headline, others = describe(case), case["headline"], case["environments"]
        times, ratio = case["median_s"], case["ratio"]
        row = Row(label, times["regfast"], times["eager"], ratio["eager"], headline)
        if "huge_pages" in others:
            row.vs_huge_pages = others["huge_pages"]["ratio"]["eager"]
        row.vs_compile, row.vs_jax = ratio.get("compile"), ratio.get("jax")
        row.share, row.bound = case.get("share"), case.get("bound", "")
        found.append(row)
        for name, text in ENVIRONMENTS.items():
            if name in others:
                times, ratio = others[name]["median_s"], others[name]["ratio"]
                other = "chunked" if name == "chunked" else "eager"
                found.append(Row(f"{label}; {text}", times["regfast"], times[other], ratio[other], headline))
    return found


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def share(row: Row) -> str:
    return f"{row.share:.0%} of {row.bound}" if row.share and row.share >= 0.01 else ""


def cells(row: Row) -> list[str]:
    ratio = [row.vs_eager, row.vs_huge_pages, row.vs_compile, row.vs_jax]
    return [row.label, duration(row.regfast), duration(row.eager), *map(times, ratio), share(row)]


HEADER = ["case", "regfast", "PyTorch", "eager", "huge pages", "compile", "JAX", "ceiling"]


def machine_line(result: dict) -> str:
    machine = result["machine"]
    memory = machine["bandwidth_gb_s"][-1]
    peak = machine["fma_gflop_s"]
    return (
        f"{machine['cpu']}, {machine['threads']} threads, regfast on {machine['isa']}, torch {machine['torch']}, "
        f"transparent huge pages: {machine['huge_pages']}; measured: memory read {memory['read']:.0f} and copy "
        f"{memory['copy']:.0f} GB/s, float32 FMA {peak['all']:.0f} GFLOP/s"
    )


def memory_lines(result: dict) -> list[str]:
    found = []
    for case in result["cases"]:
        if "extra_memory" in case:
            used = case["extra_memory"]
            found.append(
                f"{describe(case)}: extra memory in buffers of the logits' size: PyTorch {used['eager']:.2f}, "
                f"regfast {used['regfast']:.2f}, regfast in place {used['in_place']:.2f}"
            )
        if "peak_bytes" in case:
            used = ", ".join(f"{CURVES[name][0]} {size / 2**20:.0f}" for name, size in case["peak_bytes"].items())
            found.append(f"{describe(case)}: peak memory in MiB over inputs and gradients: {used}")
    return found


def print_table(result: dict, console: Console) -> None:
    table = Table(title=machine_line(result), title_justify="left")
    for name in HEADER:
        table.add_column(name, justify="left" if name in ("case", "ceiling") else "right", no_wrap=name != "case")
    for row in rows(result):
        style = "red" if row.vs_eager < 0.95 else "green" if row.vs_eager > 1.05 else ""
        table.add_row(*cells(row), style=style)
    console.print(table)
    if grids(result):
        print_grids(result, console)
    for line in memory_lines(result):
        console.print(line)
    found = disturbed(result)
    if found:
        console.print(
            f"[bold]Not quiet[/]: others used more than {BUSY} CPUs during {len(found)} measurements. Where no CPU is "
            "free, a parallel region waits for milliseconds: measure these again on a quiet machine."
        )
        console.print("Disturbed: " + "; ".join(found))


def print_grids(result: dict, console: Console) -> None:
    for grid in grids(result):
        console.print(f"{grid.title}: geometric mean {grid.geometric_mean():.2f}x")
        for (n, d, v), ratio in sorted(grid.ratio.items(), key=lambda item: item[1]):
            console.print(f"    {n:5} x {d:5} -> {v:6}  {ratio:6.2f}x  {grid.share[n, d, v]:.0%} of the FMA peak")


def disturbed(result: dict) -> list[str]:
    """The measurements during which other processes took CPU time away."""
    found = [describe(case) for case in result["cases"] if case["others_cpus"] > BUSY]
    if result["machine"]["others_cpus"] > BUSY:
        found.insert(0, "the ceilings themselves (so every share is too high)")
    return found


def markdown(result: dict, picture: Path) -> str:
    """README.md's part: the headline cases, how to read them, the picture of all cases."""
    lines = [
        f"Measured on {machine_line(result)} ({result['date']}).",
        "",
        "Times are medians. The four ratios say how many times longer the others take, measured interleaved with",
        "regfast: PyTorch eager; PyTorch eager against regfast in a process with PyTorch's huge pages on",
        "(`THP_MEM_ALLOC_ENABLE=1`; blank where no tensor reaches 2 MiB); `torch.compile`; JAX compiled for the CPU.",
        "The last column is the share of the measured bandwidth or FMA ceiling that regfast reaches.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---" * len(HEADER) + "|",
    ]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows(result) if row.headline]
    lines += ["", *(f"{line}." for line in memory_lines(result)), ""]
    if disturbed(result):
        lines += [f"The machine was not quiet during {len(disturbed(result))} of the measurements.", ""]
    lines += [f"![How many times longer PyTorch takes than regfast, case by case]({picture.with_suffix('.png')})", ""]
    if grids(result):
        lines += [*grid_lines(result), ""]
        lines += [f"![Ratios over the grid of linear layers]({with_ending(picture, 'grid')})", ""]
    if vocabularies(result):
        link = with_ending(picture, "vocabulary")
        lines += [f"![Time and memory of linear_cross_entropy over the number of classes]({link})", ""]
    lines.append(f"![Every kernel under this machine's roof]({with_ending(picture, 'roofline')})")
    return "\n".join(lines)


def with_ending(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.stem}-{ending}.png")


@dataclass
class Grid:
    """One heat map: how many times longer `other` takes, by rows and layer."""

    title: str
    ratio: dict[tuple[int, int, int], float]  # (N, D, V)
    share: dict[tuple[int, int, int], float]  # of the float32 FMA peak

    def geometric_mean(self) -> float:
        return statistics.geometric_mean(self.ratio.values())


def grids(result: dict) -> list[Grid]:
    peak = result["machine"]["fma_gflop_s"]["all"] * 1e9
    found: dict[str, Grid] = {}
    for case in result["cases"]:
        if not case.get("grid"):
            continue
        kind = ", ".join(filter(None, [MODES[case["mode"]], case["label"], DTYPES[case["dtype"]] or "float32"]))
        others = {"PyTorch": case}
        if "openblas" in case["environments"]:
            others["NumPy's OpenBLAS"] = case["environments"]["openblas"]
        for other, timing in others.items():
            grid = found.setdefault(f"{kind}, against {other}", Grid(f"{kind}, against {other}", {}, {}))
            shape = tuple(case["shape"])
            grid.ratio[shape] = timing["ratio"]["eager" if other == "PyTorch" else "numpy"]
            grid.share[shape] = case["flops"] / timing["median_s"]["regfast"] / peak
    return list(found.values())


def grid_lines(result: dict) -> list[str]:
    lines = ["| the grid of linear layers below | geometric mean | least | share of the FMA peak, median and most |"]
    lines.append("|---" * 4 + "|")
    for grid in grids(result):
        share = statistics.median(grid.share.values()), max(grid.share.values())
        cells = [times(grid.geometric_mean()), times(min(grid.ratio.values())), f"{share[0]:.0%}, {share[1]:.0%}"]
        lines.append("| " + " | ".join([grid.title, *cells]) + " |")
    return lines


def draw_grids(result: dict, path: Path) -> None:
    """A heat map for each kind of call: red where regfast is slower, blue where it is faster."""
    found = grids(result)
    columns = 2
    down = -(-len(found) // columns)
    figure, every = plt.subplots(down, columns, figsize=(13, 2.9 * down), layout="constrained", squeeze=False)
    for axes in every.flat[len(found) :]:
        axes.axis("off")
    for axes, grid in zip(every.flat, found, strict=False):
        rows = sorted({n for n, _, _ in grid.ratio})
        layers = list(dict.fromkeys((d, v) for _, d, v in grid.ratio))
        values = [[math.log2(grid.ratio.get((n, *layer), math.nan)) for layer in layers] for n in rows]
        axes.imshow(values, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")  # from half the speed to twice
        for y, n in enumerate(rows):
            for x, layer in enumerate(layers):
                if (n, *layer) in grid.ratio:
                    ratio, share = grid.ratio[n, *layer], grid.share[n, *layer]
                    color = "white" if abs(math.log2(ratio)) > 0.7 else "black"
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
        kind = ", ".join(filter(None, [case["op"], MODES[case["mode"]], DTYPES[case["dtype"]]]))
        groups.setdefault(kind, []).append((case["flops"] / moved, case["flops"] / case["median_s"]["regfast"] / 1e9))
    span = [x for points in groups.values() for x, _ in points]
    low, high = min(span) / 2, max(span) * 2
    for level, rate in rates.items():
        ridge = peak / rate
        axes.plot([low, ridge], [low * rate, peak], color="grey", linewidth=1)
        axes.text(low * 1.05, low * rate * 1.15, f"{level}, {rate:.0f} GB/s", fontsize=7, color="grey")
    axes.plot([peak / max(rates.values()), high], [peak, peak], color="black", linewidth=1)
    axes.text(high, peak * 1.05, f"float32 FMA, {peak:.0f} GFLOP/s", fontsize=7, ha="right")
    for marker, (kind, points) in zip(itertools.cycle("osD^v<>Pp*X"), groups.items(), strict=False):
        axes.scatter(*zip(*points, strict=True), marker=marker, s=24, alpha=0.7, label=kind)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel("FLOPs per byte that must be moved")
    axes.set_ylabel("GFLOP/s")
    axes.legend(fontsize=7, loc="lower right")
    axes.set_title(f"regfast on {machine['cpu']}, {machine['threads']} threads, {machine['isa']}", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def vocabularies(result: dict) -> dict[int, dict]:
    """The cases of the curves over V, by V."""
    return {case["shape"][2]: case for case in result["cases"] if "peak_bytes" in case}


def draw_vocabularies(result: dict, path: Path) -> None:
    """Time and peak memory of the linear layer with its cross-entropy over the number of classes."""
    machine, cases = result["machine"], vocabularies(result)
    n, d, _ = next(iter(cases.values()))["shape"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name, (label, color) in CURVES.items():
        seconds = {}
        for v, case in cases.items():
            found = case["environments"].get("chunked", {"median_s": {}}) if name == "chunked" else case
            if name in found["median_s"]:
                seconds[v] = found["median_s"][name]
        mib = {v: case["peak_bytes"][name] / 2**20 for v, case in cases.items() if name in case["peak_bytes"]}
        for axes, values in ((left, seconds), (right, mib)):
            axes.plot(list(values), list(values.values()), marker="o", color=color, label=label)
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


def draw(result: dict, path: Path) -> None:
    """Horizontal bars of time(PyTorch) / time(regfast) on a log scale, against both baselines."""
    found = rows(result)[::-1]
    figure, axes = plt.subplots(figsize=(12, 1.6 + 0.3 * len(found)), layout="constrained")
    for y, row in enumerate(found):
        bars = [(row.vs_eager, EAGER)] + ([(row.vs_huge_pages, HUGE)] if row.vs_huge_pages else [])
        height = 0.8 / len(bars)
        for i, (ratio, color) in enumerate(bars):
            at = y + 0.4 - height * (i + 0.5)
            axes.barh(at, ratio - 1, height, left=1, color=color)  # from 1, so that slower points to the left
            text = f" {ratio:.2f}x " if ratio < 10 else f" {ratio:.1f}x "
            axes.text(ratio, at, text, va="center", ha="left" if ratio >= 1 else "right", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    low = min(min(row.vs_eager, row.vs_huge_pages or row.vs_eager) for row in found)
    high = max(max(row.vs_eager, row.vs_huge_pages or row.vs_eager) for row in found)
    axes.set_xlim(min(0.7, low * 0.75), max(2, high * 1.5))
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(found)), [row.label for row in found], fontsize=8)
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("time of PyTorch / time of regfast (right of 1: regfast is faster)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (EAGER, HUGE)]
    names = ["PyTorch eager", "PyTorch eager with huge pages"]
    machine = result["machine"]
    figure.suptitle(f"regfast on {machine['cpu']}, {machine['threads']} threads, {machine['isa']}", fontsize=11)
    figure.legend(handles, names, loc="outside upper right", fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def rewrite(readme: Path, text: str) -> None:
    """Replaces what stands between the two markers."""
    old = readme.read_text()
    if BEGIN not in old or END not in old:
        raise SystemExit(f"{readme}: the markers {BEGIN} and {END} are missing")
    head, rest = old.split(BEGIN, 1)
    readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("raw", type=Path, help="the file of pytest --benchmark-json")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON and the picture")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md", help="file whose table is rewritten")
    parser.add_argument("--no-readme", action="store_true", help="leave README.md as it is")
    parser.add_argument("--table-only", action="store_true", help="print the table, write nothing")
    args = parser.parse_args()
    result = compact(json.loads(args.raw.read_text()))
    console = Console()
    console.width = max(console.width, 150)  # the table needs it, in a pipe too
    print_table(result, console)
    if args.table_only or result["machine"]["quick"]:
        console.print("Nothing was written" + ("." if args.table_only else ": a quick run is no result."))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{result['machine']['slug']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, path.with_suffix(".png"))
    if grids(result):
        draw_grids(result, with_ending(path, "grid"))
    if vocabularies(result):
        draw_vocabularies(result, with_ending(path, "vocabulary"))
    draw_roofline(result, with_ending(path, "roofline"))
    console.print(f"Wrote {path.name} and its pictures in {args.out.name}/")
    if not args.no_readme:
        root = args.readme.resolve().parent
        picture = path.resolve()
        link = picture.relative_to(root) if picture.is_relative_to(root) else Path(picture.name)
        rewrite(args.readme, markdown(result, link))
        console.print(f"Rewrote the table in {args.readme.name}")


if __name__ == "__main__":
    main()
