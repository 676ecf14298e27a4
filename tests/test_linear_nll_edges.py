"""linear_nll at the ends of its ranges: huge, tiny and infinite numbers, bounded variances, sums of many rows."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from linear_nll_cases import (
    FAMILIES,
    REDUCTIONS,
    check_nll,
    each_family,
    operands,
    ours,
    references,
    targets,
    torchs,
)
from torch.testing import assert_close
from util import HALF, INF, NAN

import regfast

pytestmark = pytest.mark.kernels("linear_nll")


@pytest.mark.parametrize("v", [1, 20])
def test_huge_predictions(v, dtype):
    # The weight is the prediction. Losses and slopes are finite wherever they can be represented.
    x, largest = torch.ones(1, 1, dtype=dtype), torch.finfo(dtype).max / 4
    for size, family, sign in itertools.product((50.0, 1e4, 1e30, largest), FAMILIES[:3], (1.0, -1.0)):
        for y in (0.0, 1.0, 0.25):
            w, t = torch.full((v, 1), min(size, largest) * sign, dtype=dtype), torch.full((1, v), y, dtype=dtype)
            results = []
            for fn, to in ((ours, dtype), (torchs, torch.float64)):
                leaf = w.to(to).requires_grad_()
                loss = fn(x.to(to), leaf, t.to(to), family=family, reduction="none")
                results.append([r.to(dtype) for r in (loss.detach(), *torch.autograd.grad(loss.sum(), leaf))])
            for got, true in zip(*results, strict=True):
                assert_close(got, true, rtol=8 * torch.finfo(dtype).eps, atol=1e-15)


@pytest.mark.parametrize("v", [1, 20])
def test_slopes_of_sure_classifiers_are_relatively_precise(v):
    # sigmoid(eta) - 1 is 0 in float32 from eta = 17 on, though the gradient there is 4e-8; ours is exp(-eta).
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        for eta in (*range(-80, 81, 5), 0.3, -0.3):
            for y in (0.0, 1.0):
                w = torch.full((v, 1), float(eta), dtype=dtype, requires_grad=True)
                loss = ours(
                    torch.ones(1, 1, dtype=dtype),
                    w,
                    torch.full((1, v), y, dtype=dtype),
                    family="bernoulli",
                    reduction="none",
                )
                (slope,) = torch.autograd.grad(loss.sum(), w)
                signed = torch.tensor((1 - 2 * y) * float(torch.tensor(eta, dtype=dtype)), dtype=torch.float64)
                assert_close(slope.double(), ((1 - 2 * y) * torch.sigmoid(signed)).expand(v, 1), rtol=limit, atol=0)
                assert_close(loss.double(), F.softplus(signed, threshold=1e9).expand(1, v), rtol=limit, atol=0)


@pytest.mark.parametrize("v", [1, 20])
def test_poisson_means_up_to_the_largest_number(v, dtype):
    points = [-INF, -1e4, -104.0, -88.0, -20.0, -1e-3, 0.0, 1e-3, 10.0, 11.0, 80.0, 88.5, 89.0, 709.0, 710.0, 1e4, INF]
    for eta, y in itertools.product(points, (1.0, 3.0, 100.0)):
        w = torch.full((v, 1), eta).to(dtype).requires_grad_()
        x = torch.ones(1, 1, dtype=dtype)
        for full in (False, True):
            t = torch.full((1, v), y, dtype=dtype)
            check_nll(x, w, t, family="poisson", reduction="none", full=full, terms=1.0, what=f"{eta} {y}")


@each_family
def test_infinities_and_nans_come_out_where_torch_has_them(family):
    for v in (2, 20):
        x, w, b = operands((40,), 3, v)
        for bad in (INF, -INF, NAN):
            rows = x.detach().clone()
            rows[5, 1] = bad
            t = targets(family, 40, v)
            if family == "bernoulli" and bad in (INF, -INF):
                continue  # below; and no such target is one
            check_nll(rows.requires_grad_(), w, t, b, family=family, reduction="none")
            t[7, 1] = bad
            check_nll(x, w, t, b, family=family, reduction="none")


@pytest.mark.parametrize("v", [1, 20])
@pytest.mark.parametrize("eta, y", list(itertools.product((INF, -INF, NAN), (0.0, 0.25, 1.0))))
def test_infinite_predictions_of_classifiers(v, eta, y):
    # torch has 0 times inf in some: there an infinite loss is right too. The slopes are those of the limits.
    w, t = torch.full((v, 1), eta, requires_grad=True), torch.full((1, v), y)
    losses = [f(torch.ones(1, 1), w, t, family="bernoulli", reduction="none") for f in (ours, torchs)]
    assert_close(*(torch.autograd.grad(loss.sum(), w) for loss in losses), equal_nan=True)
    mine, theirs = (loss.detach() for loss in losses)
    limit = eta == -INF and y > 0
    assert (mine == INF).all() if limit else torch.equal(mine.nan_to_num(nan=-1.0), theirs.nan_to_num(nan=-1.0))


def test_small_and_bounded_variances(dtype):
    # Below eps the variance is eps, and the gradient of F.gaussian_nll_loss passes all the same.
    for v in (2, 20):
        x, w, b = operands((40,), 3, v, dtype)
        t = targets("gaussian", 40, v, dtype=dtype)
        small = torch.linspace(0.01, 0.3, v).to(dtype).requires_grad_()
        for scale in (0.01, small, small.detach()):
            for mode in REDUCTIONS:
                check_nll(
                    x,
                    w,
                    t,
                    b,
                    scale,
                    family="gaussian",
                    eps=0.01,
                    reduction=mode,
                    theirs=references if dtype in HALF else torchs,
                )


def test_float16_mean_of_large_losses():
    # The sum is beyond 65504 while the mean is not, and so is the mean's gradient.
    for v in (1, 16):
        x, w = torch.ones(4096, 1).half().requires_grad_(), torch.full((v, 1), 60.0).half().requires_grad_()
        loss = regfast.linear_mse_loss(x, w, torch.zeros(4096, v).half())
        assert loss == 3600
        _, dw = torch.autograd.grad(loss, [x, w], torch.tensor(16.0 * v).half())
        assert (dw == 16 * 120).all()


def test_mean_of_many_rows():
    # A float32 running sum of 2**21 losses loses digits; partial sums do not.
    n = 2**21
    x, w = torch.linspace(-1, 1, n)[:, None], torch.tensor([[1.5]])
    for v in (1, 9):
        t = torch.zeros(n, 1).expand(n, v)
        true = torchs(x.double(), w.double().expand(v, 1), t.double(), family="squared")
        assert abs(regfast.linear_mse_loss(x, w.expand(v, 1), t).double() - true) < 2e-7 * true
