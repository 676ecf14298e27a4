"""Runs all examples, one after the other; says how long it took and, before and after, if the machine is quiet."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
EXAMPLES = {
    "linear_regression.py": (),
    "softmax_regression.py": (),
    "next_token.py": (),
    "vocab_parallel.py": (),
    "unmodified_llama.py": ("--steps", "5"),
}
BUSY = 0.3  # CPUs that others may use before times say little


def used_by_all() -> float:
    """CPU seconds of every process since the machine started."""
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))


def used_by_examples() -> float:
    """CPU seconds of the examples that have ended, and of their processes."""
    times = psutil.Process().cpu_times()
    return times.children_user + times.children_system


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("only", nargs="*", metavar="NAME", help=f"of {', '.join(EXAMPLES)}; all by default")
    wanted = options.parse_args().only or list(EXAMPLES)
    if unknown := set(wanted) - set(EXAMPLES):
        options.error(f"expected names of {', '.join(EXAMPLES)}, got {', '.join(sorted(unknown))}")
    others = psutil.cpu_percent(interval=1) / 100 * psutil.cpu_count()
    if others > BUSY:
        print(f"Other programs use {others:.1f} CPUs: times will be rough, and all of it takes longer.", flush=True)
    begin, all_before, ours_before = time.monotonic(), used_by_all(), used_by_examples()
    for i, name in enumerate(wanted):
        print(f"\n=== {i + 1} of {len(wanted)}: {name}", flush=True)
        done = subprocess.run([sys.executable, HERE / name, *EXAMPLES[name]])
        if done.returncode:
            return done.returncode
    seconds = time.monotonic() - begin
    others = (used_by_all() - all_before - (used_by_examples() - ours_before)) / seconds
    print(f"\n{len(wanted)} examples in {seconds:.0f} s. The pictures are in {HERE / 'figures'}.")
    if others > BUSY:
        print(f"Other programs used {others:.1f} CPUs meanwhile: take the times above for rough ones.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
