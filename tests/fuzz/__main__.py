"""make fuzz: draws cases, checks them in several processes, prints what disagrees as small as it gets."""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import time

from tqdm import tqdm

from .check import draw_case
from .ops import OPS
from .processes import Runner, run_cases
from .shrink import kind_of, script, shrink

CASES = 1_000_000_000  # to a seed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on (default 60)")
    parser.add_argument("--seed", type=int, help="of all cases; the same seed gives the same cases")
    parser.add_argument("--case", type=int, action="append", help="only the case of this number, as it was printed")
    parser.add_argument("--json", help="only this case, as it was printed")
    parser.add_argument("--cases", type=int, default=CASES, help="how many cases at most")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--ops", nargs="*", default=[], help=f"cases of these ops alone: {', '.join(OPS)}")
    parser.add_argument(
        "--shrink", type=float, default=10.0, help="seconds to make a case smaller in, ten times that for all"
    )
    return parser.parse_args()


def show(seed: int | None, case: dict, problem: str, runner: Runner, seconds: float) -> None:
    """Prints a failing case, its smallest relative and a script."""
    small, said = shrink(case, problem, runner, seconds)
    name = "" if seed is None else f"case {seed}, "
    print(f"\n--- {name}{case['op']}: {problem}\nsmaller: {said}\n--json '{json.dumps(small)}'\n\n{script(small)}\n")


def main() -> int:
    given = arguments()
    runner = Runner()
    if given.case or given.json:
        cases = [(n, draw_case(n)) for n in given.case or []] + ([(None, json.loads(given.json))] if given.json else [])
        calls = wrong = 0
        for seed, case in cases:
            print(json.dumps(case))
            report = runner.run(case)
            calls += report.calls
            wrong += bool(report.wrong)
            for problem in report.wrong:
                print(problem)
            for kind in {kind_of(p): p for p in report.wrong}.values():
                show(seed, case, kind, runner, given.shrink)
        runner.close()
        print(f"{calls} calls, {wrong} disagreements")
        return int(wrong > 0)

    seed = random.SystemRandom().randrange(1 << 30) if given.seed is None else given.seed
    print(f"seed {seed}")
    begin = seed * CASES
    calls = wrong = 0
    odd: collections.Counter[str] = collections.Counter()
    found: dict[str, tuple[int, str]] = {}
    count: collections.Counter[str] = collections.Counter()
    tqdm.monitor_interval = 0  # no thread besides, since processes fork
    start = time.monotonic()
    deadline = start + given.seconds
    with tqdm(total=round(given.seconds), unit="s", file=sys.stderr, disable=None) as bar:
        for result in run_cases(begin, begin + given.cases, given.jobs, tuple(given.ops), deadline):
            calls += result.calls
            wrong += bool(result.wrong)
            for problem in result.wrong:
                kind = f"{draw_case(result.seed)['op']}: {kind_of(problem)}"
                count[kind] += 1
                if kind not in found:
                    found[kind] = result.seed, problem
                    bar.write(f"case {result.seed}, {kind}: {problem}")
            odd.update(p[p.rindex(" (") + 2 : -1] for p in result.odd)
            bar.n = min(bar.total, round(time.monotonic() - start))
            bar.set_postfix(calls=calls, disagreements=wrong)
    until = time.monotonic() + 10 * given.shrink
    for kind, (number, problem) in found.items():
        print(f"\n{count[kind]} times: {kind}")
        show(number, draw_case(number), problem, runner, min(given.shrink, until - time.monotonic()))
    runner.close()
    for reason, times in odd.most_common():
        print(f"{times} times {reason}")
    print(f"{calls} calls, {wrong} disagreements")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
