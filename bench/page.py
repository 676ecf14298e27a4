"""bench/results/*.json as one page that needs nothing else: choose machine, op and dtype; ratios, times, shares of the
ceiling, heat maps over shapes, the roofline, and accuracy beside speed where it was measured."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from facts import DTYPES, MODES, describe, grids, machine_line
from plotly.offline import get_plotlyjs

HERE = Path(__file__).resolve().parent
OTHERS = {"eager": "PyTorch", "compile": "torch.compile", "chunked": "PyTorch's chunks", "jax": "JAX", "numpy": "NumPy"}


def moved_bytes(case: dict) -> int:
    return case["bytes_read"] + case["bytes_written"]


def errors(case: dict) -> list[dict]:
    """Who was compared with float64, how far off it is, and the seconds that it takes."""
    providers = {"PyTorch": "eager", "PyTorch's": "chunked", "regfast": "regfast"}
    return [
        {"who": who, "error": error, "seconds": case["median_s"][providers[who.partition(" in ")[0]]]}
        for who, error in case.get("errors", {}).items()
    ]


def entry(case: dict) -> dict:
    """A case as the page has it: its name, what it is chosen by, times in seconds, ratios, its place under the roof."""
    seconds = case["median_s"]["regfast"]
    found = {
        "label": describe(case).removeprefix(f"{case['op']} "),
        "op": case["op"],
        "dtype": case["dtype"],
        "mode": MODES[case["mode"]],
        "shape": " x ".join(map(str, case["shape"])),
        "size": math.prod(case["shape"]),
        "seconds": {"regfast": seconds} | {OTHERS[k]: v for k, v in case["median_s"].items() if k in OTHERS},
        "ratio": {OTHERS[name]: ratio for name, ratio in case["ratio"].items() if name in OTHERS},
        "share": case.get("share"),
        "bound": case.get("bound", ""),
        "disturbed": case["others_cpus"],
        "errors": errors(case),
    }
    if case["flops"] and moved_bytes(case) and (case.get("share") or 0) >= 0.01:  # below it, what a call costs
        found["intensity"], found["gflops"] = case["flops"] / moved_bytes(case), case["flops"] / seconds / 1e9
    return found


def heat_maps(result: dict) -> list[dict]:
    """Each grid of linear layers: rows down, layers across, how many times longer the other takes."""
    found = []
    for grid in grids(result):
        rows = sorted({n for n, _, _ in grid.ratio})
        layers = sorted({(d, v) for _, d, v in grid.ratio})
        found.append(
            {
                "title": f"{grid.title}: geometric mean {grid.geometric_mean():.2f}x",
                "dtype": next((name for name, short in DTYPES.items() if short and short in grid.title), "float32"),
                "rows": [str(n) for n in rows],
                "layers": [f"{d} -> {v}" for d, v in layers],
                "ratio": [[grid.ratio.get((n, d, v)) for d, v in layers] for n in rows],
                "share": [[grid.share.get((n, d, v)) for d, v in layers] for n in rows],
            }
        )
    return found


def machine(result: dict) -> dict:
    """What one file of results gives to the page."""
    about = result["machine"]
    timed = [c for c in result["cases"] if "regfast" in c["median_s"] and "eager" in c["ratio"] and not c.get("grid")]
    return {
        "name": f"{about['cpu']}, {about['threads']} threads, {about['isa']} ({result['date']})",
        "about": f"{machine_line(result)}; measured on {result['date']}.",
        "peak": about["fma_gflop_s"]["all"],
        "roofs": [{"level": b["level"], "gb_s": b["read"]} for b in about["bandwidth_gb_s"]],
        "cases": [entry(case) for case in timed],
        "grids": heat_maps(result),
    }


def page(results: list[dict]) -> str:
    """The page: the template with the data and the library that draws, both inside."""
    data = json.dumps([machine(result) for result in results], separators=(",", ":")).replace("</", "<\\/")
    text = (HERE / "page.html").read_text()
    return text.replace("/*plotly*/", get_plotlyjs()).replace("/*data*/", data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="*", help="files of bench/results, by default all")
    parser.add_argument("--out", type=Path, default=HERE.parent / "build" / "docs" / "report.html")
    args = parser.parse_args()
    files = args.results or sorted((HERE / "results").glob("*.json"))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page([json.loads(file.read_text()) for file in files]))
    print(f"{len(files)} results, {args.out.stat().st_size / 2**20:.1f} MiB: {args.out}")


if __name__ == "__main__":
    main()
