"""Our kernels against PyTorch's on the machine at hand: every op in each class of shapes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

import regfast

from .cases import ARITHMETICS
from .machine import Machine
from .measure_choices import timed_choices
from .roofline import predicted
from .timing import Clock, bounds, preparation, ratios

# An op is left on PyTorch where it loses to it over its classes, by more than the clock errs.
LOSES = 0.95


@dataclass(frozen=True)
class Shapes:
    """What is timed, by class: rows of logits as long as given, products as rows x inputs x outputs."""

    bytes_of_logits: int = 1 << 29
    rows: tuple[tuple[str, int], ...] = (("short", 1024), ("medium", 32768), ("long", 262144))
    pixels: tuple[int, ...] = (8, 21, 512, 512)
    elements: int = 1 << 27
    activation: tuple[int, int] = (8192, 8192)
    layer: tuple[int, int, int] = (4096, 4096, 4096)
    head: tuple[int, int, int] = (8192, 2048, 32768)
    likelihood: tuple[int, int, int] = (65536, 1024, 1024)
    phm: tuple[int, int, int, int] = (4096, 2048, 2048, 4)
    products: tuple[tuple[str, tuple[tuple[int, int, int], ...]], ...] = (
        ("skinny", ((4096, 1024, 16), (8, 4096, 4096))),
        ("small", ((512, 1024, 1024), (1024, 784, 512))),
        ("large", ((2048, 2048, 2048), (4096, 1024, 4096))),
    )
    seconds: float = 0.15  # for an op in a class
    product_seconds: float = 0.05


SHAPES = Shapes()


@dataclass(frozen=True)
class Timed:
    """One op in one class of shapes: tensors, our call and PyTorch's, and the least work that it is."""

    op: str
    what: str  # the class
    mode: str
    make: Callable[[], list[Tensor]]
    ours: Callable
    theirs: Callable
    bytes_: int
    flops: int = 0
    kernel: str = ""  # of roofline.py
    reads_only: bool = False

    @property
    def name(self) -> str:
        return f"{self.op} {self.mode.replace('_', '+')}, {self.what}"


def timed_ops(shapes: Shapes, place: torch.device) -> Iterator[Timed]:
    pairs: dict[str, tuple[Callable, Callable, int, int]] = {
        "softmax": (regfast.softmax, torch.softmax, 2, 5),
        "log_softmax": (regfast.log_softmax, torch.log_softmax, 2, 5),
        "logsumexp": (regfast.logsumexp, torch.logsumexp, 1, 3),
        "cross_entropy": (regfast.cross_entropy, F.cross_entropy, 1, 2),
    }
    for (op, (ours, theirs, forward, both)), dtype in ((p, d) for p in pairs.items() for d in ("bfloat16", "float32")):
        size = ARITHMETICS[dtype].itemsize
        for label, v in shapes.rows if dtype == "bfloat16" else shapes.rows[1:2]:
            n = max(1, shapes.bytes_of_logits // size // v)

            def make(n=n, v=v, op=op, dtype=dtype):
                x = 3 * torch.randn(n, v, device=place, dtype=ARITHMETICS[dtype])
                rest = [torch.randint(v, (n,), device=place)] if op == "cross_entropy" else []
                return [x.requires_grad_(), *rest]

            last = {} if op == "cross_entropy" else {"dim": -1}
            fns = partial(ours, **last), partial(theirs, **last)
            kernel = op.removeprefix("log_")
            what, moved = f"{label} rows, {n} x {v} {dtype}", n * v * size
            reads_only = forward == 1
            yield Timed(op, what, "fwd", make, *fns, forward * moved, 0, f"{kernel} fwd", reads_only)
            yield Timed(op, what, "fwd_bwd", make, *fns, both * moved, 0, f"{kernel} fwd_bwd")

    def image():
        x = 3 * torch.randn(shapes.pixels, device=place)
        n, c, *rest = shapes.pixels
        return [x.requires_grad_(), torch.randint(c, (n, *rest), device=place)]

    pixels = math.prod(shapes.pixels) * 4
    what = f"pixels, {' x '.join(map(str, shapes.pixels))} float32"
    yield Timed("cross_entropy", what, "fwd_bwd", image, regfast.cross_entropy, F.cross_entropy, 2 * pixels)

    def pair():
        return [torch.randn(shapes.elements, device=place, dtype=torch.bfloat16).requires_grad_() for _ in range(2)]

    moved = 12 * shapes.elements
    what = f"{shapes.elements} bfloat16"
    yield Timed("mse_loss", what, "fwd_bwd", pair, regfast.mse_loss, F.mse_loss, moved, 0, "mse_loss fwd_bwd")
    yield from timed_layers(shapes, place)


def timed_layers(shapes: Shapes, place: torch.device) -> Iterator[Timed]:
    def operands(n, d, v, bias=True):
        sizes = ((n, d), (v, d), (v,)) if bias else ((n, d), (v, d))
        made = [torch.randn(s, device=place, dtype=torch.bfloat16).mul_(d**-0.25) for s in sizes]
        return [t.requires_grad_() for t in made]

    def work(n, d, v):
        return (n * d + v * d + n * v) * 2

    def gradient():
        made = [torch.randn(shapes.activation, device=place, dtype=torch.bfloat16) for _ in range(2)]
        return [t.requires_grad_() for t in made]

    backward = torch.ops.regfast.linear_backward
    yield Timed(
        "linear",
        f"{' x '.join(map(str, shapes.activation))} bfloat16, backward of gelu and bias",
        "fwd",
        gradient,
        lambda g, z: backward(g, None, None, z, "gelu", [False, False, True]),
        lambda g, z: torch.ops.aten.gelu_backward(g, z).sum(0),
        6 * shapes.activation[0] * shapes.activation[1],
        0,
        "activation_backward",
    )
    n, d, v = shapes.layer
    yield Timed(
        "linear",
        f"{n} x {d} x {v} bfloat16 gelu",
        "fwd_bwd",
        partial(operands, n, d, v),
        partial(regfast.linear, activation="gelu"),
        lambda x, w, b: F.gelu(F.linear(x, w, b)),
        3 * work(n, d, v),
        6 * n * d * v,
    )

    def classified(n, d, v):
        return [*operands(n, d, v, bias=False), torch.randint(v, (n,), device=place)]

    n, d, v = shapes.head
    yield Timed(
        "linear_cross_entropy",
        f"{n} x {d} x {v} bfloat16",
        "fwd_bwd",
        partial(classified, n, d, v),
        regfast.linear_cross_entropy,
        lambda x, w, t: F.cross_entropy(F.linear(x, w), t),
        3 * work(n, d, v),
        6 * n * d * v,
        "linear_cross_entropy fwd_bwd",
    )
    n, d, v = shapes.likelihood

    def regression(n=n, d=d, v=v):
        x, w, b = operands(n, d, v)
        return [x.detach(), w, torch.rand(n, v, device=place, dtype=torch.bfloat16), b]

    yield Timed(
        "linear_nll",
        f"{n} x {d} x {v} bfloat16 squared",
        "fwd_bwd",
        regression,
        regfast.linear_mse_loss,
        lambda x, w, y, b: F.mse_loss(F.linear(x, w, b), y),
        2 * work(n, d, v),
        4 * n * d * v,
        "linear_nll fwd_bwd",
    )
    rows, d, q, parts = shapes.phm

    def hypercomplex():
        x, b = (torch.randn(s, device=place, dtype=torch.bfloat16) for s in ((rows, d), (q,)))
        a = torch.randn(parts, parts, parts, device=place, dtype=torch.bfloat16)
        s = torch.randn(parts, q // parts, d // parts, device=place, dtype=torch.bfloat16).mul_(d**-0.5)
        return [t.requires_grad_() for t in (x, a, s, b)]

    yield Timed(
        "phm_linear",
        f"{rows} x {d} x {q} bfloat16, n = {parts}",
        "fwd_bwd",
        hypercomplex,
        regfast.phm_linear,
        lambda x, a, s, b: F.linear(x, reduce(torch.add, map(torch.kron, a, s)), b),
        3 * work(rows, d, q),
        6 * rows * d * q,
    )


def measured(timed: Timed, shapes: Shapes, clock: Clock, limits: dict[str, float], architecture: int) -> dict:
    """Medians, how many times longer PyTorch takes, and the share of the ceiling beside the predicted one."""
    torch.manual_seed(0)
    tensors = timed.make()
    calls = {
        "regfast": preparation(timed.ours, tensors, timed.mode),
        "torch": preparation(timed.theirs, tensors, timed.mode),
    }
    samples = clock.interleaved(calls, seconds=shapes.seconds)
    least = bounds(limits, timed.bytes_, timed.flops, "bf16", timed.reads_only)
    bound = max(least, key=lambda name: least[name])
    median = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "name": timed.name,
        "op": timed.op,
        "median_s": median,
        "ratio": ratios(samples)["torch"],
        "bound": bound,
        "share": least[bound] / median["regfast"],
        "predicted": predicted(timed.kernel, architecture),
    }


def measurements(machine: Machine, shapes: Shapes, subjects: list[str], seconds: float) -> Iterator[dict]:
    """Ceilings, ops, choices, of these subjects; those that would begin after so many seconds are left out."""
    begin, place = time.perf_counter(), machine.place
    architecture = machine.identity().architecture
    clock = machine.clock()
    limits = machine.ceilings(clock)
    yield {"ceilings": limits}

    def is_over() -> bool:
        return time.perf_counter() - begin > seconds

    for timed in timed_ops(shapes, place):
        if timed.op in subjects and not is_over():
            try:
                yield measured(timed, shapes, clock, limits, architecture)
            except Exception as error:  # memory that is not there, mostly; the others are measured all the same
                yield {"left_out": timed.name, "error": f"{type(error).__name__}: {error}"[:300]}
            machine.empty_cache()
    for choice in timed_choices(machine, shapes, subjects, clock):
        if is_over():
            return
        yield choice.measured(limits, architecture)


def slower_ops(measured: list[dict]) -> dict[str, float]:
    """Ops that lose to PyTorch over all their classes, with how many times longer PyTorch takes."""
    by_op: dict[str, list[float]] = {}
    for entry in measured:
        if "op" in entry:
            by_op.setdefault(entry["op"], []).append(entry["ratio"])
    means = {op: statistics.geometric_mean(values) for op, values in by_op.items()}
    return {op: mean for op, mean in means.items() if mean < LOSES}
