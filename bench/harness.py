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
SLOW_SECONDS = 5  # who takes as long for a call is called once


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
    parts: dict[str, Call] | None = None  # calls of which regfast's is to be the whole; instead of all the others
    errors: Callable[[], dict[str, float]] | None = None  # of results against float64, by who computed them
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
    peak: bool = False  # its peak of memory is measured
    headline: bool = False  # a row of the table of docs/benchmarks.md
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


def upstream_gradient(work: Work, mode: str) -> torch.Tensor | None:
    """What all backward passes start from: None for a scalar loss, whose implicit one is 1."""
    if mode not in ("bwd", "fwd_bwd"):
        return None
    with torch.no_grad():
        out = work.regfast(*work.inputs)
    # Not all ones and not stride 0, which some backwards special-case.
    return None if out.dim() == 0 else torch.randn_like(out)


def make_call(fn: Callable, inputs: list[torch.Tensor], mode: str, grad: torch.Tensor | None = None) -> Call:
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
    Where a call takes SLOW_SECONDS the first calls, else not counted, are a round too, and all that the slow ones get.
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
    slow = {name for name, seconds in first.items() if seconds >= SLOW_SECONDS}
    samples = {name: [seconds] if slow else [] for name, seconds in first.items()}
    calls = {name: call for name, call in calls.items() if name not in slow}
    repeated = (min(once(call), once(call)) if first[name] < 1 else first[name] for name, call in calls.items())
    slowest = max(repeated, default=SLOW_SECONDS)
    seconds = WARM_UP_SECONDS if pause else BLOCK_SECONDS
    block = 1 if before else max(1, min(MAX_BLOCK, int(seconds / slowest)))
    gc.collect()
    gc.disable()
    try:
        start, count, names = time.perf_counter(), 0, list(calls)
        while names and (count < min_rounds or time.perf_counter() - start < min_seconds):
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
        # a slow one has taken part in the first round alone
        name: statistics.median(a / b for a, b in zip(row["samples"], mine, strict=False))
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
    """PyTorch eager and regfast; with `everyone` also the chunked operator, torch.compile and JAX, where there are any.

    With `instead`, "numpy", that one and regfast.
    """
    inputs, mode = work.inputs, case.mode
    grad = upstream_gradient(work, mode)
    ours = make_call(work.regfast, inputs, mode, grad)
    if instead == "numpy":
        arrays = [x.detach().numpy() for x in inputs]
        return {"numpy": Call(lambda: work.numpy(*arrays)), "regfast": ours}
    if work.parts:
        return {"regfast": ours, **work.parts}
    calls = {"eager": make_call(work.eager, inputs, mode, grad), "regfast": ours}
    if everyone and work.chunked:
        calls["chunked"] = make_call(work.chunked, inputs, mode, grad)
    if everyone and case.compile:
        torch._dynamo.reset()
        call = calls["compile"] = make_call(torch.compile(work.eager, dynamic=False), inputs, mode, grad)
        if call.setup:
            call.setup()
        call.run()  # compiles, which is not to count as a slow call
    # JAX takes all CPUs and cannot be told otherwise at run time.
    if everyone and work.jax and torch.get_num_threads() == os.cpu_count():
        call = work.jax(mode)
        if call:
            calls["jax"] = call
    return calls
