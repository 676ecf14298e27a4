"""The process that has the device: runs cases or measurements, and writes what becomes of each to standard output.

    python -m regfast.proof.worker cases|measure [--device N] [--small] ...

A line begins with MARK and is JSON; whatever else stands there was written by others. A device that a case has lost
ends the process, and so may the case itself: whoever started it goes on behind that case (run.py).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import traceback
from collections import Counter
from dataclasses import asdict

import torch

from .. import _C
from .canaries import CANARIES
from .cases import FULL, SMALL, Case, Sizes, Skip, op_cases
from .choice_cases import choice_cases, is_ours
from .device_cases import device_cases
from .machine import Machine
from .measure import SHAPES, Shapes, measurements

MARK = "regfast-proof "
WRONG, LOST = 1, 3  # the exit status where a case of ours failed, and of a process whose device is lost


def tell(**what: object) -> None:
    print(MARK + json.dumps(what), flush=True)


def all_cases(sizes: Sizes, machine: Machine) -> list[Case]:
    """One subject after another, so that when time is over those that came before are proven."""
    architecture = machine.identity().architecture
    cases = [*op_cases(sizes, machine.place), *device_cases(sizes, machine)]
    cases += choice_cases(sizes, machine.place, architecture)
    order = list(dict.fromkeys(case.subject for case in cases))
    return sorted(cases, key=lambda case: order.index(case.subject))


def is_out_of_memory(error: Exception) -> bool:
    """Others may have the device's memory, which says nothing of the kernels. Libraries tell it in their own words."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


def run_cases(machine: Machine, sizes: Sizes, start: int, without: set[str], by_turns: bool) -> int:
    cases = all_cases(sizes, machine)
    if by_turns:  # a case of each subject first, then the next of each: time may be over before all have run
        turns: Counter[str] = Counter()
        order = []
        for case in cases:
            order.append((turns[case.subject], case))
            turns[case.subject] += 1
        cases = [case for _, case in sorted(order, key=lambda entry: entry[0])]
    tell(machine=asdict(machine.identity()), subjects=Counter(case.subject for case in cases))
    machine.use(list(_C.CUDA_OPS), {})
    chosen: dict[str, str] = {}
    status = 0
    for i, case in enumerate(cases):
        if i < start or case.subject in without:
            continue
        tell(begin=i, subject=case.subject, case=case.name)
        torch.manual_seed(i)
        if case.choices != chosen:
            machine.use(list(_C.CUDA_OPS), case.choices)
            chosen = case.choices
        try:
            case.run()
            machine.synchronize()
            tell(end=i, passed=True)
        except Skip as reason:
            tell(end=i, skipped=str(reason))
        except Exception as error:
            if is_out_of_memory(error):
                machine.empty_cache()
                tell(end=i, skipped="not enough memory is free")
                continue
            traceback.print_exc()
            without.add(case.subject)
            status = WRONG if is_ours(case.subject) else status
            said = (str(error).strip().splitlines() or [""])[0][:300]
            tell(end=i, error=said if isinstance(error, AssertionError) and said else f"{type(error).__name__}: {said}")
            if machine.is_lost():
                return LOST
    return status


def run_measurements(machine: Machine, shapes: Shapes, subjects: list[str], seconds: float) -> int:
    machine.use(list(_C.CUDA_OPS), {})
    for entry in measurements(machine, shapes, subjects, seconds):
        tell(**entry)
    return 0


def end_with_parent() -> None:
    """Whoever started this process may be killed: no orphan is to hold the device, or be timed beside."""

    def wait() -> None:
        # Nobody writes there: it ends. Not through sys.stdin, whose lock the interpreter wants when it shuts down.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(
    arguments: list[str] | None = None,
    machine: Machine | None = None,
    sizes: Sizes | None = None,
    shapes: Shapes = SHAPES,
) -> int:
    """Of another machine or other sizes, where a test has them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cases", "measure"))
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="few and small cases, a subject's one at a time")
    parser.add_argument("--start", type=int, default=0, help="the first case")
    parser.add_argument("--without", nargs="*", action="extend", default=[], help="subjects that are left out")
    parser.add_argument("--without-canaries", action="store_true")
    parser.add_argument("--with-parent", action="store_true", help="end when standard input does")
    parser.add_argument("--subjects", nargs="*", default=[], help="what is measured")
    parser.add_argument("--seconds", type=float, default=30, help="for measurements")
    args = parser.parse_args(arguments)
    if args.with_parent:
        end_with_parent()
    if machine is None:
        machine = Machine(args.device)
        torch.cuda.set_device(args.device)
    if args.what == "measure":
        return run_measurements(machine, shapes, args.subjects, args.seconds)
    if not args.without_canaries:
        CANARIES.install("CUDA" if machine.place.type == "cuda" else "CPU")
    sizes = sizes or (SMALL if args.small else FULL)
    return run_cases(machine, sizes, args.start, set(args.without), by_turns=args.small)


if __name__ == "__main__":
    sys.exit(main())
