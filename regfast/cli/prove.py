"""Proves the CUDA kernels on this machine's GPU, which turns them on.

Every op is checked against float64 on the device, then timed beside PyTorch's, in processes of their own. What was
found is written to the user's cache directory (or REGFAST_PROOFS), where regfast finds it from then on: ops whose
kernels are right are on, each with the faster product for a size. The exit status is 0 if all kernels are right, 1 if
some are not, 2 if there was nothing to prove.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..proof import decide, store
from ..proof.choice_cases import is_ours
from ..proof.prove import prove, worker_command
from ..proof.run import NotRun, Subject
from .table import duration, print_table

LEAST_SECONDS = 30.0
HEADER = ["what", "result", "regfast", "PyTorch", "ceiling", "share", "predicted"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=int, default=0, help="the GPU's number, 0 by default")
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=88,
        help="for all (%(default)s): what checks leave of them goes to measurements. What there is no time for is "
        "named, and an op of which not all cases were run stays on PyTorch; a slow GPU wants more",
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not LEAST_SECONDS <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected {LEAST_SECONDS:g} or more, got {text}")
    return value


def nothing_to_prove(device: int) -> str:
    """Why, in one sentence, or nothing."""
    if not decide.is_built():
        return (
            "expected a build with CUDA kernels, got one without; they are built where torch has CUDA and nvcc of its "
            "release is at hand, and REGFAST_CUDA=1 has the build say what is missing"
        )
    if not decide.devices():
        return f"expected an NVIDIA GPU, torch {torch.__version__} finds none"
    if not 0 <= device < decide.devices():
        return f"--device: expected one of the {decide.devices()} GPUs from 0 on, got {device}"
    return ""


def run(args: argparse.Namespace) -> int:
    """The exit status."""
    if why := nothing_to_prove(args.device):
        print(f"regfast prove: {why}", file=sys.stderr)
        return 2
    return run_on(args.device, worker_command(), args.seconds)


def run_on(device: int, worker: list[str], seconds: float) -> int:
    """By a command that runs a worker. This process asks the device for nothing: some let only one process in."""
    try:
        store.check_writable()
    except OSError as error:
        where = (
            str(error) if isinstance(error, store.NoFolder) else f"{error.filename or store.folder()}: {error.strerror}"
        )
        print(
            f"regfast prove: the proof could not be written: {where}; REGFAST_PROOFS names another folder",
            file=sys.stderr,
        )
        return 2
    try:
        with store.alone(_say_that_it_waits), progress_bar() as progress:
            proof, subjects, sanitized = prove(worker, device, seconds, progress)
    except NotRun as error:
        print(f"regfast prove: no case could be run: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("regfast prove: stopped; no proof was written, and one from before is as it was", file=sys.stderr)
        return 130
    print_table(f"{proof.machine}, {proof.date}", HEADER, list(rows(proof, subjects, sanitized)), texts=2)
    try:
        path = store.write(proof)
    except OSError as error:
        told = f"{error}; REGFAST_PROOFS names another folder"
        print(f"regfast prove: the proof could not be written: {told}", file=sys.stderr)
        return 2
    if proof.left_out:
        names = ", ".join(sorted({f"{entry['left_out']} ({entry['error']})" for entry in proof.left_out[:3]}))
        more = f" and {len(proof.left_out) - 3} more" if len(proof.left_out) > 3 else ""
        print(f"Not measured: {names}{more}. What was not measured is as if it were no faster than PyTorch's products.")
    for failure in proof.failures:
        print(f"{failure['op']} is wrong in {failure['case']}: {failure['error']}.")
    if proof.failures:
        print(f"What is wrong stays on PyTorch. Please report it as an issue, with {path}, which names the cases.")
    print(f"Kernels in use from now on: {', '.join(proof.proven) or 'none'}. Written to {path}")
    return 1 if proof.failures or any(s.why_not and is_ours(name) for name, s in subjects.items()) else 0


def _say_that_it_waits() -> None:
    print(
        "regfast prove: another one is at work, and is waited for: two would spoil each other's times", file=sys.stderr
    )


def rows(proof: store.Proof, subjects: dict[str, Subject], sanitized: str) -> Iterator[list[str]]:
    """The table's lines: each op and choice, what was measured of it, and how that compares with what was predicted."""
    for name, subject in subjects.items():
        result = f"right in {subject.passed} cases" + f", {len(subject.skipped)} skipped" * bool(subject.skipped)
        if subject.why_not:
            wrong = "WRONG" if is_ours(name) else "torch's epilogue is not as exact"
            result = f"{wrong}: {subject.why_not}" if subject.failed else subject.why_not
        elif proof.ops.get(name):
            result += f"; {proof.ops[name]}"
        yield [name, result, "", "", "", "", ""]
    for entry in proof.measured:
        taken = ""
        if "choice" in entry:
            taken = "taken" if proof.choices.get(entry["choice"]) == entry["chosen"] else "not taken"
        elif proof.choices.get(entry.get("rows", "")) == "aten":
            taken = "PyTorch's is taken"
        yield [
            entry["name"],
            taken,
            duration(entry["median_s"]["regfast"]) if "median_s" in entry else "",
            f"{entry['ratio']:.2f}x",
            str(entry.get("bound") or "").removesuffix("_gb_s"),
            share_text(entry.get("share")),
            share_text(entry.get("predicted")),
        ]
    yield ["compute-sanitizer", sanitized, "", "", "", "", ""]


def share_text(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """On standard error: by rich if it is installed, else a line for each subject."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        last = ""

        def tell(done: int, total: int, what: str) -> None:
            nonlocal last
            subject = what.partition(" ")[0]
            if subject != last:
                print(f"  {done} of {total}: {subject}", file=sys.stderr, flush=True)
                last = subject

        yield tell
        return
    columns = (BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starts", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what[:90])
