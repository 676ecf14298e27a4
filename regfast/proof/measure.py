"""Our kernels against PyTorch's on the machine at hand: every op in each class of shapes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce

import torch
import torch.nn.functional as F

import regfast

from .machine import Machine
from .measure_choices import Choice, timed_choices
from .measure_rows import timed_rows
from .roofline import predicted
from .timing import Clock, Timed, bounds, preparation, ratios

# What loses to PyTorch is left to it where it does so by more than the clock errs.
LOSES = 0.95


@dataclass(frozen=True)
class Shapes:
    """What is timed, by class: rows of so many bytes, products as rows x inputs x outputs."""

    bytes_of_logits: int = 1 << 29
    rows: tuple[tuple[str, int], ...] = (("short", 2 << 10), ("medium", 64 << 10), ("long", 512 << 10))
    few_rows: int = 64
    pixels: tuple[int, ...] = (8, 21, 512, 512)
    few_pixels: tuple[int, ...] = (1, 4096, 8, 8)
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
    seconds: float = 0.15  # for an op
    rows_seconds: float = 0.08  # in one of its classes of rows
    product_seconds: float = 0.05


SHAPES = Shapes()


def timed_ops(shapes: Shapes, place: torch.device) -> Iterator[Timed]:
    yield from timed_rows(shapes, place)

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


def measured_choice(time_choice: Callable[[], Choice], limits: dict[str, float], architecture: int) -> dict:
    return time_choice().measured(limits, architecture)


def measured(timed: Timed, shapes: Shapes, clock: Clock, limits: dict[str, float], architecture: int) -> dict:
    """Medians, how many times longer PyTorch takes, and the share of the ceiling beside the predicted one."""
    torch.manual_seed(0)
    tensors = timed.make()
    calls = {
        "regfast": preparation(timed.ours, tensors, timed.mode),
        "torch": preparation(timed.theirs, tensors, timed.mode),
    }
    samples = clock.interleaved(calls, seconds=shapes.rows_seconds if timed.rows else shapes.seconds)
    least = bounds(limits, timed.bytes_, timed.flops, "bf16", timed.reads_only)
    bound = max(least, key=lambda name: least[name])
    median = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "name": timed.name,
        "op": timed.op,
        "rows": timed.rows,
        "median_s": median,
        "ratio": ratios(samples)["torch"],
        "bound": bound,
        "share": least[bound] / median["regfast"],
        "predicted": predicted(timed.kernel, architecture),
    }


def measurements(machine: Machine, shapes: Shapes, subjects: list[str], seconds: float) -> Iterator[dict]:
    """Ceilings, ops, choices, of these subjects. What would begin after so many seconds is told as left out."""
    begin, place = time.perf_counter(), machine.place
    architecture = machine.identity().architecture
    clock = machine.clock()
    limits = machine.ceilings(clock)
    yield {"ceilings": limits}

    def timed_or_left_out(name: str, time_it: Callable[[], dict]) -> dict:
        if time.perf_counter() - begin > seconds:
            return {"left_out": name, "error": "the time was over"}
        try:
            return time_it()
        except Exception as error:  # memory that is not there, mostly; the others are measured all the same
            return {"left_out": name, "error": f"{type(error).__name__}: {error}"[:300]}
        finally:
            machine.empty_cache()

    # What decides most comes first: many rows, layers and products, then few rows and the other dtype.
    rest = []
    for timed in timed_ops(shapes, place):
        if timed.op not in subjects:
            continue
        if timed.first:
            yield timed_or_left_out(timed.name, partial(measured, timed, shapes, clock, limits, architecture))
        else:
            rest.append(timed)
    for name, time_choice in timed_choices(machine, shapes, subjects, clock):
        yield timed_or_left_out(name, partial(measured_choice, time_choice, limits, architecture))
    for timed in rest:
        yield timed_or_left_out(timed.name, partial(measured, timed, shapes, clock, limits, architecture))


def slower(measured: list[dict]) -> tuple[dict[str, float], dict[str, str]]:
    """Ops that lose to PyTorch in all that was timed of them, with how many times longer PyTorch takes; and of the
    others the rows that they lose, as choices: {"softmax long few": "aten"}."""
    by_class: dict[str, dict[str, list[float]]] = {}
    for entry in measured:
        if "op" in entry:
            by_class.setdefault(entry["op"], {}).setdefault(entry["rows"], []).append(entry["ratio"])
    ops, rows = {}, {}
    for op, classes in by_class.items():
        means = {name: statistics.geometric_mean(values) for name, values in classes.items()}
        lost = [name for name, mean in means.items() if mean < LOSES]
        if len(lost) == len(means):
            ops[op] = statistics.geometric_mean(means.values())
        else:
            rows.update({name: "aten" for name in lost if name})
    return ops, rows
