"""Batches of more dimensions than torch takes, and class indices of other types."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from util import class_targets, probability_targets, spiky, with_all_kernels

import regfast
from regfast import reference

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32)
B, T, D, V, P = 2, 3, 5, 7, 4


def with_gradients(fn, *tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    results = fn(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    sums = sum(r.sum() for r in results if r.is_floating_point())
    return [*results, *torch.autograd.grad(sums, leaves)]


@with_all_kernels
@pytest.mark.parametrize("type", INTEGERS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_class_indices_of_any_integer_type(type, reduction):
    x, w, weight, target = spiky(T, D), spiky(V, D), spiky(V).exp(), class_targets((T,), V)
    ignored = {"ignore_index": int(target[1]), "reduction": reduction, "weight": weight}
    for fn, tensors in ((regfast.cross_entropy, [spiky(T, V)]), (regfast.linear_cross_entropy, [x, w])):
        ours, wide = (with_gradients(lambda *t: fn(*t, c, **ignored), *tensors) for c in (target.to(type), target))  # noqa: B023
        assert_close(ours, wide, rtol=0, atol=0)
        # Through the composite too.
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
            assert_close(fn(dual, *tensors[1:], target.to(type), **ignored), wide[0].detach())


@with_all_kernels
def test_truth_values_are_no_classes():
    for fn, tensors in (
        (regfast.cross_entropy, [spiky(T, V)]),
        (regfast.linear_cross_entropy, [spiky(T, D), spiky(V, D)]),
    ):
        with pytest.raises(RuntimeError, match="target: expected Long class indices, got Bool"):
            fn(*tensors, torch.ones(T, dtype=torch.bool))


@with_all_kernels
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["classes", "probabilities", "positions"])
def test_a_batch_of_two_dimensions_is_one_of_rows(reduction, kind):
    x, w = spiky(B, T, D), spiky(V, D)
    target = class_targets((B, T), V, 0.3)
    if kind == "probabilities":
        target = probability_targets(B * T, V).view(B, T, V)
    if kind == "positions":
        w, target = spiky(V, P, D), class_targets((B, T, P), V, 0.3)
    outputs = ("loss", "lse", "argmax") if reduction == "none" else "loss"
    for fn in (regfast.linear_cross_entropy, reference.linear_cross_entropy):
        ours = with_gradients(lambda x, w: fn(x, w, target, reduction=reduction, outputs=outputs), x, w)  # noqa: B023
        flat = with_gradients(
            lambda x, w: fn(x.flatten(0, 1), w, target.flatten(0, 1), reduction=reduction, outputs=outputs),  # noqa: B023
            x,
            w,
        )
        per_row = (B, T, P) if kind == "positions" else (B, T)
        if reduction == "none":
            assert [r.shape for r in ours[:3]] == [per_row] * 3
            flat[:3] = [r.view(per_row) for r in flat[:3]]
        assert_close(ours, flat, rtol=0, atol=0)


def test_a_batch_of_two_dimensions_as_logits_and_cross_entropy():
    x, w, target = spiky(B, T, D), spiky(V, D), class_targets((B, T), V, 0.3)
    true = F.cross_entropy(F.linear(x, w).transpose(1, 2), target)
    assert_close(regfast.linear_cross_entropy(x, w, target), true)
    assert_close(regfast.linear_nll(x, w, target, family="categorical"), true)
    module = regfast.LinearCrossEntropyLoss(D, V, reduction="none")
    assert module(x, target).shape == (B, T)


def test_batches_that_differ_are_refused():
    for target in (class_targets((B, T + 1), V), class_targets((B,), V), class_targets((T, B), V)):
        with pytest.raises(RuntimeError, match=r"target: expected batch \(2, 3\) as input has"):
            regfast.linear_cross_entropy(spiky(B, T, D), spiky(V, D), target)


def test_torch_modules_may_become_ours():
    x = spiky(T, D)
    layer = torch.nn.Linear(D, V)
    true = layer(x)
    layer.__class__ = regfast.Linear
    assert repr(layer).startswith("Linear(in_features=")
    assert_close(layer(x), true)
    for ours in (regfast.CrossEntropyLoss, regfast.MSELoss):
        base = ours.__bases__[0]
        module = base(reduction="sum")
        arguments = (true, class_targets((T,), V)) if "Cross" in base.__name__ else (true, true + 1)
        expected = module(*arguments)
        module.__class__ = ours
        assert_close(module(*arguments), expected)
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        module, target = torch.nn.LinearCrossEntropyLoss(D, V, bias=True), class_targets((T,), V)
        expected = module(x, target)
        module.__class__ = regfast.LinearCrossEntropyLoss
        assert_close(module(x, target), expected)
