"""Calls of ops whose tensors lie against unmapped pages: run by test_guard_pages.py, as guarded_calls.py OP...

Prints each call before it is made, so that the last line names the one that did not come back. Results have to be those
of the same call on ordinary memory. Sizes lie around vectors, tiles and blocks of every instruction set; every tensor,
upstream gradients too, has a layout and a side of its own.
"""

import random
import sys
from collections.abc import Callable

import guard
import torch
from torch import Tensor
from util import DTYPES

import regfast

CALLS = 50  # of each op and dtype
WIDTHS = [1, 2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 23, 31, 32, 33, 47, 63, 64, 65, 127, 130, 255, 257, 300]
LONG_ROWS = [511, 512, 513, 1025, 2047, 2050, 4097]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 27, 31, 33, 65, 95, 97, 130]
ACTIVATIONS = regfast._C.ACTIVATIONS
REDUCTIONS = ["none", "mean", "sum"]


class Draw(random.Random):
    """Numbers of one seed, and the tensors that an op takes."""

    dtype = torch.float32

    def rows(self) -> int:
        return self.choice(ROWS)

    def width(self, longer: float = 0.15) -> int:
        return self.choice(LONG_ROWS if self.random() < longer else WIDTHS)

    def floats(self, *shape: int, wanted: float = 0.7) -> Tensor:
        return torch.randn(shape).to(self.dtype).requires_grad_(self.random() < wanted)

    def terms(self, *shape: int) -> Tensor:
        """Of sums of the last dimension's length that are about 1."""
        return (torch.randn(shape) / shape[-1] ** 0.5).to(self.dtype).requires_grad_(self.random() < 0.7)

    def perhaps(self, *shape: int) -> Tensor | None:
        return self.floats(*shape) if self.random() < 0.6 else None

    def positive(self, *shape: int) -> Tensor:
        return (torch.rand(shape) + 0.25).to(self.dtype)

    def classes(self, count: int, *shape: int) -> Tensor:
        target = torch.randint(count, shape)
        return torch.where(torch.rand(shape) < 0.2, -100, target)

    def loss_options(self) -> dict:
        options = {"reduction": self.choice(REDUCTIONS)}
        if self.random() < 0.4:
            options |= {"label_smoothing": 0.1}
        if self.random() < 0.3:
            options |= {"z_loss": 0.1, "softcap": 5.0, "logit_scale": 0.7}
        if self.random() < 0.3:
            options |= {"outputs": ("loss", "lse", "entropy", "logprob", "argmax")[: self.randint(2, 5)]}
        return options


# What the ops take: the arguments of a call, and a function of them.
Call = tuple[list[Tensor | None], Callable, str]


def linear(draw: Draw) -> Call:
    n, k, v = draw.rows(), draw.width(0.1), draw.width(0.1)
    activation = draw.choice(ACTIVATIONS)
    lead = draw.choice([(n,), (n,), (2, n), ()])
    tensors = [draw.terms(*lead, k), draw.floats(v, k), draw.perhaps(v)]
    return tensors, lambda x, w, b: regfast.linear(x, w, b, activation=activation), activation


def phm_linear(draw: Draw) -> Call:
    n, rows, height, length = draw.randint(1, 5), draw.rows(), draw.choice(WIDTHS[:15]), draw.choice(WIDTHS[:15])
    activation = draw.choice(ACTIVATIONS)
    a, s = draw.floats(n, n, n), draw.floats(n, height, length)
    tensors = [draw.terms(rows, n * length), a, s, draw.perhaps(n * height)]
    return tensors, lambda *t: regfast.phm_linear(*t, activation=activation), activation


def softmax(draw: Draw) -> Call:
    name = draw.choice(["softmax", "log_softmax", "logsumexp"])
    shape = draw.choice([(draw.rows(), draw.width(0.3)), (2, draw.width(), draw.choice(ROWS)), (draw.width(0.3),)])
    dim = draw.randrange(len(shape))
    return [draw.floats(*shape, wanted=1)], lambda x: getattr(regfast, name)(x, dim), f"{name} dim={dim}"


def cross_entropy(draw: Draw) -> Call:
    count = draw.width(0.3)
    rows = draw.choice([(), (draw.rows(),), (draw.rows(),), (2, draw.rows())])
    shape = (*rows[:1], count, *rows[1:])
    options = draw.loss_options()
    x, weight = draw.floats(*shape, wanted=0.9), draw.positive(count) if draw.random() < 0.4 else None
    target = draw.classes(count, *rows)
    if draw.random() < 0.3:
        target = torch.rand(shape).softmax(1 if rows else 0).to(draw.dtype).requires_grad_(draw.random() < 0.4)
    return [x, target, weight], lambda *t: regfast.cross_entropy(*t, **options), str(options)


def cross_entropy_in_place(draw: Draw) -> Call:
    count, rows, options = draw.width(0.3), draw.rows(), {"reduction": draw.choice(REDUCTIONS)}
    x, target = draw.floats(rows, count, wanted=1), draw.classes(count, rows)

    def call(x, target):
        return regfast.cross_entropy(x * 1, target, inplace_backward=True, **options)

    return [x, target], call, str(options)


def linear_cross_entropy(draw: Draw) -> Call:
    n, d, count = draw.rows(), draw.width(0.1), draw.width(0.1)
    options = draw.loss_options()
    if draw.random() < 0.4:
        options |= {"memory_budget": 1}  # as many chunks as there can be
    weight = draw.positive(count) if draw.random() < 0.4 else None
    target = draw.classes(count, n)
    if draw.random() < 0.3:
        target = torch.rand(n, count).softmax(1).to(draw.dtype)
    tensors = [draw.terms(n, d), draw.floats(count, d), target, draw.perhaps(count), weight]

    def call(x, w, target, bias, weight):
        return regfast.linear_cross_entropy(x, w, target, linear_bias=bias, weight=weight, **options)

    return tensors, call, str(options)


def linear_nll(draw: Draw) -> Call:
    n, k, v = draw.rows(), draw.width(0.1), draw.choice([1, 2, 3, 4, 7, 8, 9, 17, 40])
    options = {"family": draw.choice(["gaussian", "bernoulli", "poisson"]), "reduction": draw.choice(REDUCTIONS)}
    scale = None
    if options["family"] == "gaussian":
        scale = draw.positive(v).requires_grad_(draw.random() < 0.5) if draw.random() < 0.5 else None
    elif options["family"] == "bernoulli":
        scale = draw.positive(v) if draw.random() < 0.5 else None
    share = draw.positive(n) if draw.random() < 0.5 else None
    tensors = [draw.terms(n, k), draw.floats(v, k), torch.rand(n, v).to(draw.dtype), draw.perhaps(v), scale, share]

    def call(x, w, target, bias, scale, share):
        by_family = {"gaussian": {"sigma": scale}, "bernoulli": {"pos_weight": scale}, "poisson": {}}
        given = by_family[options["family"]]
        return regfast.linear_nll(x, w, target, bias, sample_weight=share, **options, **given)

    return tensors, call, str(options)


def mse_loss(draw: Draw) -> Call:
    shape = draw.choice([(draw.rows(), draw.width(0.3)), (draw.width(0.5),), (2, draw.rows(), draw.width())])
    reduction = draw.choice(REDUCTIONS)
    tensors = [draw.floats(*shape, wanted=0.9), draw.floats(*shape)]
    return tensors, lambda x, y: regfast.mse_loss(x, y, reduction=reduction), reduction


OPS = {
    op.__name__: op
    for op in (
        linear,
        phm_linear,
        softmax,
        cross_entropy,
        cross_entropy_in_place,
        linear_cross_entropy,
        linear_nll,
        mse_loss,
    )
}


def results(call: Callable, tensors: list[Tensor | None], grads: list[Tensor]) -> list[Tensor]:
    out = call(*tensors)
    out = [out] if isinstance(out, Tensor) else list(out)
    roots = [(o, g) for o, g in zip(out, grads, strict=False) if o.requires_grad]
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    if not roots or not wanted:
        return out
    return [*out, *torch.autograd.grad([o for o, _ in roots], wanted, [g for _, g in roots], allow_unused=True)]


def placed(draw: Draw, tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None, str]:
    """The tensor against a page, the same values in ordinary memory, and how it lies."""
    if tensor is None:
        return None, None, "None"
    layout, side = draw.choice(guard.LAYOUTS), draw.choice(guard.SIDES)
    there = guard.place(tensor, layout, side)
    here = there.detach().clone().requires_grad_(tensor.requires_grad)
    return there, here, f"{list(tensor.shape)} {layout}, {side}{', grad' if tensor.requires_grad else ''}"


def run(op: str, draw: Draw) -> None:
    tensors, call, what = OPS[op](draw)
    there, here, how = zip(*(placed(draw, t) for t in tensors), strict=True)
    print(f"{op} {draw.dtype} {what}: {'; '.join(how)}", flush=True)
    out = call(*here)
    out = [out] if isinstance(out, Tensor) else out
    grads = [placed(draw, torch.randn(o.shape).to(o.dtype)) for o in out]
    ours = results(call, list(there), [g[0] for g in grads])
    expected = results(call, list(here), [g[1] for g in grads])
    for a, b in zip(ours, expected, strict=True):
        if b is None:
            assert a is None
            continue
        # Another layout may mean sums in another order, no more.
        size = b.abs().max().item() if b.numel() else 0
        eps = torch.finfo(b.dtype).eps if b.is_floating_point() else 0
        torch.testing.assert_close(a, b, rtol=0, atol=500 * eps * max(1, size), equal_nan=True)


def main(ops: list[str]) -> None:
    torch.set_num_threads(3)
    for op in ops:
        torch.manual_seed(0)
        draw = Draw(op)
        for dtype in DTYPES:
            draw.dtype = dtype
            for _ in range(CALLS):
                run(op, draw)


if __name__ == "__main__":
    main(sys.argv[1:])
