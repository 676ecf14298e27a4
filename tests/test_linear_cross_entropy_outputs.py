"""What linear_cross_entropy has beyond torch: z_loss, softcap, logit_scale, outputs, loss_dtype, filter_eps."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from linear_cross_entropy_cases import (
    BUDGETS,
    FLOATING,
    NAMES,
    check_at_budgets,
    check_lce,
    each_reduction,
    each_target,
    logits_of,
    modes_and_budgets,
    operands,
    regfasts,
    targets,
    torchs,
)
from torch.testing import assert_close
from util import class_targets, probability_targets

import regfast
from regfast import reference

pytestmark = pytest.mark.kernels("linear_cross_entropy")

# Options and outputs


@each_reduction
@pytest.mark.parametrize(
    "option",
    [{"z_loss": 0.1}, {"softcap": 4.0}, {"logit_scale": 0.3}, {"logit_scale": -1.5, "softcap": 3.0, "z_loss": 0.3}],
    ids=str,
)
def test_further_options(option, mode, dtype):
    for positions, c in (((), torch.rand(33).to(dtype)), ((3,), None)):
        x, w, b = operands(40, 12, 33, dtype, positions)
        target = targets(False, 40, 33, positions)
        check_at_budgets(x, w, target, b, c, reduction=mode, label_smoothing=0.1, **option)
        check_at_budgets(x, w, targets(True, 40, 33, positions, dtype=dtype), b, reduction=mode, **option)


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_probabilities_of_half_type_with_wide_kernels(grad):
    # Probabilities of bfloat16 are widened beside the logits, with and without a gradient of their own.
    for positions in ((), (3,)):
        x, w, b = operands(40, 12, 33, torch.bfloat16, positions)
        target = probability_targets(40, 33, *positions, dtype=torch.bfloat16).requires_grad_(grad)
        check_at_budgets(x, w, target, b, reduction="none", z_loss=0.1)


@pytest.mark.parametrize("names", [*NAMES, ("loss", "argmax"), FLOATING, NAMES[::-1], ("lse", "loss")], ids=str)
@each_target
def test_outputs(names, probabilities, dtype):
    extra = {"softcap": 6.0, "logit_scale": 0.8, "z_loss": 0.1, "label_smoothing": 0.1}
    for positions, mode, options in (((), "none", {}), ((3,), "none", extra), ((), "mean", extra), ((3,), "mean", {})):
        x, w, b = operands(37, 6, 19, dtype, positions)
        target = targets(probabilities, 37, 19, positions, dtype=dtype)
        check_at_budgets(x, w, target, b, outputs=names, reduction=mode, **options)
    got = regfasts(x, w, target, b, outputs=names)
    if isinstance(names, tuple):
        assert type(got).__name__ == "CrossEntropyOutput" and got._fields == names
    for name, value in zip(names, got, strict=True) if isinstance(names, tuple) else [(names, got)]:
        assert value.shape == (() if name == "loss" else (37, 3))
        assert value.dtype == (torch.int64 if name == "argmax" else dtype)
        assert value.requires_grad == (name != "argmax")


@pytest.mark.parametrize("used", [c for r in (1, 2, 3) for c in itertools.combinations(FLOATING, r)], ids="+".join)
def test_gradient_of_some_outputs_only(used):
    # An unused output brings no grad_output: its part of the backward must vanish, whichever it is.
    x, w, b = operands(40, 7, 21)
    target = targets(False, 40, 21)
    for mode, budget in modes_and_budgets("none", "sum"):

        def total(fn, mode=mode, **options):
            got = fn(x, w, target, linear_bias=b, outputs=FLOATING, reduction=mode, **options)
            got = dict(zip(FLOATING, got, strict=True))
            return sum((got[name] * (1 + i)).square().sum() for i, name in enumerate(used))

        ours = torch.autograd.grad(total(regfast.linear_cross_entropy, memory_budget=budget), [x, w, b])
        assert_close(ours, torch.autograd.grad(total(reference.linear_cross_entropy), [x, w, b]), rtol=1e-4, atol=1e-4)


def test_grad_outputs_of_any_layout():
    # Random, each row another; the first row's for all of them by stride 0; every second or fifth of a larger tensor.
    x, w, b = operands(40, 7, 21)
    target = targets(False, 40, 21)
    for names in ("loss", "entropy", FLOATING):
        count = 1 if isinstance(names, str) else 4
        for seed in (torch.randn(40), torch.tensor(0.7).expand(40), torch.randn(80)[::2], torch.randn(40, 5)[:, 3]):
            check_at_budgets(x, w, target, b, outputs=names, reduction="none", grads=[seed] * count)
    x, w, b = operands(40, 7, 21, positions=(3,))
    for seed in (torch.randn(3, 40).T, torch.randn(40, 1).expand(40, 3), torch.tensor(2.0).expand(40, 3)):
        check_lce(x, w, targets(False, 40, 21, (3,)), b, budget=1, outputs="loss", reduction="none", grads=[seed])


@pytest.mark.parametrize("seed", [0.0, 1.0, -3.0, 1e-4])
def test_a_scalar_grad_output(seed):
    # Tests only took the path that skips a multiplication by one.
    x, w, b = operands(40, 7, 21)
    for mode in ("mean", "sum"):
        check_at_budgets(x, w, targets(False, 40, 21), b, reduction=mode, grads=[torch.tensor(seed)])


@pytest.mark.parametrize("loss_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_loss_dtype(loss_dtype, dtype):
    x, w, b = operands(40, 7, 21, dtype)
    target = targets(False, 40, 21)
    for mode in ("none", "mean"):
        got = regfasts(x, w, target, b, outputs=NAMES, loss_dtype=loss_dtype, reduction=mode)
        assert [value.dtype for value in got] == [loss_dtype] * 4 + [torch.int64]
        check_lce(x, w, target, b, outputs=FLOATING, loss_dtype=loss_dtype, reduction=mode)
        check_lce(x, w, target, b, outputs="loss", loss_dtype=loss_dtype, reduction=mode)
    assert all(g.dtype == dtype for g in torch.autograd.grad(got.loss, [x, w, b]))
    # A float32 loss of half types was never rounded to them.
    got = regfasts(x, w, target, b, loss_dtype=torch.float32, reduction="none")
    exact = torchs(x.double(), w.double(), target, b.double(), reduction="none")
    assert (got.double() - exact).abs().max() <= 1e-6 * exact.abs().max()


# Entries that the gradient may skip


def peaked(dtype, positions=()):
    """Of 2000 classes all but the first 40 have a probability of about 1e-9: but for targets, no entry worth a product.

    Ignored rows come without further positions, since one of them leaves all entries of its row.
    """
    n, v = 50, 2000
    x, w, b = operands(n, 16, v, torch.float64, positions)
    b = b - 20.0 * (torch.arange(v) >= 40).view(-1, *([1] * len(positions)))
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w, b)]
    return leaves, class_targets((n, *positions), v, 0.0 if positions else 0.2)


def entries(leaves, target, mode, up):
    """In float64: the loss, the gradient of the logits as a matrix, and for each row |g|, in units of which eps is."""
    x, w, b = (t.detach().double() for t in leaves)
    z = logits_of(x, w, b).requires_grad_()
    loss = F.cross_entropy(z, target, reduction=mode)
    (grad,) = torch.autograd.grad(loss, z, up.double())
    valid = target != -100
    g = (up.abs().double() / (valid.sum() if mode == "mean" else 1)).expand(target.shape) * valid
    return loss.detach(), grad.flatten(1), g.view(len(x), -1).amin(1, keepdim=True)


@each_reduction
@pytest.mark.parametrize("positions", [(), (2,)], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_small_entries_of_the_gradient_are_left_out(eps, positions, mode, dtype):
    (x, w, b), target = peaked(dtype, positions)
    up = torch.randn(target.shape if mode == "none" else ()).to(dtype)
    loss, grad, g = entries((x, w, b), target, mode, up)
    rows, columns = x.detach().double(), w.detach().double().flatten(0, -2)
    large, unsure = grad * (grad.abs() > eps * g), grad.abs() * ((grad.abs() - eps * g).abs() < 0.05 * eps * g)
    assert 0 < (large != 0).double().mean() < 0.03

    def products(grad, rows=rows, columns=columns):
        return grad @ columns, grad.T @ rows

    exact, filtered = products(grad), products(large)
    slack = products(unsure, rows.abs(), columns.abs())  # rounding decides on which side of the line they are
    documented = eps * g * columns.abs().sum(0), (eps * g * rows.abs()).sum(0)
    rounding = max(torch.finfo(dtype).eps, 1e-5)
    empty = ((large == 0) & (unsure == 0)).all(0)  # classes without any entry above the line
    assert empty.double().mean() > 0.9 and exact[1][empty].any(1).all()
    for budget in BUDGETS:
        got = regfasts(x, w, target, b, reduction=mode, filter_eps=eps, memory_budget=budget)
        assert_close(got.double(), loss, rtol=rounding, atol=1e-5)  # the loss is never filtered
        dx, dw, db = (t.double() for t in torch.autograd.grad(got, [x, w, b], up))
        dw = dw.flatten(0, -2)
        assert_close(db.flatten(), grad.sum(0), rtol=rounding, atol=rounding * grad.abs().max().item())
        for ours, few, true, near, bound in zip((dx, dw), filtered, exact, slack, documented, strict=True):
            error = rounding * true.abs().max()
            assert ((ours - few).abs() <= near + error).all()
            assert ((ours - true).abs() <= bound + error).all()
        # Left out, not small: their classes have no gradient at all, which without filter_eps they have.
        assert not dw[empty].any()


@each_reduction
def test_without_filter_eps_nothing_is_left_out(mode, dtype):
    # Nor with one that would leave too many entries for a list of them.
    (x, w, b), target = peaked(dtype)
    up = torch.randn(target.shape if mode == "none" else ()).to(dtype)
    for budget in BUDGETS:
        results = []
        for options in ({}, {"filter_eps": 0.0}, {"filter_eps": 1e-30}):
            loss = regfasts(x, w, target, b, reduction=mode, memory_budget=budget, **options)
            results.append([loss, *torch.autograd.grad(loss, [x, w, b], up)])
        for others in results[1:]:
            assert all(map(torch.equal, others, results[0]))
        check_lce(x, w, target, b, budget=budget, reduction=mode, grads=[up])


def test_frozen_inputs_change_no_filtered_gradient():
    (x, w, b), target = peaked(torch.float32)
    every = torch.autograd.grad(regfasts(x, w, target, b, filter_eps=1e-2), [x, w, b])
    for i in range(3):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate((x, w, b))]
        (alone,) = torch.autograd.grad(regfasts(leaves[0], leaves[1], target, leaves[2], filter_eps=1e-2), leaves[i])
        assert_close(alone, every[i])
