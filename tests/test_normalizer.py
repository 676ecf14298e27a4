"""A mean whose sum is divided by a given number: accumulated micro-batches, rows of several processes."""

import pytest
import torch
import torch.nn.functional as F
from util import assert_as_good, check, class_targets, probability_targets, spiky

import regfast
from regfast import reference

pytestmark = pytest.mark.kernels("cross_entropy", "linear_cross_entropy")
NUMBERS = [7, 12.5, torch.tensor(9), torch.tensor([3.5], dtype=torch.float64)]


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
