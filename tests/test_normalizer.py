"""A mean whose sum is divided by a given number: accumulated micro-batches, rows of several processes."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from util import INF, NAN, assert_as_good, check, class_targets, probability_targets, spiky

import regfast
from regfast import reference

pytestmark = pytest.mark.kernels("cross_entropy", "linear_cross_entropy")
NUMBERS = [7, 12.5, torch.tensor(9), torch.tensor([3.5], dtype=torch.float64)]


def leaf(t):
    return t.detach().requires_grad_()


def of_linear(fn, **options):
    return lambda x, w, t: fn(x, w, t, **options)


@pytest.mark.parametrize("normalizer", NUMBERS, ids=str)
@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
def test_the_sum_is_divided(dtype, normalizer, probabilities):
    x, w = spiky(9, 5, dtype=dtype).requires_grad_(), spiky(30, 5, dtype=dtype).requires_grad_()
    target = probability_targets(9, 30, dtype=dtype) if probabilities else class_targets((9,), 30, 0.3)
    number = float(normalizer)
    check(
        of_linear(regfast.linear_cross_entropy, normalizer=normalizer),
        lambda x, w, t: (F.cross_entropy((x @ w.T).float() if x.dtype in reference.HALF else x @ w.T, t,
                                         reduction="sum") / number).to(x.dtype),
        x, w, target,
    )  # fmt: skip
    z = spiky(9, 30, dtype=dtype).requires_grad_()
    check(
        lambda z, t: regfast.cross_entropy(z, t, normalizer=normalizer),
        lambda z, t: (F.cross_entropy(z.float() if z.dtype in reference.HALF else z, t, reduction="sum") / number).to(
            z.dtype
        ),
        z,
        target,
    )


ODD_NUMBERS = [0, -0.0, torch.tensor(0), -2, torch.tensor([-2.5]), 1e-30, 1e300]
ODD_NUMBERS += [INF, torch.tensor(-INF, dtype=torch.float64), NAN]
KINDS = ["classes", "some ignored", "all ignored", "no rows", "smoothed and weighted", "probabilities"]


@pytest.mark.parametrize("normalizer", ODD_NUMBERS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs", ["loss", ("loss", "lse")], ids=["loss", "loss and lse"])
def test_an_odd_number_does_what_it_does_in_torch(kind, normalizer, outputs):
    """x / 0 is infinite, 0 / 0 is NaN, and so are gradients, but for rows that are ignored, which have 0. (Which of
    infinities and NaN a gradient is, torch's own order of operations decides.)"""
    rows = 0 if kind == "no rows" else 9
    options = {}
    if kind == "probabilities":
        target = probability_targets(rows, 12)
    else:
        ignored = {"some ignored": 0.4, "smoothed and weighted": 0.4, "all ignored": 1.0}.get(kind, 0.0)
        target = class_targets((rows,), 12, ignored)
    if kind == "smoothed and weighted":
        options = {"label_smoothing": 0.1, "weight": torch.rand(12) + 0.5}
    number = normalizer.reshape(()) if isinstance(normalizer, torch.Tensor) else normalizer
    x, w, b, z = (leaf(spiky(*shape)) for shape in ((rows, 5), (12, 5), (12,), (rows, 12)))
    for ours, theirs, leaves in (
        (
            lambda **o: regfast.linear_cross_entropy(x, w, target, linear_bias=b, **o),
            lambda **o: F.cross_entropy(F.linear(x, w, b), target, **o),
            [x, w, b],
        ),
        (lambda **o: regfast.cross_entropy(z, target, **o), lambda **o: F.cross_entropy(z, target, **o), [z]),
    ):
        result = ours(normalizer=normalizer, outputs=outputs, **options)
        true = theirs(reduction="sum", **options) / number
        for _ in range(2):  # the first time of a graph that is kept, and its last
            got = torch.autograd.grad(result if outputs == "loss" else result.loss, leaves, retain_graph=True)
        loss = result if outputs == "loss" else result.loss
        assert_close(loss, true.to(loss.dtype), equal_nan=True)
        assert loss.isnan() or torch.signbit(loss) == torch.signbit(true)
        for ours_, theirs_ in zip(got, torch.autograd.grad(true, leaves), strict=True):
            finite = theirs_.isfinite()
            assert torch.equal(ours_.isfinite(), finite)
            size = theirs_[finite].abs().max().item() if finite.any() else 0.0
            assert_close(ours_[finite], theirs_[finite], rtol=1e-4, atol=1e-5 * size)


def test_a_normalizer_has_a_gradient_as_in_torch():
    z, x, w = (spiky(*shape, dtype=torch.float64) for shape in ((6, 12), (6, 5), (12, 5)))
    target = class_targets((6,), 12, 0.3)
    for ours, total in (
        (lambda n: regfast.cross_entropy(z, target, normalizer=n), F.cross_entropy(z, target, reduction="sum")),
        (
            lambda n: regfast.linear_cross_entropy(x, w, target, normalizer=n),
            F.cross_entropy(x @ w.T, target, reduction="sum"),
        ),
    ):
        number, true = leaf(torch.tensor(3.0, dtype=torch.float64)), leaf(torch.tensor(3.0, dtype=torch.float64))
        (got,) = torch.autograd.grad(ours(number), number)
        assert_close(got, *torch.autograd.grad(total / true, true))


def test_micro_batches_add_up_to_the_mean_of_all_rows():
    x, w = spiky(10, 6, dtype=torch.float64), spiky(20, 6, dtype=torch.float64)
    target = class_targets((10,), 20, 0.4)
    count = (target != -100).sum()
    weights = [w.clone().requires_grad_() for _ in range(3)]
    F.cross_entropy(x @ weights[0].T, target).backward()
    for rows in (slice(0, 3), slice(3, 4), slice(4, 10)):
        regfast.linear_cross_entropy(x[rows], weights[1], target[rows], normalizer=count).backward()
        regfast.cross_entropy(x[rows] @ weights[2].T, target[rows], normalizer=count).backward()
    for each in weights[1:]:
        torch.testing.assert_close(each.grad, weights[0].grad, rtol=1e-12, atol=1e-12)


def test_a_sum_beyond_float16_is_divided_before_it_is_rounded():
    x = (40 * torch.randn(4000, 20)).half()
    target = class_targets((4000,), 20)
    exact = F.cross_entropy(x.double(), target, reduction="sum")
    assert exact > torch.finfo(torch.float16).max
    loss = regfast.cross_entropy(x, target, normalizer=1000)
    assert_as_good(loss, (exact / 1000).half(), exact / 1000)


def test_of_float64_nothing_is_divided_in_float32():
    x, target = spiky(9, 30).half(), probability_targets(9, 30, dtype=torch.float64)
    loss = regfast.cross_entropy(x, target, normalizer=7)
    torch.testing.assert_close(loss, regfast.cross_entropy(x, target, reduction="sum") / 7, rtol=1e-14, atol=0)
    z, target = spiky(9, 30, dtype=torch.float64), class_targets((9,), 30)
    grads = []
    for options in ({}, {"normalizer": 9}):
        logits = z.clone().requires_grad_()
        regfast.cross_entropy(logits, target, loss_dtype=torch.float32, **options).backward()
        grads.append(logits.grad)
    torch.testing.assert_close(*grads, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("wide", [None, torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_other_outputs_and_options_are_as_without(dtype, wide):
    z, target = spiky(6, 12, dtype=dtype), class_targets((6,), 12, 0.3)
    options = {
        "outputs": ("argmax", "lse", "loss", "entropy"), "label_smoothing": 0.1, "z_loss": 0.2, "loss_dtype": wide,
    }  # fmt: skip
    plain = regfast.cross_entropy(z, target, reduction="sum", **{**options, "loss_dtype": torch.float64})
    got = regfast.cross_entropy(z, target, normalizer=3, **options)
    same = regfast.cross_entropy(z, target, **options)
    assert type(got) is type(same)
    for name in ("argmax", "lse", "entropy"):
        assert torch.equal(getattr(got, name), getattr(same, name)), name
    assert got.loss.dtype == (wide or dtype)
    torch.testing.assert_close(got.loss, (plain.loss / 3).to(got.loss.dtype))


@pytest.mark.parametrize(
    "call",
    [
        lambda **options: regfast.cross_entropy(torch.randn(3, 4), torch.tensor([0, 1, 2]), **options),
        lambda **options: regfast.linear_cross_entropy(
            torch.randn(3, 5), torch.randn(4, 5), torch.tensor([0, 1, 2]), **options
        ),
        lambda **options: reference.cross_entropy(torch.randn(3, 4), torch.tensor([0, 1, 2]), **options),
    ],
    ids=["cross_entropy", "linear_cross_entropy", "reference"],
)
@pytest.mark.no_kernels("errors")
def test_what_is_no_normalizer(call):
    for reduction in ("sum", "none"):
        with pytest.raises(ValueError, match=r"regfast\.\w+: reduction: expected mean with a normalizer, got"):
            call(normalizer=3, reduction=reduction)
    for value in ("3", True, [3]):
        with pytest.raises(TypeError, match=r"regfast\.\w+: normalizer: expected a number or a Tensor, got"):
            call(normalizer=value)
    with pytest.raises(TypeError, match=r"regfast\.\w+: normalizer: expected a real number, got torch.complex64"):
        call(normalizer=torch.tensor(1j))
    with pytest.raises(RuntimeError, match=r"regfast\.\w+: normalizer: expected one number, got shape \(2,\)"):
        call(normalizer=torch.ones(2))


def test_the_reference_divides_too():
    z, target = spiky(5, 7, dtype=torch.float64), class_targets((5,), 7, 0.3)
    x, w = spiky(5, 3, dtype=torch.float64), spiky(7, 3, dtype=torch.float64)
    ours, theirs = (fn(z, target, normalizer=4) for fn in (regfast.cross_entropy, reference.cross_entropy))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        regfast.linear_cross_entropy(x, w, target, normalizer=4),
        reference.linear_cross_entropy(x, w, target, normalizer=4),
    )
