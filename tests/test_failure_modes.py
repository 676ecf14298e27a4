"""One test per failure that hurt users of other kernels for these losses: each was in released, tested code once.

Some have their home elsewhere: logits clobbered in place, rounding twice and infinite logits in
test_cross_entropy_semantics.py; a loss that changes under torch.compile in test_compile.py; accumulation in half
precision and the bias gradient of a frozen weight in test_linear.py; mixed precision in test_autocast.py; memory and
a second backward in test_runtime.py.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from util import class_targets, probability_targets, spiky

import regfast


def gradients(loss, inputs, seed=None):
    return torch.autograd.grad(loss, inputs, seed)


def test_every_row_is_scaled_by_its_own_grad_output():
    # All rows were scaled by the first row's.
    x, target = spiky(9, 12).requires_grad_(), class_targets((9,), 12, 0.2)
    seed = torch.linspace(-2, 5, 9)
    (grad,) = gradients(regfast.cross_entropy(x, target, reduction="none"), x, seed)
    one_by_one = [
        gradients(regfast.cross_entropy(x[i : i + 1], target[i : i + 1], reduction="none"), x, seed[i : i + 1])[0]
        for i in range(9)
    ]
    assert_close(grad, sum(one_by_one))


@pytest.mark.parametrize("seed", [0.0, 1.0, -3.0, 1e-4])
def test_a_scalar_grad_output_other_than_one(seed):
    # Tests only took the path that skips a multiplication by one.
    x, target = spiky(9, 12).requires_grad_(), class_targets((9,), 12, 0.2)
    for mode in ("mean", "sum"):
        ours, true = (
            gradients(fn(x, target, reduction=mode), x, torch.tensor(seed))[0]
            for fn in (regfast.cross_entropy, F.cross_entropy)
        )
        assert_close(ours, true)
        if seed:
            assert ours.any()


def test_a_grad_output_of_stride_zero_or_two():
    # Strides of grad_output were taken for granted: expanded ones read beyond their end.
    x, target = spiky(9, 12).requires_grad_(), class_targets((9,), 12, 0.2)
    for seed in (torch.tensor(0.7).expand(9), torch.arange(18.0)[::2], torch.randn(9, 5)[:, 3]):
        ours, true = (
            gradients(fn(x, target, reduction="none"), x, seed)[0] for fn in (regfast.cross_entropy, F.cross_entropy)
        )
        assert_close(ours, true)


def test_mean_counts_valid_rows_only():
    # The mean was over all rows, and a test compared the loss with itself.
    x = torch.zeros(4, 8)
    target = torch.tensor([1, -100, -100, 2])
    assert_close(regfast.cross_entropy(x, target), torch.tensor(8.0).log())
    assert_close(regfast.cross_entropy(x, target, reduction="sum"), 2 * torch.tensor(8.0).log())


def test_loss_without_any_gradient():
    # The loss was 0 when the input required no gradient.
    x, target = spiky(9, 12), class_targets((9,), 12, 0.2)
    true = F.cross_entropy(x, target)
    assert_close(regfast.cross_entropy(x, target), true)
    with torch.no_grad():
        assert_close(regfast.cross_entropy(x.clone().requires_grad_(), target), true)
    with torch.inference_mode():
        assert_close(regfast.cross_entropy(x, target), true)


def test_a_linear_probe_trains():
    # The weight got no gradient when the input was frozen.
    w = spiky(5, 7).requires_grad_()
    loss = regfast.cross_entropy(regfast.linear(spiky(9, 7), w), class_targets((9,), 5))
    loss.backward()
    assert w.grad is not None and w.grad.any()


def test_a_frozen_weight_lets_the_gradient_through():
    x, w = spiky(9, 7).requires_grad_(), spiky(5, 7)
    (grad,) = gradients(regfast.linear(x, w).square().sum(), x)
    assert_close(grad, 2 * (x @ w.T) @ w)


def test_smoothing_spreads_over_all_classes():
    # Libraries disagree about the class itself and about the number of classes; torch gives every class a / C.
    x, target = spiky(6, 10, dtype=torch.float64), class_targets((6,), 10)
    smooth = torch.full((6, 10), 0.3 / 10, dtype=torch.float64)
    smooth[torch.arange(6), target] += 0.7
    assert_close(regfast.cross_entropy(x, target, label_smoothing=0.3), -(smooth * x.log_softmax(1)).sum(1).mean())


def test_smoothing_of_confident_rows_does_not_underflow():
    # log(softmax(x)) is -inf where log_softmax(x) is -150.
    x = torch.zeros(2, 5)
    x[:, 0] = 150
    assert_close(regfast.cross_entropy(x, torch.zeros(2, dtype=torch.int64), label_smoothing=0.5), torch.tensor(60.0))


def test_weights_with_smoothing_and_ignored_rows():
    # This combination read beyond the weights once.
    x, target = spiky(9, 12).requires_grad_(), class_targets((9,), 12, 0.5)
    for mode in ("none", "mean", "sum"):
        options = {"weight": torch.rand(12), "label_smoothing": 0.1, "reduction": mode}
        ours, true = regfast.cross_entropy(x, target, **options), F.cross_entropy(x, target, **options)
        assert_close(ours, true)
        assert_close(gradients(ours.sum() * 2, x), gradients(true.sum() * 2, x))


def test_z_loss_leaves_class_weights_and_ignored_rows_alone():
    # z_loss was multiplied by class weights in some, and counted ignored rows in others.
    x, weight = spiky(6, 10, dtype=torch.float64), torch.rand(10, dtype=torch.float64)
    target = torch.tensor([1, -100, 3, 0, -100, 9])
    plain = regfast.cross_entropy(x, target, weight, reduction="none")
    penalty = 0.2 * torch.logsumexp(x, 1).square() * (target != -100)
    assert_close(regfast.cross_entropy(x, target, weight, reduction="none", z_loss=0.2), plain + penalty)


def test_layout_of_tokens_after_classes():
    # (B, C, T) was 60 times slower through a transpose; the numbers are those of (B * T, C).
    x, target = spiky(3, 11, 8).requires_grad_(), class_targets((3, 8), 11, 0.2)
    flat = x.transpose(1, 2).reshape(-1, 11)
    ours, true = regfast.cross_entropy(x, target), regfast.cross_entropy(flat, target.flatten())
    assert_close(ours, true)
    assert_close(gradients(ours, x), gradients(true, x))


def test_gradient_of_probability_targets():
    # No fused kernel had one.
    x, target = spiky(6, 10), probability_targets(6, 10).requires_grad_()
    (grad,) = gradients(regfast.cross_entropy(x, target, reduction="sum"), target)
    assert_close(grad, -x.log_softmax(1))


def test_entropy_of_policies_is_differentiable():
    # Entropy came without a gradient, or from probabilities of size N x C kept for it.
    x = spiky(6, 10).requires_grad_()
    (grad,) = gradients(regfast.cross_entropy(x, class_targets((6,), 10), outputs="entropy").sum(), x)
    p = x.softmax(1)
    (true,) = gradients(-(p * p.log()).sum(), x)
    assert_close(grad, true)


def test_one_class_and_one_row():
    # V = 1: the loss is 0 and its gradient too, not NaN.
    x = torch.tensor([[3.0]], requires_grad=True)
    loss = regfast.cross_entropy(x, torch.tensor([0]))
    assert loss == 0 and gradients(loss, x)[0] == 0


def test_indices_of_other_integer_types_are_not_misread():
    # int32 targets were read as half as many int64.
    x, target = spiky(4, 5), torch.tensor([1, 2, 3, 4])
    assert_close(regfast.cross_entropy(x, target.int()), F.cross_entropy(x, target))
