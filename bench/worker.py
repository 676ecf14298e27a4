"""Runs one case in this process, which runner.py started with variables that torch reads once; prints one JSON line."""

import argparse
import contextlib
import importlib
import json
import re
import resource
import sys
from pathlib import Path

import harness
import machine
import psutil
import torch
import torch.nn.functional as F


def resident_bytes() -> int:
    """The resident size of this process, from which peak_bytes() starts again where the system allows that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """The largest resident size of this process since then, or so far.

    Linux: VmHWM, and not ru_maxrss, which a child inherits from the process that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text()).group(1)) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def load_libraries(dtype: torch.dtype, provider: str) -> None:
    """A step on next to nothing, so that threads and libraries are there before memory is measured."""
    x, w = (torch.zeros(4, 4, dtype=dtype, requires_grad=True) for _ in range(2))
    F.cross_entropy(F.linear(x, w), torch.arange(4)).backward()
    if provider == "chunked":  # imports 100 MB of Python at its first call
        F.linear_cross_entropy(x, w, torch.arange(4), options=torch.nn.LinearCrossEntropyOptions()).backward()


def extra_memory(case: harness.Case, provider: str) -> float:
    """Peak resident memory of one forward and backward, less what was there before, in units of the first input."""
    load_libraries(case.dtype, provider)
    work = case.build()
    fn = getattr(work, provider)
    # As after a layer: logits that are no leaf (in place, so that they are the same memory). A leaf would keep the
    # gradient in .grad; here it is freed with the graph, but the peak is the same.
    scale = torch.zeros((), dtype=case.dtype, requires_grad=True)
    logits = work.inputs[0].detach().add_(scale)
    before = resident_bytes()
    fn(logits).backward()
    return (peak_bytes() - before) / (logits.numel() * logits.element_size())


def peak_over_gradients(case: harness.Case, provider: str) -> int:
    """Peak resident bytes of one forward and backward over what must be there: the inputs and their gradients."""
    load_libraries(case.dtype, provider)
    work = case.build()
    fn = getattr(work, provider)
    before = resident_bytes()
    out = fn(*work.inputs)
    out.backward(torch.ones_like(out))
    return peak_bytes() - before - sum(x.grad.nbytes for x in work.inputs if x.grad is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", help="the bench file, e.g. bench_linear")
    parser.add_argument("case", help="the name of one of its CASES")
    parser.add_argument("--instead", choices=("numpy",), default="", help="time that instead of PyTorch eager")
    parser.add_argument(
        "--memory", choices=("eager", "chunked", "regfast", "in_place"), help="measure memory, not time"
    )
    args = parser.parse_args()
    case = next(case for case in importlib.import_module(args.module).CASES if case.name == args.case)
    torch.set_num_threads(machine.num_threads())
    torch.manual_seed(0)
    if args.memory and (case.vocabulary or case.peak):
        print(json.dumps({"bytes": peak_over_gradients(case, args.memory)}))
        return
    if args.memory:
        print(json.dumps({"buffers": extra_memory(case, args.memory)}))
        return
    calls = harness.contestants(case, case.build(), everyone=False, instead=args.instead)
    before = harness.evict if case.cold else None
    pause = 0.1 if args.instead == "numpy" else 0.0
    # Fewer rounds than in the main process: some of these take seconds per call, which is what they are here to show.
    rounds = min(3, harness.MIN_ROUNDS)
    timing = harness.time_interleaved(calls, rounds, harness.MIN_SECONDS, before, pause)
    print(json.dumps({"timing": timing}))


if __name__ == "__main__":
    main()
