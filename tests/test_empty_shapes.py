"""Tensors without elements: torch's answers, or its exceptions, with and without gradients."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from util import LAYOUTS, lay_out, spiky, with_all_kernels

import regfast

REDUCTIONS = ("none", "mean", "sum")


def outcome(fn, tensors, options):
    """The result and the gradients, or the type of the exception."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    try:
        result = fn(*leaves, **options)
    except Exception as error:
        return type(error)
    differentiated = [t for t in leaves if t.requires_grad]
    return [result, *torch.autograd.grad(result, differentiated, torch.ones_like(result), allow_unused=True)]


def agree(ours, true, tensors, **options):
    got, expected = outcome(ours, tensors, options), outcome(true, tensors, options)
    if isinstance(expected, type):
        assert isinstance(got, type) and issubclass(got, expected), (got, expected)
    else:
        assert not isinstance(got, type), got
        assert_close(got, expected, equal_nan=True)
    with torch.no_grad():
        plain = outcome(lambda *t: ours(*(x.detach() for x in t), **options).requires_grad_(), tensors, {})
    if not isinstance(expected, type):
        assert_close(plain[0].detach(), expected[0].detach(), equal_nan=True)


def shapes(dims):
    """All shapes of so many dimensions of 0 and 3, but the full one."""
    return [s for s in product((0, 3), repeat=dims) if 0 in s]


# Strides of an empty tensor may be such that no layout of rows has them, and it is contiguous all the same.
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@with_all_kernels
@layouts
@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_softmax_family(dims, layout):
    for shape in shapes(dims):
        for dim in range(-dims, dims):
            for ours, true in (
                (regfast.softmax, torch.softmax),
                (regfast.log_softmax, torch.log_softmax),
                (regfast.logsumexp, torch.logsumexp),
            ):
                agree(ours, true, [lay_out(spiky(*shape), layout)], dim=dim)


@with_all_kernels
@pytest.mark.parametrize("keepdim", [False, True])
def test_logsumexp_over_several_dimensions(keepdim):
    for shape in [*shapes(3), (3, 3, 3)]:
        for dim in ([0], [1, 2], (0, -1), [0, 1, 2], [0, 0], [1, -2], [3], [-4, 0]):
            agree(regfast.logsumexp, torch.logsumexp, [spiky(*shape)], dim=dim, keepdim=keepdim)


@with_all_kernels
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy(reduction):
    for shape in [(0,), *shapes(2), *shapes(3), (0, 3, 0, 2)]:
        x = spiky(*shape)
        rows = (*shape[:1], *shape[2:]) if len(shape) > 1 else ()
        for target in (torch.zeros(rows, dtype=torch.int64), torch.full(rows, -100), torch.zeros(shape)):
            for options in ({}, {"label_smoothing": 0.2}):
                if options and 0 in (shape[:1] if len(shape) == 1 else shape[1:2]):
                    continue  # torch divides by the number of classes: NaN even for rows that are ignored
                if target.is_floating_point() and shape == (3, 0, 3):
                    continue  # torch compares other shapes there than it says
                agree(regfast.cross_entropy, F.cross_entropy, [x, target], reduction=reduction, **options)


@with_all_kernels
@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="not in this torch")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_cross_entropy(reduction):
    for rows, features, classes in [*shapes(3), (3, 3, 3)]:
        x, w = spiky(rows, features), spiky(classes, features)
        for target in (
            torch.zeros(rows, dtype=torch.int64),  # which is no class where there are none
            torch.full((rows,), -100),
            torch.zeros(rows, classes),
        ):
            agree(regfast.linear_cross_entropy, F.linear_cross_entropy, [x, w, target], reduction=reduction)


@with_all_kernels
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mse_loss(reduction):
    for shape in [*shapes(1), *shapes(2), *shapes(3)]:
        agree(regfast.mse_loss, F.mse_loss, [spiky(*shape), spiky(*shape)], reduction=reduction)


@with_all_kernels
def test_layers():
    for rows, features, outputs in shapes(3):
        agree(regfast.linear, F.linear, [spiky(rows, features), spiky(outputs, features), spiky(outputs)])
        agree(regfast.linear, F.linear, [spiky(2, rows, features), spiky(outputs, features)])
        agree(regfast.linear, F.linear, [spiky(features), spiky(outputs, features)])
        tensors = spiky(rows, 2 * features), spiky(2, 2, 2), spiky(2, outputs, features), spiky(2 * outputs)
        agree(regfast.phm_linear, regfast.reference.phm_linear, tensors)


@with_all_kernels
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("family", ["gaussian", "bernoulli", "poisson", "categorical"])
def test_likelihoods(family, reduction):
    for rows, features, outputs in shapes(3):
        target = torch.zeros(rows, outputs)
        if family == "categorical" and outputs == 0:
            target = torch.full((rows,), -100)
        x, w, b = spiky(rows, features), spiky(outputs, features), spiky(outputs)
        options = {"family": family, "reduction": reduction}
        ours = lambda x, w, b: regfast.linear_nll(x, w, target, b, **options)  # noqa: B023, E731
        true = lambda x, w, b: regfast.reference.linear_nll(x, w, target, b, **options)  # noqa: B023, E731
        agree(ours, true, [x, w, b])
