"""Four real processes of gloo, which are started once and run many functions, all at the same time."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta

WORLD = 4


class Ranks:
    """Processes of one group. Called with a function and arguments, each runs it; its results come in their order.

    An exception on any of them is an AssertionError here, with all their tracebacks, and new processes are started for
    the next call: those that were left behind may wait for one another.
    """

    def __init__(self, world: int = WORLD, seconds: float = 60, debug: bool = False) -> None:
        self.arguments = world, seconds, debug
        self.processes: list = []

    def _start(self) -> None:
        world, seconds, debug = self.arguments
        # torch is imported once, by a server that every rank is forked from.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.tensor", "regfast"])
        self.folder = tempfile.TemporaryDirectory()
        store = os.path.join(self.folder.name, "store")
        self.pipes, self.processes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_rank, args=(there, rank, world, store, seconds, debug), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def ask(self, function: Callable, *arguments: object) -> list[tuple[bool, object]]:
        """Of each rank whether it went well, and the result or what went wrong."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append((False, f"rank {rank} has died"))
        if not all(well for well, _ in answers):
            self.close()
        return answers

    def __call__(self, function: Callable, *arguments: object) -> list:
        answers = self.ask(function, *arguments)
        wrong = [f"rank {rank}: {text}" for rank, (well, text) in enumerate(answers) if not well]
        if wrong:
            raise AssertionError("\n".join(wrong))
        return [result for _, result in answers]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        if self.processes:
            self.folder.cleanup()
        self.processes = []


def _rank(pipe, rank: int, world: int, store: str, seconds: float, debug: bool) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if debug:
        dist.set_debug_level(dist.DebugLevel.DETAIL)
    timeout = timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    global groups
    groups = {world: dist.group.WORLD}
    for size in {1, 2} - {world}:
        for first in range(0, world, size):
            group = dist.new_group(list(range(first, first + size)), timeout=timeout)
            if first <= rank < first + size:
                groups[size] = group
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = True, function(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)


# Of a rank: the group of each size that it is in, those of neighbouring ranks.
groups: dict[int, object] = {}
