"""What is checked of what may be chosen for products: our own kernels, and activations in torch's epilogue."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import regfast
from regfast import reference

from .cases import ARITHMETICS, SIZE_NAMES, TF32_EPS, Case, Sizes, linear
from .compare import compare, spiky

EPILOGUES = ("relu", "gelu_tanh")  # that torch's _addmm_activation has
HALVES = ("bfloat16", "float16")


def is_ours(subject: str) -> bool:
    """Whether its kernels are: torch's epilogue may be less exact than ours without being wrong."""
    return not subject.startswith(EPILOGUES)


def kernels_of(architecture: int) -> dict[str, tuple[str, ...]]:
    """Our own products on an architecture, and the arithmetics that each has."""
    return {"sm80": tuple(ARITHMETICS), **({"sm90": HALVES} if architecture == 90 else {})}


def choice_cases(sizes: Sizes, place: torch.device, architecture: int) -> Iterator[Case]:
    for kernel, arithmetics in kernels_of(architecture).items():
        for arithmetic in arithmetics:
            if arithmetic in sizes.arithmetics:
                choices = {f"{arithmetic} {size}": kernel for size in SIZE_NAMES}
                yield from linear(sizes, place, f"{kernel} {arithmetic}", arithmetic, choices=choices)
    for arithmetic in sizes.arithmetics:
        for activation in EPILOGUES:
            yield from epilogue(sizes, place, arithmetic, activation)


def epilogue(sizes: Sizes, place: torch.device, arithmetic: str, activation: Any) -> Iterator[Case]:
    """Values as good as ours, and NaNs and infinities that go through: a maximum with 0 may swallow a NaN."""
    subject, choices = f"{activation} {arithmetic}", {f"{arithmetic} {activation}": "fused"}
    # Where gradients are recorded, gelu_tanh's pre-activation is kept, which the epilogue does not leave.
    for recorded in (False, True) if activation == "relu" else (False,):
        yield from linear(sizes, place, subject, arithmetic, (activation,), choices, recorded)

    def check_not_finite():
        tf32 = arithmetic == "tf32"
        x, w, b = (spiky(*s, dtype=ARITHMETICS[arithmetic], device=place) for s in ((64, 48), (80, 48), (80,)))
        # gelu of minus infinity is minus infinity times 0; relu of it is 0.
        for row, value in enumerate((float("nan"), float("inf"), -float("inf"))[: 3 if activation == "relu" else 2]):
            x[row, 5] = value
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            compare(
                lambda x, w, b: regfast.linear(x, w, b, activation=activation),
                lambda x, w, b: reference.linear(x, w, b, activation=activation),
                x,
                w.abs() + 0.1,
                b,
                eps=TF32_EPS if tf32 else None,
            )
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    yield Case(subject, f"(64, 48, 80) {arithmetic} NaN and infinities", partial(check_not_finite), choices)
