"""What is checked of each op's values and gradients: every dtype, layout and kind of size, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import regfast
from regfast import reference
from regfast.types import Several

from .compare import LAYOUTS, classes_of, compare, laid_out, spiky

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
FLOATING: Several = ("loss", "lse", "entropy", "logprob")
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 15.0, "logit_scale": 0.7}
# What a product is computed in, as csrc/cuda/ops/choices.cpp names it, and the error of one that is less exact.
ARITHMETICS = {"float32": F32, "float64": F64, "bfloat16": BF16, "float16": F16, "tf32": F32}
TF32_EPS = 2**-10
SIZE_NAMES = ("skinny", "small", "large")  # of products, as csrc/cuda/tuning.h names them


class Skip(Exception):
    """Why a case has nothing to do on this machine."""


@dataclass(frozen=True)
class Case:
    """One check on one subject: an op, or a choice ("sm80 bfloat16") whose kernels `choices` turn on."""

    subject: str
    name: str  # what a report needs: shape, dtype, layout, options
    run: Callable[[], None]  # raises AssertionError, or Skip
    choices: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """How much is tried. Rows of some lanes, of a block, of a cluster (or read twice where there are none), and longer
    than all of them hold; products of every tile with tails, of single elements, and with K in parts."""

    dtypes: tuple[torch.dtype, ...] = (F32, BF16, F16, F64)
    arithmetics: tuple[str, ...] = tuple(ARITHMETICS)
    activations: tuple[str, ...] = tuple(reference.ACTIVATIONS)
    layouts: tuple[str, ...] = LAYOUTS
    rows: tuple[tuple[int, int], ...] = (
        *((1, 1), (37, 10), (64, 1000), (9, 1025), (33, 4099)),
        *((7, 50257), (5, 131072), (3, 300001), (2, 1100003)),
    )
    images: tuple[tuple[int, ...], ...] = ((3, 21, 40, 33),)
    options: tuple[tuple[int, ...], ...] = ((20, 33), (4, 2051), (3, 33, 40), (2, 70003))
    linear: tuple[tuple[int, int, int], ...] = (
        *((17, 30, 10), (130, 65, 131), (128, 128, 256), (256, 784, 10)),
        *((1, 1024, 1024), (1000, 1003, 517), (2048, 4096, 1024)),
    )
    heads: tuple[tuple[int, int, int], ...] = ((150, 33, 70), (1000, 256, 2051), (300, 64, 70003))
    likelihoods: tuple[tuple[int, int, int], ...] = ((150, 33, 70), (5000, 5, 1), (1000, 256, 2051))
    phm: tuple[tuple[int, int, int, int], ...] = ((9, 48, 24, 4), (1000, 66, 33, 3), (2000, 1024, 512, 8))
    elements: tuple[tuple[int, ...], ...] = ((129, 1001), (1, 1), (3, 70001))
    repeats: int = 20  # of a step whose bits have to be the same
    # What needs much memory, a process of its own, or torch's cache of the device's memory, as graphs do.
    alone: bool = True


FULL = Sizes()
# For compute-sanitizer, which slows kernels down a hundredfold: a few of each.
SMALL = Sizes(
    dtypes=(F32, BF16),
    arithmetics=("float32", "bfloat16", "tf32"),
    activations=("none", "gelu"),
    rows=((37, 10), (5, 1025), (2, 70001)),
    options=((20, 33),),
    linear=((17, 30, 10), (130, 65, 131), (128, 128, 256)),
    heads=((150, 33, 70),),
    likelihoods=((150, 33, 70), (700, 5, 1)),
    phm=((9, 48, 24, 4), (130, 66, 33, 3)),
    elements=((129, 1001),),
    repeats=2,
    alone=False,
)


def op_cases(sizes: Sizes, place: torch.device) -> Iterator[Case]:
    """Of every op, its products ATen's."""
    for part in (softmax, cross_entropy, cross_entropy_options, linear, linear_cross_entropy, linear_nll, phm, mse):
        yield from part(sizes, place)


def described(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def softmax(sizes: Sizes, place: torch.device) -> Iterator[Case]:
    pairs = {
        "softmax": (regfast.softmax, torch.softmax),
        "log_softmax": (regfast.log_softmax, torch.log_softmax),
        "logsumexp": (regfast.logsumexp, torch.logsumexp),
    }

    def check(ours, theirs, shape, dtype, layout, dim):
        x = laid_out(spiky(*shape, dtype=dtype, device=place), layout).requires_grad_()
        compare(lambda x: ours(x, dim), lambda x: theirs(x, dim), x)

    for (op, fns), dtype, shape, layout in itertools.product(
        pairs.items(), sizes.dtypes, sizes.rows + sizes.images, sizes.layouts
    ):
        for dim in range(1, len(shape)) if len(shape) > 2 else (-1,):
            name = f"{shape} {described(dtype)} {layout}" + (f" dim={dim}" if dim >= 0 else "")
            yield Case(op, name, partial(check, *fns, shape, dtype, layout, dim))


def cross_entropy(sizes: Sizes, place: torch.device) -> Iterator[Case]:
    def check(n, c, dtype, layout, reduction):
        target = classes_of((n,), c, place)
        target[0] = c - 1
        compare(
            lambda x, t: regfast.cross_entropy(x, t, reduction=reduction),
            lambda x, t: F.cross_entropy(x, t, reduction=reduction),
            laid_out(spiky(n, c, dtype=dtype, device=place), layout).requires_grad_(),
            target,
        )

    for dtype, (n, c), layout, reduction in itertools.product(
        sizes.dtypes, sizes.rows, sizes.layouts, ("mean", "none")
    ):
        name = f"{(n, c)} {described(dtype)} {layout} {reduction}"
        yield Case("cross_entropy", name, partial(check, n, c, dtype, layout, reduction))


def cross_entropy_options(sizes: Sizes, place: torch.device) -> Iterator[Case]:
    def check(shape, dtype, weighted, outputs, probabilities):
        n, c, *rest = shape
        x = spiky(*shape, dtype=dtype, device=place).requires_grad_()
        target = classes_of((n, *rest), c, place)
        weight = (torch.rand(c, device=place) + 0.1).to(dtype) if weighted else None
        if outputs == "argmax":
            assert torch.equal(regfast.cross_entropy(x, target, outputs=outputs), x.argmax(1)), "another argmax"
            return
        if probabilities:
            target = spiky(*shape, device=place).softmax(1).to(dtype).requires_grad_()
        compare(
            lambda x, t: regfast.cross_entropy(x, t, weight, outputs=outputs, **OPTIONS),
            lambda x, t: reference.cross_entropy(
                x, t, None if weight is None else weight.to(x.dtype), outputs=outputs, **OPTIONS
            ),
            x,
            target,
        )

    for dtype, shape in itertools.product(sizes.dtypes, sizes.options):
        combinations = itertools.product((False, True), (("loss",), FLOATING), (False, True))
        for weighted, outputs, probabilities in [*combinations, (False, "argmax", False)]:
            name = f"{shape} {described(dtype)} {outputs} with options"
            name += ", class weights" * weighted + ", probabilities" * probabilities
            yield Case("cross_entropy", name, partial(check, shape, dtype, weighted, outputs, probabilities))


def linear(
    sizes: Sizes,
    place: torch.device,
    subject: str = "linear",
    only: str | None = None,
    activations: tuple[str, ...] | None = None,
    choices: dict[str, str] | None = None,
    recorded: bool = True,
) -> Iterator[Case]:
    """Also of a choice about products: of one arithmetic, with some activations."""

    def check(n, d, v, arithmetic, activation):
        dtype, tf32 = ARITHMETICS[arithmetic], arithmetic == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            compare(
                lambda x, w, b: regfast.linear(x, w, b, activation=activation),
                lambda x, w, b: reference.linear(x, w, b, activation=activation),
                *(
                    spiky(*s, dtype=dtype, device=place).mul(d**-0.25).requires_grad_(recorded)
                    for s in ((n, d), (v, d), (v,))
                ),
                eps=TF32_EPS if tf32 else None,
            )
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    for arithmetic, (n, d, v), activation in itertools.product(
        (only,) if only else sizes.arithmetics, sizes.linear, activations or sizes.activations
    ):
        name = f"{(n, d, v)} {arithmetic} {activation}" + ("" if recorded else " without gradients")
        yield Case(subject, name, partial(check, n, d, v, arithmetic, activation), choices or {})


def linear_cross_entropy(sizes: Sizes, place: torch.device) -> Iterator[Case]:
    """In one chunk and in several, of 128 rows each."""

    def check(n, d, v, dtype, outputs, reduction, further, budget, probabilities):
        x, w, b = (spiky(*s, dtype=dtype, device=place).mul(d**-0.25).requires_grad_() for s in ((n, d), (v, d), (v,)))
        target = classes_of((n,), v, place)
        if probabilities:
            target = spiky(n, v, device=place).softmax(1).to(dtype).requires_grad_()
        weight = (torch.rand(v, device=place) + 0.1).to(dtype)
        options = {"reduction": reduction, "outputs": outputs, **further}
        compare(
            lambda x, w, b, t: regfast.linear_cross_entropy(
                x, w, t, linear_bias=b, weight=weight, memory_budget=budget, **options
            ),
            lambda x, w, b, t: reference.cross_entropy(F.linear(x, w, b), t, weight.to(x.dtype), **options),
            x,
            w,
            b,
            target,
        )

    for dtype, (n, d, v), probabilities, (outputs, reduction), (further, budget) in itertools.product(
        sizes.dtypes,
        sizes.heads,
        (False, True),
        (("loss", "mean"), ("loss", "none"), (FLOATING, "sum")),
        ((OPTIONS, None), ({}, 1), (OPTIONS, 1)),
    ):
        name = f"{(n, d, v)} {described(dtype)} {outputs} {reduction}" + ", options" * bool(further)
        name += ", several chunks" * bool(budget) + ", probabilities" * probabilities
        run = partial(check, n, d, v, dtype, outputs, reduction, further, budget, probabilities)
        yield Case("linear_cross_entropy", name, run)


NLL: list[tuple[str, dict[str, Any]]] = [
    ("squared", {"reduction": "mean"}),
    ("gaussian", {"reduction": "none"}),
    ("gaussian", {"reduction": "mean", "scaled": True, "weighted": True}),
    ("bernoulli", {"reduction": "sum", "scaled": True}),
    ("poisson", {"reduction": "mean", "weighted": True, "full": True}),
]


def linear_nll(sizes: Sizes, place: torch.device) -> Iterator[Case]:
    def check(n, d, v, dtype, family, options):
        x, w, b = (
            spiky(*s, device=place).mul(0.3 * d**-0.25).to(dtype).requires_grad_() for s in ((n, d), (v, d), (v,))
        )
        y = torch.rand(n, v, device=place).mul(1 if family == "bernoulli" else 4).to(dtype)
        scale = (torch.rand(v, device=place) + 0.3).to(dtype).requires_grad_(family == "gaussian")
        weight = torch.rand(n, device=place).to(dtype)
        given = [scale] * ("scaled" in options) + [weight] * ("weighted" in options)

        def loss(op, x, w, b, y, *rest):
            rest = list(rest)
            scale = rest.pop(0) if "scaled" in options else None
            number, mode = reference.FAMILIES.index(family), reference.REDUCTIONS.index(options["reduction"])
            return op(x, w, y, b, scale, *(rest or [None]), number, 1.0, "full" in options, mode, None)

        compare(
            partial(loss, torch.ops.regfast.linear_nll), partial(loss, reference.linear_nll_loss), x, w, b, y, *given
        )

    for dtype, (n, d, v), (family, options) in itertools.product(sizes.dtypes, sizes.likelihoods, NLL):
        name = f"{(n, d, v)} {described(dtype)} {family} {' '.join(f'{k}={v}' for k, v in options.items())}"
        yield Case("linear_nll", name, partial(check, n, d, v, dtype, family, options))


def phm(sizes: Sizes, place: torch.device) -> Iterator[Case]:
    def check(rows, d, q, n, dtype, activation):
        a = spiky(n, n, n, device=place).div(n).to(dtype).requires_grad_()
        s = spiky(n, q // n, d // n, device=place).div(d**0.5).to(dtype).requires_grad_()
        x, b = (spiky(*s, dtype=dtype, device=place).requires_grad_() for s in ((rows, d), (q,)))
        compare(
            lambda *t: regfast.phm_linear(*t, activation=activation),
            lambda x, a, s, b: reference.ACTIVATIONS[activation](
                F.linear(x, sum(map(torch.kron, a, s)).to(x.dtype), b)
            ),
            x,
            a,
            s,
            b,
        )

    for dtype, (rows, d, q, n), activation in itertools.product(sizes.dtypes, sizes.phm, ("none", "silu")):
        name = f"{(rows, d, q, n)} {described(dtype)} {activation}"
        yield Case("phm_linear", name, partial(check, rows, d, q, n, dtype, activation))


def mse(sizes: Sizes, place: torch.device) -> Iterator[Case]:
    def check(shape, dtype, layout, reduction):
        compare(
            lambda x, y: regfast.mse_loss(x, y, reduction=reduction),
            lambda x, y: reference.mse_loss(x, y, reduction=reduction),
            *(laid_out(spiky(*shape, dtype=dtype, device=place), layout).requires_grad_() for _ in range(2)),
        )

    for dtype, shape, layout, reduction in itertools.product(
        sizes.dtypes, sizes.elements, sizes.layouts, ("none", "mean", "sum")
    ):
        name = f"{shape} {described(dtype)} {layout} {reduction}"
        yield Case("mse_loss", name, partial(check, shape, dtype, layout, reduction))
