"""Turns pytest-benchmark's JSON into bench/results/<machine>.json, its pictures and the table of docs/benchmarks.md."""

import argparse
import json
import os
import statistics
from pathlib import Path

import plots
from facts import BUSY, Row, combined, compact, disturbed, further_facts, grids, machine_line, rows, vocabularies
from rich.console import Console
from rich.table import Table

from regfast.cli.table import duration

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
HEADER = ["case", "regfast", "PyTorch", "eager", "huge pages", "chunks", "compile", "JAX", "ceiling"]


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def share(row: Row) -> str:
    return f"{row.share:.0%} of {row.bound}" if row.share and row.share >= 0.01 else ""


def cells(row: Row) -> list[str]:
    ratio = [row.vs_eager, row.vs_huge_pages, row.vs_chunked, row.vs_compile, row.vs_jax]
    return [row.label, duration(row.regfast), duration(row.eager), *map(times, ratio), share(row)]


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
    for line in further_facts(result):
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


def grid_lines(result: dict) -> list[str]:
    lines = ["| the grid of linear layers below | geometric mean | least | share of the FMA peak, median and most |"]
    lines.append("|---" * 4 + "|")
    for grid in grids(result):
        share = statistics.median(grid.share.values()), max(grid.share.values())
        cells = [times(grid.geometric_mean()), times(min(grid.ratio.values())), f"{share[0]:.0%}, {share[1]:.0%}"]
        lines.append("| " + " | ".join([grid.title, *cells]) + " |")
    return lines


def markdown(result: dict, picture: Path) -> str:
    """The page's part: the headline cases, how to read them, the picture of all cases."""
    lines = [
        f"Measured on {machine_line(result)} ({result['date']}).",
        "",
        "Times are medians. The five ratios say how many times longer the others take, measured interleaved with",
        "regfast: PyTorch eager; PyTorch eager against regfast in a process with PyTorch's huge pages on",
        "(`THP_MEM_ALLOC_ENABLE=1`; blank where no tensor reaches 2 MiB); PyTorch's chunked `linear_cross_entropy`;",
        "`torch.compile`; JAX compiled for the CPU.",
        "The last column is the share of the measured bandwidth or FMA ceiling that regfast reaches.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---" * len(HEADER) + "|",
    ]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows(result) if row.headline]
    lines += ["", *(f"{line}." for line in further_facts(result)), ""]
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


def rewrite(page: Path, text: str) -> None:
    """Replaces what stands between the two markers."""
    old = page.read_text()
    if BEGIN not in old or END not in old:
        raise SystemExit(f"{page}: the markers {BEGIN} and {END} are missing")
    head, rest = old.split(BEGIN, 1)
    page.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}")


def draw(result: dict, path: Path) -> None:
    """The pictures beside a result's file, of what it has."""
    if rows(result):
        plots.draw_cases(result, path.with_suffix(".png"))
    if grids(result):
        plots.draw_grids(result, with_ending(path, "grid"))
    if vocabularies(result):
        plots.draw_vocabularies(result, with_ending(path, "vocabulary"))
    plots.draw_roofline(result, with_ending(path, "roofline"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("raw", type=Path, nargs="*", help="files of pytest --benchmark-json, of one machine")
    parser.add_argument(
        "--redraw", action="store_true", help="draw the pictures of all results again, and nothing else"
    )
    parser.add_argument("--keep", action="store_true", help="keep the cases of the result that was there before")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON and the picture")
    page = HERE.parent / "docs" / "benchmarks.md"
    parser.add_argument("--page", type=Path, default=page, help="file whose table is rewritten")
    parser.add_argument("--no-page", action="store_true", help="leave that file as it is")
    parser.add_argument("--table-only", action="store_true", help="print the table, write nothing")
    args = parser.parse_args()
    if args.redraw:
        for path in sorted(args.out.glob("*.json")):
            draw(json.loads(path.read_text()), path)
        return
    if not args.raw:
        parser.error("expected files of pytest --benchmark-json, or --redraw")
    parts = [compact(json.loads(raw.read_text())) for raw in args.raw]
    path = args.out / f"{parts[-1]['machine']['slug']}.json"
    if args.keep:
        parts.insert(0, json.loads(path.read_text()))
    result = combined(parts)
    console = Console()
    console.width = max(console.width, 150)  # the table needs it, in a pipe too
    print_table(result, console)
    if args.table_only or result["machine"]["quick"]:
        console.print("Nothing was written" + ("." if args.table_only else ": a quick run is no result."))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, path)
    console.print(f"Wrote {path.name} and its pictures in {args.out.name}/")
    if not args.no_page:
        link = Path(os.path.relpath(path, args.page.parent))
        rewrite(args.page, markdown(result, link))
        console.print(f"Rewrote the table in {args.page.name}")


if __name__ == "__main__":
    main()
