"""Runs the worker, and goes on behind a case that ended it: what became of each op and choice."""

from __future__ import annotations

import json
import math
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .machine import Identity
from .worker import LOST, MARK, WRONG

# A case takes a second; the first one may compile all kernels, where the build has only PTX for the device.
HANG_SECONDS = 150.0
# Before its time is over the worker is told to begin nothing more: what has begun may end.
STOP_SECONDS = 3.0
# How compute-sanitizer begins to tell of a fault; its banner, summaries and stack traces are lines with the same mark.
_FAULT = re.compile(
    r"=========\s+.*(Invalid|Illegal|isaligned|hazard|overflow|exception|Uninitialized|Potential|Race reported)"
)
_END = object()


class NotRun(Exception):
    """Why the worker could not do its work at all."""


@dataclass
class Subject:
    """An op, or a choice about products, and what became of its cases."""

    cases: int
    passed: int = 0
    skipped: list[str] = field(default_factory=list)
    failed: str = ""  # the case
    error: str = ""
    left: str = "not all cases were run"  # why, where that is so

    @property
    def why_not(self) -> str:
        """Why it is not proven, or nothing."""
        if self.failed:
            return f"{self.failed}: {self.error}"
        if self.passed + len(self.skipped) < self.cases:
            return self.left
        return "" if self.passed else "no case could be run"


def _environment() -> dict[str, str]:
    """A worker imports the regfast that starts it, and is told by nobody else whose products to take."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "REGFAST_CUDA_GEMM": "auto"}


class Worker:
    """A process of the worker; its lines come as they are written. It has a group of its own, which ends with it, and
    ends when this process does, however that ends: its standard input is then at its end."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, "--with-parent"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            errors="replace",
            env={**_environment(), **environment},
            start_new_session=True,
        )
        self.lines: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))
        self.lines.put(_END)

    def line(self, seconds: float) -> str | None:
        """The next line, None at the end; raises queue.Empty if nothing comes in time."""
        line = self.lines.get(timeout=max(0.0, seconds))
        if line is _END:
            self.process.wait()
            return None
        return line

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def last_words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return lines[-1][:300] if lines else f"exit status {self.process.returncode}"

    def ended_by(self) -> str:
        status = self.process.returncode
        return f"the process ended by {signal.Signals(-status).name}" if status < 0 else f"it exited with {status}"


def _told(line: str) -> dict[str, Any] | None:
    return json.loads(line.removeprefix(MARK)) if line.startswith(MARK) else None


def run_cases(
    command: list[str],
    progress: Callable[[int, int, str], None],
    hang_seconds: float = HANG_SECONDS,
    seconds: float = math.inf,
) -> tuple[Identity, dict[str, Subject]]:
    """The machine, and what became of all cases, by `command`, a worker's. Raises NotRun where none could be run.

    progress(done, all, what runs); seconds: for all, and what has not been run then is told of each subject.
    """
    end = time.monotonic() + seconds
    subjects: dict[str, Subject] = {}
    machine: Identity | None = None
    start = 0
    while True:
        failed = [name for name, subject in subjects.items() if subject.failed]
        worker = Worker([*command, "--start", str(start), "--without", *failed], {})
        running: tuple[int, str, str] | None = None
        try:
            while True:
                line = worker.line(min(hang_seconds if running else HANG_SECONDS, end - time.monotonic()))
                if line is None:
                    break
                told = _told(line)
                if told is None:
                    continue
                if "subjects" in told and not subjects:
                    subjects = {name: Subject(count) for name, count in told["subjects"].items()}
                    machine = Identity(**told["machine"])
                if "begin" in told:
                    running = told["begin"], told["subject"], told["case"]
                    done = sum(s.cases if s.failed else s.passed + len(s.skipped) for s in subjects.values())
                    progress(done, sum(s.cases for s in subjects.values()), f"{running[1]} {running[2]}")
                elif "end" in told and running:
                    _note(subjects[running[1]], running[2], told)
                    start, running = told["end"] + 1, None
            error = worker.ended_by()
        except queue.Empty:
            error = f"no answer for {hang_seconds if running else HANG_SECONDS:.0f} s"
            if time.monotonic() >= end:
                if machine is None:
                    raise NotRun(f"no case had begun after {seconds:.0f} s; --seconds allows more") from None
                _note_time(subjects, running, seconds)
                return machine, subjects
        finally:
            worker.stop()
        if running:
            _note(subjects[running[1]], running[2], {"error": error})
            start = running[0] + 1
        elif machine is None or (start == 0 and worker.process.returncode not in (0, WRONG)):
            raise NotRun(worker.last_words())
        elif worker.process.returncode != LOST:
            return machine, subjects  # what was not run, where the device does not come back, is not proven


def _note_time(subjects: dict[str, Subject], running: tuple[int, str, str] | None, seconds: float) -> None:
    for name, subject in subjects.items():
        done = subject.passed + len(subject.skipped)
        subject.left = f"{done} of {subject.cases} cases were run when {seconds:.0f} s were over; --seconds allows more"
        if running and running[1] == name:
            subject.left += f"; {running[2]} had begun"


def _note(subject: Subject, case: str, told: dict[str, Any]) -> None:
    if "passed" in told:
        subject.passed += 1
    elif "skipped" in told:
        subject.skipped.append(f"{case}: {told['skipped']}")
    else:
        subject.failed, subject.error = case, told["error"]


def run_sanitizer(command: list[str], seconds: float) -> tuple[dict[str, tuple[str, str]], str, str]:
    """A worker under compute-sanitizer, for so many seconds at most. Which subjects it found fault with, in which case
    and what it said; how far it came; and how it failed, if it did so without a case to blame. Where it may not run at
    all, as in containers that let nobody debug, nothing has failed."""
    # Without torch's cache each tensor is an allocation, so that what lies beyond it is nobody's.
    worker = Worker(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    faults: dict[str, tuple[str, str]] = {}
    running, done, end = None, 0, time.monotonic() + seconds
    try:
        while (line := worker.line(end - time.monotonic())) is not None:
            told = _told(line)
            if told is None:
                if _FAULT.match(line) and running and running[0] not in faults:
                    faults[running[0]] = running[1], line.strip("= ")
            elif "begin" in told:
                running = told["subject"], told["case"]
            elif "end" in told:
                done += 1
                if "error" in told and running:
                    faults.setdefault(running[0], (running[1], told["error"]))
        failed = "" if worker.process.returncode == 0 or faults else f"{worker.ended_by()}: {worker.last_words()}"
        return faults, f"{done} cases" if done else f"could not run: {failed}", failed if done else ""
    except queue.Empty:
        return faults, f"{done} cases, stopped after {seconds:.0f} s", ""
    finally:
        worker.stop()


def run_measurements(command: list[str], progress: Callable[[str], None], seconds: float) -> list[dict[str, Any]]:
    """What the worker measured within so many seconds, and by "left_out" and "error" what it did not, and why."""
    end = time.monotonic() + seconds
    worker = Worker([*command, "--seconds", str(seconds - STOP_SECONDS)], {})
    entries: list[dict[str, Any]] = []
    last = "the start"
    try:
        while (line := worker.line(end - time.monotonic())) is not None:
            if told := _told(line):
                entries.append(told)
                last = told.get("name", last)
                progress(told.get("name", ""))
        if worker.process.returncode != 0:
            raise NotRun(f"{worker.ended_by()}: {worker.last_words()}")
    except (queue.Empty, NotRun) as error:
        why = str(error) or f"it was stopped when {seconds:.0f} s were over"
        entries.append({"left_out": f"what comes after {last}", "error": why})
    finally:
        worker.stop()
    return entries
