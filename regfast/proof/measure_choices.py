"""Whose product, and whose epilogue, is faster on the machine at hand, for an arithmetic and a size."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import regfast

from .. import _C
from .cases import ARITHMETICS
from .choice_cases import EPILOGUES, kernels_of
from .machine import Machine
from .roofline import predicted
from .timing import Prepare, ratios

# A choice is taken where it wins in every product that was timed, and by more than the clock errs.
WINS = 1.02
_CEILINGS = {"bfloat16": "bf16", "tf32": "tf32", "float32": "fp32"}  # those that were measured


@dataclass(frozen=True)
class Choice:
    """What was timed for one choice against what is taken without it: ATen's product, and a kernel behind it."""

    what: str  # "bfloat16 large"
    chosen: str  # "sm80"
    kernel: str  # what runs then, as the ledger names it
    arithmetic: str
    ratios: tuple[float, ...]
    flops_per_s: tuple[float, ...]

    def measured(self, limits: dict[str, float], architecture: int) -> dict:
        """As measure.py tells of ops."""
        ceiling = _CEILINGS.get(self.arithmetic)
        rate = statistics.median(self.flops_per_s)
        return {
            "name": f"{self.kernel}, {self.what}",
            "choice": self.what,
            "chosen": self.chosen,
            "ratio": min(self.ratios),
            "bound": f"gemm_{ceiling}" if ceiling else "",
            "share": rate / limits[f"gemm_{ceiling}_tflop_s"] / 1e12 if ceiling else None,
            "predicted": predicted(f"{self.kernel} {ceiling}", architecture) if self.what.endswith(" large") else None,
        }


def timed_choices(machine: Machine, shapes, subjects: list[str], clock) -> Iterator[tuple[str, Callable[[], Choice]]]:
    """Of the choices among the subjects, their names and what times them; shapes as measure.py has them."""
    architecture = machine.identity().architecture
    for kernel, arithmetics in kernels_of(architecture).items():
        for arithmetic in arithmetics:
            if f"{kernel} {arithmetic}" in subjects:
                on_simt = kernel == "sm80" and arithmetic in ("float32", "float64")
                name = "gemm_simt" if on_simt else f"gemm_{kernel}"
                for size, examples in shapes.products:
                    calls = [partial(products, machine.place, arithmetic, shape) for shape in examples]
                    what = f"{arithmetic} {size}"
                    yield (
                        f"{name}, {what}",
                        partial(against_aten, machine, shapes, clock, what, kernel, name, calls),
                    )
    sizes = dict(shapes.products)
    for arithmetic in ARITHMETICS:
        for activation in EPILOGUES:
            if f"{activation} {arithmetic}" in subjects:
                shapes_of_layers = sizes["small"] + sizes["large"]
                calls = [partial(layer, machine.place, arithmetic, shape, activation) for shape in shapes_of_layers]
                name, what = "torch's product with its epilogue", f"{arithmetic} {activation}"
                yield (
                    f"{name}, {what}",
                    partial(against_aten, machine, shapes, clock, what, "fused", name, calls),
                )


Call = tuple[int, Callable[[], object]]  # FLOPs, and what does them


def products(place: torch.device, arithmetic: str, shape: tuple[int, int, int]) -> list[Call]:
    """The three products of a layer, each of which finds its operands laid out in another way."""
    n, d, v = shape
    x, w, g = (torch.randn(s, device=place, dtype=ARITHMETICS[arithmetic]) for s in ((n, d), (v, d), (n, v)))
    backward = torch.ops.regfast.linear_backward
    calls = (
        lambda: regfast.linear(x, w),
        lambda: backward(g, None, w, None, "none", [True, False, False]),
        lambda: backward(g, x, None, None, "none", [False, True, False]),
    )
    return [(2 * n * d * v, call) for call in calls]


def layer(place: torch.device, arithmetic: str, shape: tuple[int, int, int], activation: Any) -> list[Call]:
    n, d, v = shape
    x, w, b = (torch.randn(s, device=place, dtype=ARITHMETICS[arithmetic]) for s in ((n, d), (v, d), (v,)))
    return [(2 * n * d * v, partial(regfast.linear, x, w, b, activation=activation))]


def against_aten(
    machine: Machine, shapes, clock, what: str, chosen: str, kernel: str, makers: Sequence[Callable[[], list[Call]]]
) -> Choice:
    def choosing(choices: dict[str, str], call: Callable[[], object]) -> Prepare:
        def prepare():
            machine.use(list(_C.CUDA_OPS), choices)
            return call

        return prepare

    arithmetic = what.partition(" ")[0]
    found, rates = [], []
    torch.backends.cuda.matmul.allow_tf32 = arithmetic == "tf32"
    try:
        for flops, call in (call for make in makers for call in make()):
            both = {"regfast": choosing({what: chosen}, call), "aten": choosing({}, call)}
            samples = clock.interleaved(both, rounds=15, seconds=shapes.product_seconds)
            found.append(ratios(samples)["aten"])
            rates.append(flops / statistics.median(samples["regfast"]))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        machine.use(list(_C.CUDA_OPS), {})
    return Choice(what, chosen, kernel, arithmetic, tuple(found), tuple(rates))


def choices_of(measured: list[dict]) -> dict[str, str]:
    """What won: the fastest for each choice, if it is faster than what is taken otherwise."""
    best: dict[str, dict] = {}
    for entry in measured:
        if "choice" in entry and entry["ratio"] >= WINS:
            known = best.get(entry["choice"])
            if known is None or entry["ratio"] > known["ratio"]:
                best[entry["choice"]] = entry
    return {choice: entry["chosen"] for choice, entry in sorted(best.items())}
