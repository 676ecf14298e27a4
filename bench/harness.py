"""What a benchmark case is, and interleaved timing. The traps that this avoids are listed in README.md."""

import functools
import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import machine
import pytest
import torch

MIN_ROUNDS, MIN_SECONDS = (2, 0.1) if machine.QUICK else (5, 0.6)
BLOCK_SECONDS = (
    0.002  # short calls are timed in blocks of about this length, so that a block runs in its own warm state
)
MAX_BLOCK = 200
WARM_UP_SECONDS = 0.03  # of calls after a pause, in which the cores have gone to sleep


@dataclass
class Call:
    """run() is timed; setup() goes before every run() and is not."""

    run: Callable[[], object]
    setup: Callable[[], object] | None = None


@dataclass
class Work:
    """One case's inputs and the functions of them that compete; each is called as fn(*inputs)."""

    inputs: list[torch.Tensor]  # those with requires_grad get a gradient in the backward modes
    eager: Callable
    regfast: Callable
    jax: Callable[[str], Call] | None = None  # mode -> call, for a compiled JAX version
    in_place: Callable | None = None  # regfast with the gradient in the input's memory, for the memory measurement
    chunked: Callable | None = None  # PyTorch's own operator that does not store the logits
    numpy: Callable | None = None  # the product alone in NumPy, on arrays, to measure its BLAS


@dataclass(frozen=True)
class Case:
    op: str
    mode: str  # fwd | bwd | fwd_bwd | step
    dtype: torch.dtype
    shape: tuple[int, ...]
    build: Callable[[], Work]
    label: str = ""  # what distinguishes it from the plain case: "smoothing", "gelu", ...
    reads: int = 0  # least bytes read and written, least FLOPs
    writes: int = 0
    flops: int = 0
    formula: str = ""  # how the three were counted
    largest: int = 0  # bytes of the largest tensor that is allocated per call
    compile: bool = False
    environments: tuple[str, ...] = ()
    memory: bool = False
    vocabulary: bool = False  # a point of the curves of time and memory over V
    headline: bool = False  # a row of README.md's table
    quick: bool = False
    cold: bool = False
    grid: bool = False  # a square of the heat maps instead of a row of the tables

    @property
    def name(self) -> str:
        parts = [self.op, self.label, self.mode, str(self.dtype).removeprefix("torch."), "x".join(map(str, self.shape))]
        return "-".join(part for part in parts + (["cold"] if self.cold else []) if part)


def parametrize(cases: list[Case]):
    """The decorator that makes one benchmark of each case (in quick mode, of those marked so)."""
    chosen = [case for case in cases if case.quick or not machine.QUICK]
    return pytest.mark.parametrize("case", chosen, ids=[case.name for case in chosen])


def make_call(fn: Callable, inputs: list[torch.Tensor], mode: str) -> Call:
    """A Call for fn in that mode. Gradients are cleared in setup(), so no run adds to an old one."""
    if mode == "fwd":
        constants = [x.detach() for x in inputs]
        return Call(lambda: fn(*constants))
    leaves = [x for x in inputs if x.requires_grad]
    if mode == "step":
        optimizer = torch.optim.SGD(leaves, lr=1e-3)

        def step():
            optimizer.zero_grad()
            loss = fn(*inputs)
            loss.backward()
            optimizer.step()
            return loss

        return Call(step)

    def clear():
        for leaf in leaves:
            leaf.grad = None

    clear()
    out = fn(*inputs).detach()
    # Not all ones and not stride 0, which some backwards special-case; a scalar loss gets its usual implicit one.
    grad = None if out.dim() == 0 else torch.randn_like(out)
    if mode == "fwd_bwd":
        return Call(lambda: fn(*inputs).backward(grad), clear)
    graph = []

    def forward():
        clear()
        graph[:] = [fn(*inputs)]  # a fresh graph for every backward: the last one freed its buffers

    return Call(lambda: graph[0].backward(grad), forward)


def time_interleaved(
    calls: dict[str, Call | Callable],
    min_rounds: int,
    min_seconds: float,
    before: Callable[[], object] | None = None,
    pause: float = 0,
) -> dict[str, dict]:
    """Times all calls in turn until both minima are reached: {name: {"median": seconds, "samples": [seconds]}}.

    A round takes one sample of each call; the order rotates and every other round is reversed, so that none always
    follows the same neighbour. A sample is the median of a block of calls (one, for calls of a millisecond or more).
    `before` runs before every timed call, e.g. to empty the caches; `pause` seconds pass between contestants whose
    thread pools differ, for one's idle threads to stop spinning. A result is freed after the clock has stopped.
    """
    calls = {name: call if isinstance(call, Call) else Call(call) for name, call in calls.items()}

    def once(call):
        if call.setup:
            call.setup()
        if before:
            before()
        start = time.perf_counter()
        result = call.run()
        elapsed = time.perf_counter() - start
        del result
        return elapsed

    def warm_up(call):
        start = time.perf_counter()
        while time.perf_counter() - start < WARM_UP_SECONDS:
            once(call)

    first = {name: once(call) for name, call in calls.items()}  # loads, compiles, allocates
    slowest = max(min(once(call), once(call)) if first[name] < 1 else first[name] for name, call in calls.items())
    seconds = WARM_UP_SECONDS if pause else BLOCK_SECONDS
    block = 1 if before else max(1, min(MAX_BLOCK, int(seconds / slowest)))
    samples = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        start, count, names = time.perf_counter(), 0, list(calls)
        while count < min_rounds or time.perf_counter() - start < min_seconds:
            order = names[count % len(names) :] + names[: count % len(names)]
            for name in reversed(order) if count % 2 else order:
                if pause:
                    time.sleep(pause)
                    warm_up(calls[name])
                elif block > 1:
                    once(calls[name])  # the neighbour's threads and code leave the caches before the clock starts
                samples[name].append(statistics.median(once(calls[name]) for _ in range(block)))
            count += 1
    finally:
        gc.enable()
    return {name: {"median": statistics.median(values), "samples": values} for name, values in samples.items()}


def ratios(timing: dict[str, dict], base: str = "regfast") -> dict[str, float]:
    """How many times longer each one takes than `base`: the median of the ratios within each round."""
    mine = timing[base]["samples"]
    return {
        name: statistics.median(a / b for a, b in zip(row["samples"], mine, strict=True))
        for name, row in timing.items()
        if name != base
    }


@functools.cache
def _eviction_buffer() -> torch.Tensor:
    return torch.ones(min(2 * max(machine.caches().values(), default=32 << 20), 1 << 30) // 4)


def evict() -> None:
    """Reads a buffer of twice the last-level cache, so that the next call finds nothing of its own there."""
    _eviction_buffer().sum()


def contestants(case: Case, work: Work, everyone: bool, instead: str = "") -> dict[str, Call]:
    """PyTorch eager and regfast; with `everyone` also torch.compile and JAX where the case asks for them.

    With `instead`, "numpy" or "chunked", that one and regfast.
    """
    if instead == "chunked":
        return {fn: make_call(getattr(work, fn), work.inputs, case.mode) for fn in ("chunked", "regfast")}
    if instead == "numpy":
        arrays = [x.detach().numpy() for x in work.inputs]
        return {"numpy": Call(lambda: work.numpy(*arrays)), "regfast": make_call(work.regfast, work.inputs, case.mode)}
    calls = {fn: make_call(getattr(work, fn), work.inputs, case.mode) for fn in ("eager", "regfast")}
    if everyone and case.compile:
        torch._dynamo.reset()
        calls["compile"] = make_call(torch.compile(work.eager, dynamic=False), work.inputs, case.mode)
    # JAX takes all CPUs and cannot be told otherwise at run time.
    if everyone and work.jax and torch.get_num_threads() == os.cpu_count():
        call = work.jax(case.mode)
        if call:
            calls["jax"] = call
    return calls
