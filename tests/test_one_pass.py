"""A reduced cross-entropy on the CPU writes its gradient in forward, for the upstream gradient that it expects:
whatever it expected, and whoever computes the gradient in the end, loss and gradient have the same bits."""

import itertools

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from util import DTYPES, class_targets, lay_out, probability_targets, spiky

import regfast
from regfast._paths import recorded

pytestmark = pytest.mark.kernels("cross_entropy")

# Few classes; a block of either vector length (tuning.h: kBlockVectors) less one, whole, and one more; several blocks;
# more than L2 has room for, so that exponentials are computed again.
CLASSES = (1, 3, 64, 65, 300, 1023, 1024, 1025, 2049, 5000)
FAR = 300_000
# A loss that is divided by 0 has an infinite one.
UPSTREAM = (1.0, 0.25, -3.0, 0.0, float("inf"), float("nan"))
OPTIONS = {
    "plain": {},
    "ignored": {"ignore_index": 0},
    "z_loss": {"z_loss": 1e-3, "reduction": "sum"},
    "smooth": {"label_smoothing": 0.1},
    "softcap": {"softcap": 5.0, "logit_scale": 0.7},
    "weight": {"weight": True},
    "probabilities": {"probabilities": True},
}


def arguments(dtype, classes, option, layout="contiguous", rows=7):
    torch.manual_seed(classes)
    o = dict(OPTIONS[option])
    x = lay_out(spiky(rows, classes, dtype=dtype), layout)
    if o.pop("probabilities", False):
        target = probability_targets(rows, classes, dtype=dtype)
    else:
        target = class_targets((rows,), classes, 0.2).maximum(torch.tensor(o.get("ignore_index", -100)))
    if o.get("weight"):
        o["weight"] = spiky(classes, dtype=dtype).exp()
    return x, target, o


def loss_and_gradient(x, target, o, upstream, retain=False):
    x = x.detach().requires_grad_()
    loss = regfast.cross_entropy(x, target, **o)
    up = torch.tensor(upstream, dtype=loss.dtype)
    if retain:
        torch.autograd.grad(loss, x, up, retain_graph=True)
    return loss.detach(), torch.autograd.grad(loss, x, up)[0]


def in_two_passes(x, target, o, upstream):
    """Hooks pack away what is saved, and so forward saves no gradient."""
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        return loss_and_gradient(x, target, o, upstream)


def assert_same_bits(a, b):
    """A NaN is one whatever its bits: IEEE 754 gives its sign no meaning, and compilers exchange the factors that it
    comes from."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(*(t.nan_to_num(1.0, float("inf"), -float("inf")).signbit() for t in (a, b)))


def agree(x, target, o):
    for upstream in UPSTREAM:
        wanted = in_two_passes(x, target, o, upstream)
        # Expecting something else, then this, then for a graph that is kept.
        for expected, retain in itertools.product((1.0, 0.25, upstream), (False, True)):
            loss_and_gradient(x, target, o, expected)
            loss_and_gradient(x, target, o, expected)
            found = loss_and_gradient(x, target, o, upstream, retain)
            for a, b in zip(found, wanted, strict=True):
                assert_same_bits(a, b)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_has_the_bits_of_two(dtype, option):
    for classes in CLASSES:
        agree(*arguments(dtype, classes, option))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_of_any_layout(dtype, layout):
    for classes in (3, 300, 2049):
        agree(*arguments(dtype, classes, "plain", layout))


def test_one_pass_of_rows_beyond_the_caches():
    agree(*arguments(torch.float32, FAR, "plain", rows=2))


@pytest.mark.parametrize("classes", [3, 300, 2500])
def test_one_pass_of_rows_that_are_not_finite(classes):
    x, target, o = arguments(torch.float32, classes, "plain", rows=9)
    inf = float("inf")
    x[0], x[1], x[2, 0], x[3, -1], x[4, 1] = -inf, inf, inf, float("nan"), -inf
    x[5, :-1], x[6], x[7] = -inf, 1e30 * torch.randn(classes), 3e38
    for rows in (slice(0, 9), slice(4, 9)):
        agree(x[rows], target[rows], o)


def writes_in_forward(x, target):
    with recorded() as calls:
        loss_and_gradient(x, target, {}, 1.0)
    return any(c.op == "cross_entropy_forward_backward" for c in calls)


def test_what_is_expected_is_learnt():
    x, target, o = arguments(torch.float32, 100, "plain")
    for _ in range(4):
        loss_and_gradient(x, target, o, 0.5)
    with recorded() as calls:
        loss_and_gradient(x, target, o, 0.5)
    assert [c.op for c in calls] == ["cross_entropy_forward_backward"]  # and nothing is left to backward
    for upstream in (1.0, 2.0, 3.0, 4.0):  # never what came before
        loss_and_gradient(x, target, o, upstream)
    assert not writes_in_forward(x, target)
    for _ in range(4):
        loss_and_gradient(x, target, o, 1.0)
    assert writes_in_forward(x, target)
