"""Cases in processes of their own: one that crashes or hangs loses nothing but itself, and it is known which it was."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from .check import Report, check_case, draw_case
from .ops import Case

# The parent has imported torch and run nothing, so that its children can have thread pools of their own.
_context = multiprocessing.get_context("fork")
HANGS = 120.0  # seconds


@dataclass
class Result:
    seed: int
    calls: int = 0
    wrong: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)


def case_of(seed: int, ops: tuple[str, ...]) -> Case | None:
    """The case of a seed, or None if it is of none of these ops."""
    case = draw_case(seed)
    return case if not ops or any(case["op"].startswith(f"{op}.") or case["op"] == op for op in ops) else None


def checked(case: Case) -> Report:
    """A case's report; an exception of the fuzzer's own is one too."""
    try:
        return check_case(case)
    except Exception as error:
        import traceback

        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"the fuzzer itself: {type(error).__name__}: {error} ({where.name}, line {where.lineno})"
        return Report(wrong=[text])


def how_it_ended(code: int | None) -> str:
    return f"crashed: {signal.Signals(-code).name}" if code and code < 0 else f"crashed: exit status {code}"


def _work(begin: int, stride: int, end: int, ops: tuple[str, ...], deadline: float, current, connection) -> None:
    for seed in range(begin, end, stride):
        if time.monotonic() > deadline:
            break
        current.value = seed
        if (case := case_of(seed, ops)) is not None:
            report = checked(case)
            connection.send((seed, report.calls, report.wrong, report.odd))
    connection.send(None)
    connection.close()


class _Worker:
    def __init__(self, begin: int, stride: int, end: int, ops: tuple[str, ...], deadline: float):
        self.current = _context.Value("q", begin, lock=False)
        self.connection, theirs = _context.Pipe(duplex=False)
        arguments = (begin, stride, end, ops, deadline, self.current, theirs)
        self.process = _context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.heard = time.monotonic()


def run_cases(begin: int, end: int, jobs: int, ops: tuple[str, ...], deadline: float) -> Iterator[Result]:
    """Results of the cases from `begin` on, until `end` or the deadline, in the order in which they come."""
    workers = [_Worker(begin + j, jobs, end, ops, deadline) for j in range(jobs)]
    while workers:
        ready = wait([w.connection for w in workers], timeout=1.0)
        for worker in list(workers):
            failed = None
            if worker.connection in ready:
                worker.heard = time.monotonic()
                try:
                    message = worker.connection.recv()
                    if message is not None:
                        yield Result(*message)
                        continue
                except EOFError:
                    worker.process.join()
                    failed = how_it_ended(worker.process.exitcode)
                worker.process.join()
            elif time.monotonic() - worker.heard > HANGS:
                worker.process.kill()
                failed = f"hangs for {HANGS:.0f} seconds"
            else:
                continue
            workers.remove(worker)
            if failed:
                seed = worker.current.value
                yield Result(seed, wrong=[failed])
                workers.append(_Worker(seed + jobs, jobs, end, ops, deadline))


class Runner:
    """Runs single cases in a process that is started again when it has died."""

    def __init__(self) -> None:
        self.process = None

    def _start(self) -> None:
        self.connection, theirs = _context.Pipe()
        self.process = _context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def run(self, case: Case) -> Report:
        if self.process is None:
            self._start()
        self.connection.send(case)
        try:
            if self.connection.poll(HANGS):
                return self.connection.recv()
            self.process.kill()
            failed = f"hangs for {HANGS:.0f} seconds"
        except EOFError:
            self.process.join()
            failed = how_it_ended(self.process.exitcode)
        self.process = None
        return Report(wrong=[failed])

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()


def _serve(connection) -> None:
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        connection.send(checked(case))
