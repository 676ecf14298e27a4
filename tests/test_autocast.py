"""autocast: the dtypes are those of torch's operators, in forward and backward; mixed precision never raises."""

import itertools
from functools import partial

import linear_nll_cases
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from util import DTYPES, HALF, class_targets, probability_targets, spiky, torchs_mse_loss

import regfast

lower = pytest.mark.parametrize("lower", HALF, ids=str)
given_dtype = pytest.mark.parametrize("given_dtype", DTYPES, ids=str)


def agree(ours, theirs, *leaves, half):
    """Same dtypes and, up to a few roundings to the lower precision, same values and gradients."""
    results = []
    for fn in (ours, theirs):
        with torch.autocast("cpu", dtype=half):
            out = fn(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        seed = torch.linspace(-1, 2, out.numel()).view(out.shape).to(out)
        results.append((out, *torch.autograd.grad(out, wanted, seed)))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        eps = torch.finfo(half).eps
        assert_close(a.double(), b.double(), rtol=8 * eps, atol=4 * eps * max(1.0, b.abs().max().item()))


@lower
@pytest.mark.parametrize("given_dtype", [torch.float32, *HALF], ids=str)  # autocast leaves float64 alone
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_linear(lower, given_dtype, activation):
    act = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}[activation]
    x = spiky(6, 9, dtype=given_dtype, size=1).requires_grad_()
    w, b = spiky(5, 9, size=1).requires_grad_(), spiky(5, size=1).requires_grad_()
    agree(lambda *t: regfast.linear(*t, activation=activation), lambda *t: act(F.linear(*t)), x, w, b, half=lower)


@lower
@pytest.mark.parametrize("given_dtype", [torch.float32, *HALF], ids=str)  # autocast leaves float64 alone
@pytest.mark.parametrize("n", [1, 2])
def test_phm_linear(lower, given_dtype, n):
    x = spiky(6, 8, dtype=given_dtype, size=1).requires_grad_()
    a, s, b = (spiky(*size, size=1).requires_grad_() for size in ((n, n, n), (n, 6 // n, 8 // n), (6,)))
    theirs = lambda x, a, s, b: F.linear(x, sum(map(torch.kron, a, s)), b)  # noqa: E731
    agree(regfast.phm_linear, theirs, x, a, s, b, half=lower)


@lower
@given_dtype
@pytest.mark.parametrize("op", ["softmax", "log_softmax", "logsumexp"])
def test_softmax(lower, given_dtype, op):
    ours, theirs = getattr(regfast, op), getattr(torch, op)
    agree(lambda x: ours(x, 1), lambda x: theirs(x, 1), spiky(6, 9, dtype=given_dtype).requires_grad_(), half=lower)


@lower
@given_dtype
@pytest.mark.parametrize("mode", ["none", "mean", "sum"])
def test_mse_loss(lower, given_dtype, mode):
    x, y = spiky(6, 9, dtype=given_dtype).requires_grad_(), spiky(6, 9).requires_grad_()
    agree(partial(regfast.mse_loss, reduction=mode), partial(torchs_mse_loss, reduction=mode), x, y, half=lower)


@lower
@given_dtype
@pytest.mark.parametrize("mode", ["none", "mean", "sum"])
def test_cross_entropy(lower, given_dtype, mode):
    # torch's nll_loss is on autocast's float32 list: half logits give a float32 loss, and take a float32 weight.
    x = spiky(6, 9, dtype=given_dtype).requires_grad_()
    target, weight = (
        class_targets((6,), 9, 0.2),
        torch.rand(9, dtype=torch.float64 if given_dtype == torch.float64 else None),
    )
    for options in ({}, {"label_smoothing": 0.1}, {"weight": weight}, {"weight": weight, "label_smoothing": 0.1}):
        agree(
            lambda x, options=options: regfast.cross_entropy(x, target, reduction=mode, **options),
            lambda x, options=options: F.cross_entropy(x, target, reduction=mode, **options),
            x,
            half=lower,
        )
    probabilities = probability_targets(6, 9).requires_grad_()
    agree(
        lambda x, t: regfast.cross_entropy(x, t, reduction=mode),
        lambda x, t: F.cross_entropy(x, t, reduction=mode),
        x,
        probabilities,
        half=lower,
    )


@lower
@pytest.mark.parametrize("given_dtype", [torch.float32, *HALF], ids=str)  # autocast leaves float64 alone
@pytest.mark.parametrize("mode", ["none", "mean", "sum"])
def test_linear_cross_entropy(lower, given_dtype, mode):
    x, w, b = spiky(40, 9, dtype=given_dtype), spiky(21, 9, size=1) / 3, spiky(21, size=1)
    x, w, b = (t.requires_grad_() for t in (x, w, b))
    probabilities = probability_targets(40, 21).requires_grad_()
    for target, weight in itertools.product((class_targets((40,), 21, 0.3), probabilities), (None, torch.rand(21))):
        agree(
            lambda x, w, b, t, c=weight: regfast.linear_cross_entropy(x, w, t, linear_bias=b, weight=c, reduction=mode),
            lambda x, w, b, t, c=weight: F.cross_entropy(F.linear(x, w, b), t, c, reduction=mode),
            x,
            w,
            b,
            target,
            half=lower,
        )


@lower
@pytest.mark.parametrize("given_dtype", [torch.float32, *HALF], ids=str)  # autocast leaves float64 alone
@pytest.mark.parametrize("mode", ["none", "mean", "sum"])
@pytest.mark.parametrize("family", ["squared", "gaussian", "bernoulli", "poisson"])
def test_linear_nll(lower, given_dtype, mode, family):
    for v, weighted in itertools.product((3, 20), (False, True)):
        x, w, b = (t.detach() for t in linear_nll_cases.operands((40,), 9, v))
        x, w, b = x.to(given_dtype).requires_grad_(), w.requires_grad_(), b.requires_grad_()
        t, weights = linear_nll_cases.targets(family, 40, v), torch.rand(40) if weighted else None
        scale = linear_nll_cases.scales(family, v)[-1]
        leaves = [x, w, b] + ([scale] if scale is not None and scale.requires_grad else [])
        fns = [
            lambda x, w, b, s=scale, fn=fn, t=t, c=weights: fn(x, w, t, b, s, c, family=family, reduction=mode)
            for fn in (linear_nll_cases.ours, linear_nll_cases.torchs)
        ]
        agree(*fns, *leaves, half=lower)


@lower
def test_a_training_step_in_mixed_precision(lower):
    # Float32 parameters, half activations, and a loss that met the wrong dtype.
    results = []
    for linear, loss in ((regfast.linear, regfast.cross_entropy), (F.linear, F.cross_entropy)):
        torch.manual_seed(1)
        x, w1, w2 = torch.randn(16, 9), torch.randn(8, 9, requires_grad=True), torch.randn(5, 8, requires_grad=True)
        with torch.autocast("cpu", dtype=lower):
            hidden = linear(x, w1)
            value = loss(linear(torch.tanh(hidden), w2), torch.arange(16) % 5)
        assert hidden.dtype == lower and value.dtype == torch.float32
        results.append((value, *torch.autograd.grad(value, [w1, w2])))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert_close(a, b, rtol=0.05, atol=0.02)


def test_disabled_inside():
    x, w = spiky(6, 9).requires_grad_(), spiky(5, 9).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        out = regfast.linear(x, w)
    assert out.dtype == torch.float32 and torch.equal(out, regfast.linear(x, w))


def test_create_graph_and_transforms_under_autocast():
    x, w = spiky(6, 9).requires_grad_(), spiky(5, 9).requires_grad_()
    target = class_targets((6,), 5)

    def total(linear, loss):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(linear(x, w), target)
            (first,) = torch.autograd.grad(value, x, create_graph=True)
            second = torch.autograd.grad(first.float().square().sum(), [x, w])
            # torch's dtype under vmap is the half type here, unlike its dtype without.
            per_sample = torch.func.vmap(lambda x, t: loss(linear(x, w), t))(x, target).float()
        return value, first, *second, per_sample

    for a, b in zip(total(regfast.linear, regfast.cross_entropy), total(F.linear, F.cross_entropy), strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, rtol=0.05, atol=0.05 * max(1.0, b.abs().max().item()))
