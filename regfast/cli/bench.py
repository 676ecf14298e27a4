"""Times a few calls beside PyTorch's on this machine, in two minutes.

Each case is a forward and a backward with all gradients, timed in turns with PyTorch's own call on the same tensors;
the table has the medians, and of the turns' ratios the median and the quartiles. The last line is for pasting.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import regfast

from .info import processor
from .table import duration

Step = Callable[[], object]
_BUSY = 0.3  # CPUs that others may use before a measurement counts as disturbed


@dataclass
class Case:
    """A call of ours and PyTorch's for the same, on tensors that ``make`` gives."""

    name: str
    make: Callable[[], tuple[Tensor, ...]]
    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]

    def steps(self) -> tuple[Step, Step]:
        tensors = self.make()
        wanted = [t for t in tensors if t.requires_grad]

        def step(call: Callable[..., Tensor]) -> Step:
            def run() -> None:
                result = call(*tensors)
                torch.autograd.grad(result, wanted, result if result.dim() else None)

            return run

        return step(self.ours), step(self.torchs)


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def _head(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), y)


def _regression(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(F.linear(x, w), y)


def cases() -> list[Case]:
    """What is timed: small and large, float32 and bfloat16, bound by memory and by arithmetic."""
    bf16 = torch.bfloat16
    return [
        Case("linear 256 x 784 -> 10", lambda: (_random(256, 784), _random(10, 784)), regfast.linear, F.linear),
        Case("linear 512 x 1024 -> 1024", lambda: (_random(512, 1024), _random(1024, 1024)), regfast.linear, F.linear),
        Case(
            "linear 256 x 512 -> 512, bfloat16",
            lambda: (_random(256, 512, dtype=bf16), _random(512, 512, dtype=bf16)),
            regfast.linear,
            F.linear,
        ),
        Case(
            "softmax 2048 x 1000",
            lambda: (_random(2048, 1000),),
            regfast.softmax,
            lambda x: torch.softmax(x, -1),
        ),
        Case(
            "cross_entropy 256 x 10",
            lambda: (_random(256, 10), torch.randint(10, (256,))),
            regfast.cross_entropy,
            F.cross_entropy,
        ),
        Case(
            "cross_entropy 1024 x 32000",
            lambda: (_random(1024, 32000), torch.randint(32000, (1024,))),
            regfast.cross_entropy,
            F.cross_entropy,
        ),
        Case(
            "linear_cross_entropy 512 x 256 x 32000",
            lambda: (_random(512, 256), _random(32000, 256), torch.randint(32000, (512,))),
            regfast.linear_cross_entropy,
            _head,
        ),
        Case(
            "linear_cross_entropy 128 x 128 x 4096, bfloat16",
            lambda: (_random(128, 128, dtype=bf16), _random(4096, 128, dtype=bf16), torch.randint(4096, (128,))),
            regfast.linear_cross_entropy,
            _head,
        ),
        Case(
            "linear_mse_loss 100000 x 8 -> 1",
            lambda: (_random(100000, 8), _random(1, 8), torch.randn(100000, 1)),
            regfast.linear_mse_loss,
            _regression,
        ),
    ]


def _seconds(step: Step, times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - begin) / times


def measure(case: Case, seconds: float) -> tuple[list[float], list[float]]:
    """Times of ours and of PyTorch's, in turns of at least two milliseconds, three turns at least."""
    both = case.steps()
    times = []
    for step in both:
        step()
        times.append(max(1, round(2e-3 / _seconds(step, 1))))
    found: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(found[0]) < 3 or time.perf_counter() < end:
        for which in (0, 1) if len(found[0]) % 2 == 0 else (1, 0):
            found[which].append(_seconds(both[which], times[which]))
    return found


def _others_seconds() -> float | None:
    """CPU seconds of all processes but this one since the machine started, where Linux tells."""
    try:
        fields = Path("/proc/stat").read_text().split(None, 8)[1:8]
    except OSError:
        return None
    user, nice, system, _, _, irq, soft = map(int, fields)
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK") - time.process_time()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=110.0, help="time for all cases together (%(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases whose name has this")


def run(args: argparse.Namespace) -> int:
    known = list(cases())
    wanted = [case for case in known if args.only.lower() in case.name.lower()]
    if args.seconds <= 0:
        print(f"regfast bench: --seconds: expected a positive time, got {args.seconds}", file=sys.stderr)
        return 2
    if not wanted:
        names = "; ".join(case.name for case in known)
        print(f"regfast bench: --only: expected a part of one of: {names}; got {args.only!r}", file=sys.stderr)
        return 2
    built = regfast.build_info()
    place = f"{processor()}, {torch.get_num_threads()} threads, regfast {regfast.__version__} on {built['isa']}"
    print(f"{place}, torch {torch.__version__}; forward + backward, {len(wanted)} cases", flush=True)
    width = max(len(case.name) for case in wanted)
    print(f"{'':{width}}  {'regfast':>9}  {'PyTorch':>9}  {'ratio':>6}  quartiles")
    ratios, disturbed = {}, []
    for i, case in enumerate(wanted):
        if sys.stdout.isatty():
            print(f"{case.name:{width}}  {i + 1} of {len(wanted)} ...", end="\r", flush=True)
        begin, others = time.perf_counter(), _others_seconds()
        ours, torchs = measure(case, args.seconds / len(wanted))
        each = sorted(b / a for a, b in zip(ours, torchs, strict=True))
        ratios[case.name] = statistics.median(each)
        low, high = each[len(each) // 4], each[-1 - len(each) // 4]
        after = _others_seconds()
        busy = others is not None and after is not None and after - others > _BUSY * (time.perf_counter() - begin)
        disturbed += [case.name] if busy else []
        print(
            f"{case.name:{width}}  {duration(statistics.median(ours)):>9}  {duration(statistics.median(torchs)):>9}  "
            f"{ratios[case.name]:5.2f}x  {low:.2f} to {high:.2f}{'  (others were busy)' if busy else ''}",
            flush=True,
        )
    if disturbed:
        print("Other programs took processor time: such figures say little. Measure again when the machine is quiet.")
    quiet = f"not quiet in {len(disturbed)} of {len(wanted)}" if disturbed else "quiet"
    print(
        f"\nPyTorch's time over regfast's; {place}, torch {torch.__version__}, {datetime.date.today()}, {quiet}: ",
        end="",
    )
    print("; ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items()))
    return 0
