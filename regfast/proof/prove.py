"""From a machine to its proof: all cases in a process of their own, then, of what is right, what is fast."""

from __future__ import annotations

import datetime
import sys
import threading
import time
from collections.abc import Callable

from .. import _C
from .choice_cases import is_ours
from .measure import slower
from .measure_choices import choices_of
from .run import Subject, run_cases, run_measurements, run_sanitizer
from .sanitizer import sanitizer_prefix
from .store import Proof

# Of all the time so much, and what cases leave, is for measurements; compute-sanitizer runs beside the cases.
LEAST_SECONDS, SANITIZER_SECONDS = 20.0, 60.0


def worker_command() -> list[str]:
    return [sys.executable, "-P", "-m", "regfast.proof.worker"]


def prove(
    worker: list[str],
    device: int,
    seconds: float,
    progress: Callable[[int, int, str], None],
) -> tuple[Proof, dict[str, Subject], str]:
    """The proof, what became of each op and choice, and what compute-sanitizer found. Raises run.NotRun.

    worker: the command that runs a worker; seconds: for all, after which what runs is stopped.
    """
    begin, of = time.monotonic(), ["--device", str(device)]
    for_cases = seconds - min(LEAST_SECONDS, seconds / 2)
    sanitized: list[tuple[dict[str, tuple[str, str]], str, str]] = []
    watching = None
    if prefix := sanitizer_prefix("memcheck"):
        command = [*prefix, *worker, "cases", *of, "--small", "--without-canaries"]

        def watch() -> None:
            limit = min(SANITIZER_SECONDS, for_cases - (time.monotonic() - begin))
            sanitized.append(run_sanitizer(command, limit))

        watching = threading.Thread(target=watch, daemon=True)

    def begun(done: int, total: int, what: str) -> None:
        # Where only one process may have the device, it is the cases'.
        if watching and not watching.ident:
            watching.start()
        progress(done, total, what)

    machine, subjects = run_cases([*worker, "cases", *of], begun, seconds=for_cases)
    if watching and watching.ident:
        progress(1, 1, "compute-sanitizer")
        watching.join()
    faults, said, broken = sanitized[0] if sanitized else ({}, "not installed", "")
    for name, (case, error) in faults.items():
        if not subjects[name].failed:
            subjects[name].failed, subjects[name].error = case, f"compute-sanitizer: {error}"

    right = [name for name, subject in subjects.items() if not subject.why_not]
    left = seconds - (time.monotonic() - begin)
    told = run_measurements(
        [*worker, "measure", *of, "--subjects", *right], lambda name: progress(1, 1, f"measured: {name}"), left
    )
    measured = [entry for entry in told if "name" in entry]
    ceilings: dict[str, float] = next((entry["ceilings"] for entry in told if "ceilings" in entry), {})
    slower_ops, rows = slower(measured)
    ops = {}
    for op in _C.CUDA_OPS:
        ops[op] = subjects[op].why_not if op in subjects else "not all cases were run"
        if not ops[op] and op in slower_ops:
            ops[op] = f"slower than PyTorch here, which takes {slower_ops[op]:.2f} times as long"
    failures = [
        {"op": name, "case": subject.failed, "error": subject.error}
        for name, subject in subjects.items()
        if subject.failed and is_ours(name)
    ]
    if broken:
        failures.append({"op": "compute-sanitizer", "case": said, "error": broken})
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    left_out = [entry for entry in told if "left_out" in entry]
    proof = Proof(machine, date, ops, {**choices_of(measured), **rows}, failures, ceilings, measured, left_out)
    return proof, subjects, f"{said}, {sum(map(is_ours, faults))} faults" if sanitized else said
