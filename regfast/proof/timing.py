"""How a GPU is timed: CUDA events around single calls, with the caches emptied before each; and its ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Prepare = Callable[[], Callable[[], object]]  # what goes before the clock starts, and returns what is timed


@dataclass(frozen=True)
class Timed:
    """One op in one class of shapes: tensors, our call and PyTorch's, and the least work that it is."""

    op: str
    what: str  # the class
    mode: str
    make: Callable[[], list[Tensor]]
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    bytes_: int
    flops: int = 0
    kernel: str = ""  # of roofline.py
    rows: str = ""  # the class of rows that the kernels are chosen by: "softmax long few"
    reads_only: bool = False
    first: bool = True  # to be timed, where there may not be time for all

    @property
    def name(self) -> str:
        return f"{self.op} {self.mode.replace('_', '+')}, {self.what}"


class Clock:
    """Times calls one at a time: an L2 cache of other data, then an event, the call, an event."""

    def __init__(self, place: torch.device | str = "cuda"):
        size = torch.cuda.get_device_properties(place).L2_cache_size
        self.other = torch.zeros(max(4 * size, 64 << 20) // 4, dtype=torch.float32, device=place)

    def once(self, prepare: Prepare) -> float:
        """Seconds of what prepare() returns."""
        call = prepare()
        self.other.sum()  # read and not written: what the cache has still to write would be on the clock
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Half a millisecond and more, in which the host runs ahead: the device is not to wait between the events.
        torch.cuda._sleep(1_000_000)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3

    def interleaved(self, calls: dict[str, Prepare], rounds: int = 25, seconds: float = 1.5) -> dict[str, list[float]]:
        """Samples of all calls in turn, in rotating order; three rounds at least, more while there is time."""
        for prepare in calls.values():  # loads, compiles, allocates
            self.once(prepare)
            self.once(prepare)
        samples: dict[str, list[float]] = {name: [] for name in calls}
        names, begin = list(calls), time.perf_counter()
        for i in range(rounds):
            if i >= 3 and time.perf_counter() - begin > seconds:
                break
            for name in names[i % len(names) :] + names[: i % len(names)]:
                samples[name].append(self.once(calls[name]))
        return samples


def ratios(samples: dict[str, list[float]], mine: str = "regfast") -> dict[str, float]:
    """How many times longer than `mine` the others take, within each round; medians."""
    return {
        name: statistics.median(a / b for a, b in zip(values, samples[mine], strict=True))
        for name, values in samples.items()
        if name != mine
    }


def preparation(fn: Callable[..., Tensor], tensors: list[Tensor], mode: str) -> Prepare:
    """Of a function of tensors, of which those that require grad get one; mode: fwd, bwd or fwd_bwd."""
    leaves = [t for t in tensors if t.requires_grad]
    if mode == "fwd":
        constants = [t.detach() for t in tensors]
        return lambda: lambda: fn(*constants)

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    # A loss has its usual implicit gradient of 1; other outputs a random one.
    out = fn(*tensors)
    upstream = None if out.dim() == 0 else torch.randn_like(out)
    del out

    def both() -> Callable[[], object]:
        clear()
        return lambda: fn(*tensors).backward(upstream)

    def backward() -> Callable[[], object]:
        clear()
        out = fn(*tensors)
        return lambda: out.backward(upstream)

    return both if mode == "fwd_bwd" else backward


def ceilings(clock: Clock, place: torch.device | str = "cuda") -> dict[str, float]:
    """Measured here: bytes per second of a copy and of a read, products per second of PyTorch's GEMM."""

    def seconds(fn: Callable[..., object], *tensors: Tensor) -> float:
        return statistics.median(clock.once(lambda: lambda: fn(*tensors)) for _ in range(12))

    count = 1 << 28
    while 8 * count > torch.cuda.mem_get_info(place)[0] // 2:  # others may have most of the memory
        count //= 2
    source = torch.ones(count, device=place)
    target = torch.empty_like(source)
    found = {
        "copy_gb_s": 2 * source.nbytes / seconds(target.copy_, source) / 1e9,
        "read_gb_s": source.nbytes / seconds(torch.sum, source) / 1e9,
    }
    del source, target
    for name, dtype, n in (
        ("bf16", torch.bfloat16, 8192),
        ("tf32", torch.float32, 8192),
        ("fp32", torch.float32, 4096),
    ):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        x, y = (torch.randn(n, n, device=place).to(dtype) for _ in range(2))
        found[f"gemm_{name}_tflop_s"] = 2 * n**3 / seconds(torch.mm, x, y) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def bounds(ceilings: dict[str, float], bytes_: int, flops: int, arithmetic: str, reads_only: bool) -> dict[str, float]:
    """Seconds that the ceilings allow for so much work, by the ceiling's name."""
    rate = "read_gb_s" if reads_only else "copy_gb_s"
    found = {rate: bytes_ / ceilings[rate] / 1e9}
    if flops:
        found[f"gemm_{arithmetic}"] = flops / ceilings[f"gemm_{arithmetic}_tflop_s"] / 1e12
    return found
