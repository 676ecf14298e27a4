"""make sweep: random calls of every op beside PyTorch's; prints where ours are slower, worst first.

Each case of sweep_cases.py is timed forward and forward + backward. Both sides take turns in one process, short calls
in loops; the best round of each counts. Where ours seem slower, both are timed again some cases later, when what
disturbed them may have gone, and the best of all rounds counts. The exit status is 1 if a call is below LEAST.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import facts
import harness
import machine
import torch
from rich.console import Console
from rich.table import Table
from sweep_cases import CASES, EXPANDED, LARGEST, SHAPES, Drawn, build, draw_case
from torch import Tensor
from tqdm import tqdm

from regfast import _paths

MODES = ("fwd", "fwd_bwd")
LEAST = 0.9  # of PyTorch's speed
AGAIN = 0.95  # below that, a call is timed again
LATER = 12  # so many cases lie between
ROUNDS = 5  # at least, but for calls so long that they would exceed MOST_SECONDS
ROUND_SECONDS = 0.0005  # of a loop
LEAST_SECONDS, MOST_SECONDS = 0.02, 0.2  # in which both sides of a call are timed; twice that when it is done again


@dataclass
class Result:
    case: Drawn
    mode: str
    theirs: float = float("inf")  # seconds
    ours: float = float("inf")
    path: str = ""  # which way ours took
    again: bool = False  # whether it was timed twice

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours

    def as_dict(self) -> dict:
        own = asdict(self)
        return facts.rounded({**own.pop("case"), **own, "ratio": self.ratio})


def best_of_both(calls: Iterable[Callable[[], object]], longer: int) -> list[float]:
    """The least time of each call: loops of them in turn, whose order is reversed every other round."""
    timers = [timeit.Timer(call) for call in calls]
    best = [timer.timeit(1) for timer in timers]  # loads, allocates
    if max(best) < LEAST_SECONDS:
        best = [min(timer.repeat(2, 1)) for timer in timers]
    loops = [max(1, int(ROUND_SECONDS / least)) for least in best]
    order = list(range(len(timers)))
    start, elapsed, rounds = time.perf_counter(), 0.0, 0
    while elapsed < LEAST_SECONDS * longer or (rounds < ROUNDS and elapsed < MOST_SECONDS * longer):
        for i in order:
            best[i] = min(best[i], timers[i].timeit(loops[i]) / loops[i])
        order.reverse()
        elapsed, rounds = time.perf_counter() - start, rounds + 1
    return best


def forward_backward(fn: Callable, inputs: list[Tensor], leaves: list[Tensor], grad: Tensor | None) -> object:
    return torch.autograd.grad(fn(*inputs), leaves, grad)


def calls_of(case: Drawn, mode: str) -> list[Callable[[], object]]:
    """PyTorch's call and ours."""
    work = build(case)
    fns = work.eager, work.regfast
    if mode == "fwd":
        constants = [x.detach() for x in work.inputs]
        return [partial(fn, *constants) for fn in fns]
    leaves = [x for x in work.inputs if x.requires_grad]
    grad = harness.upstream_gradient(work, mode)
    if grad is not None and EXPANDED in case.options:
        grad = grad.flatten()[:1].expand(grad.numel()).view(grad.shape)
    return [partial(forward_backward, fn, work.inputs, leaves, grad) for fn in fns]


def path_of(call: Callable[[], object]) -> str:
    """Which way a call takes below autograd: the kernels' instruction set, or whose operators, and why."""
    with _paths.recorded() as calls:
        call()
    ways = [c.by if c.path == "kernels" else f"{c.path}: {c.why}" for c in calls]
    return ", ".join(dict.fromkeys(ways)) or "none"


def measure(result: Result) -> None:
    """Times both sides, or does it again for longer, and keeps the best."""
    calls = calls_of(result.case, result.mode)
    theirs, ours = best_of_both(calls, longer=1 + result.again)
    result.theirs, result.ours = min(result.theirs, theirs), min(result.ours, ours)
    result.path = result.path or path_of(calls[1])


def measure_again(result: Result) -> Result:
    result.again = True
    measure(result)
    return result


def sweep(cases: Iterable[Drawn], seconds: float, again: float) -> Iterator[Result]:
    """The results of these cases, each once it counts. None is begun when the time is over."""
    deadline = time.monotonic() + seconds
    doubtful: collections.deque[tuple[int, Result]] = collections.deque()
    for done, case in enumerate(cases):
        if time.monotonic() > deadline:
            break
        while doubtful and doubtful[0][0] + LATER <= done:
            yield measure_again(doubtful.popleft()[1])
        for mode in MODES:
            measure(result := Result(case, mode))
            if result.ratio >= again:
                yield result
            else:
                doubtful.append((done, result))
    yield from (measure_again(result) for _, result in doubtful)


FIGURES = ("calls", f"< {LEAST}x", "< 1.0x", "median", "least")


def words(result: Result) -> dict[str, str]:
    """What a call is and which way it took, by column."""
    case = result.case
    return {
        "case": str(case.number),
        "op": case.op,
        "kind": case.kind,
        "options": ", ".join(case.options),
        "shape": " x ".join(map(str, case.shape)),
        "dtype": case.dtype,
        "layout": case.layout,
        "pass": facts.MODES[result.mode],
        "path": result.path,
    }


def times(result: Result) -> dict[str, str]:
    us = {"PyTorch, us": result.theirs, "ours, us": result.ours}
    return {name: f"{seconds * 1e6:.1f}" for name, seconds in us.items()} | {"ratio": f"{result.ratio:.2f}x"}


def figures(results: list[Result]) -> dict[str, str]:
    ratios = [result.ratio for result in results]
    shares = [f"{sum(ratio < bound for ratio in ratios) / len(ratios):.1%}" for bound in (LEAST, 1)]
    values = [str(len(ratios)), *shares, f"{statistics.median(ratios):.2f}x", f"{min(ratios):.2f}x"]
    return dict(zip(FIGURES, values, strict=True))


def grouped(results: list[Result], *columns: str) -> list[dict[str, str]]:
    """Figures of the results with the same words in these columns; the group with the largest share below 1 first."""
    groups: dict[tuple[str, ...], list[Result]] = collections.defaultdict(list)
    for result in results:
        groups[tuple(words(result)[name] for name in columns)].append(result)
    below = {key: statistics.mean(result.ratio < 1 for result in group) for key, group in groups.items()}
    order = sorted(groups, key=below.__getitem__, reverse=True)
    return [dict(zip(columns, key, strict=True)) | figures(groups[key]) for key in order]


def table(title: str, rows: list[dict[str, str]]) -> Table:
    made = Table(title=title, title_justify="left")
    for name in rows[0]:
        figure = name in (*FIGURES, "PyTorch, us", "ours, us", "ratio")
        made.add_column(name, justify="right" if figure else "left", no_wrap=figure, overflow="fold")
    for row in rows:
        made.add_row(*row.values())
    return made


def report(results: list[Result], worst: int, console: Console) -> None:
    slowest = sorted(results, key=lambda result: result.ratio)[:worst]
    console.print(table("The slowest", [words(result) | times(result) for result in slowest]))
    kinds = [row for row in grouped(results, "op", "kind", "pass") if row["< 1.0x"] != "0.0%"]
    if kinds:
        console.print(table("Kinds with calls below 1.0x", kinds))
    console.print(table("Ops", grouped(results, "op")))


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on (default 60)")
    parser.add_argument("--seed", type=int, help="of all cases; the same seed gives the same cases")
    parser.add_argument("--case", type=int, action="append", help="only the case of this number, as it was printed")
    parser.add_argument("--cases", type=int, default=CASES, help="how many numbers are looked at")
    parser.add_argument("--ops", nargs="*", default=[], help=f"cases of these ops alone: {', '.join(SHAPES)}")
    parser.add_argument("--largest", type=int, default=LARGEST, help="bytes of a tensor; larger cases are left out")
    parser.add_argument("--again", type=float, default=AGAIN, help=f"ratio below which a call is timed again ({AGAIN})")
    parser.add_argument("--threads", type=int, default=machine.num_threads(), help="torch's (default: all)")
    parser.add_argument("--worst", type=int, default=40, help="how many of the slowest calls are printed (default 40)")
    parser.add_argument("--json", type=Path, help="a file for the machine and all results")
    args = parser.parse_args(given)
    if unknown := set(args.ops) - set(SHAPES):
        parser.error(f"--ops: there is no {', '.join(sorted(unknown))}")
    return args


def drawn(args: argparse.Namespace, seed: int) -> Iterator[Drawn]:
    cases = map(draw_case, range(seed * CASES, seed * CASES + args.cases))
    return (case for case in cases if (not args.ops or case.op in args.ops) and case.largest <= args.largest)


def with_progress(results: Iterator[Result], seconds: float) -> list[Result]:
    found, start, below = [], time.monotonic(), 0
    with tqdm(total=round(seconds), unit="s", file=sys.stderr, disable=None) as bar:
        for result in results:
            found.append(result)
            below += result.ratio < 1
            bar.n = min(bar.total, round(time.monotonic() - start))
            bar.set_postfix(calls=len(found), below=below)
    return found


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    seed = random.SystemRandom().randrange(1 << 20) if args.seed is None else args.seed
    torch.set_num_threads(args.threads)
    console = Console()
    console.width = max(console.width, 200)  # the table needs it, in a pipe too
    here = machine.describe(args.threads)
    console.print(f"{here['cpu']}, {here['isa']}, {args.threads} threads, torch {here['torch']}")
    console.print(f"cases {args.case}" if args.case else f"seed {seed}")
    cases = map(draw_case, args.case) if args.case else drawn(args, seed)
    with machine.OthersCpus() as others:
        results = with_progress(sweep(cases, args.seconds, args.again), args.seconds)
    if args.json:
        meta = {"machine": here, "seed": None if args.case else seed, "others_cpus": others.cpus}
        args.json.write_text(json.dumps(meta | {"results": [r.as_dict() for r in results]}, indent=1) + "\n")
    if not results:
        console.print("no calls")
        return 0
    report(results, args.worst, console)
    slower = sum(result.ratio < LEAST for result in results)
    if others.cpus > facts.BUSY:
        console.print(f"Not quiet: others used {others.cpus} CPUs meanwhile.")
    console.print(f"{len(results)} calls, {slower} below {LEAST}x")
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
