"""FlopCounterMode: the products of each op, forward and backward, as many as those of the operators that it fuses."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_linear import ACTIVATIONS
from torch.utils.flop_counter import FlopCounterMode
from util import class_targets, probability_targets, spiky

import regfast

N, D, V = 12, 8, 6
PRODUCT = 2 * N * D * V


def count(fn, *tensors):
    """Operations of a call and of its backward."""
    counts = []
    with FlopCounterMode(display=False) as counter:
        value = fn(*tensors)
        counts.append(counter.get_total_flops())
        if value.requires_grad:
            value.sum().backward()
    return *counts, counter.get_total_flops() - sum(counts)


def operands(mask, *shapes):
    return [spiky(*shape).requires_grad_(wanted) for shape, wanted in zip(shapes, mask, strict=True)]


def masks(tensors):
    return pytest.mark.parametrize("mask", list(itertools.product([True, False], repeat=tensors)), ids=str)


@masks(3)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_linear(activation, mask):
    for lead in ((N,), (3, N // 3)):
        tensors = operands(mask, (*lead, D), (V, D), (V,))
        ours = count(lambda *t: regfast.linear(*t, activation=activation), *tensors)
        assert ours == count(lambda *t: ACTIVATIONS[activation](F.linear(*t)), *tensors)
        assert ours == (PRODUCT, PRODUCT * sum(mask[:2]))


@masks(3)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_linear_cross_entropy(reduction, mask):
    tensors = operands(mask, (N, D), (V, D), (V,))
    for target in (class_targets((N,), V), probability_targets(N, V)):
        forward, backward = count(
            lambda x, w, b, t=target: regfast.linear_cross_entropy(x, w, t, linear_bias=b, reduction=reduction),
            *tensors,
        )
        pair = count(lambda x, w, b, t=target: F.cross_entropy(F.linear(x, w, b), t, reduction=reduction), *tensors)
        # A loss for each row computes its logits twice, as a checkpoint would.
        again = PRODUCT if reduction == "none" and any(mask) else 0
        assert forward + backward == sum(pair) + again


@masks(3)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("family", ["gaussian", "bernoulli", "poisson"])
def test_linear_nll(family, reduction, mask):
    tensors, target = operands(mask, (N, D), (V, D), (V,)), torch.rand(N, V)
    counted = count(lambda x, w, b: regfast.linear_nll(x, w, target, b, family=family, reduction=reduction), *tensors)
    again = PRODUCT if reduction == "none" and any(mask) else 0
    assert sum(counted) == PRODUCT * (1 + sum(mask[:2])) + again


@masks(4)
@pytest.mark.parametrize("n", [1, 2])
def test_phm_linear(n, mask):
    tensors = operands(mask, (N, D), (n, n, n), (n, V // n, D // n), (V,))
    x, a, s, _ = mask
    forward, backward = count(regfast.phm_linear, *tensors)
    mix = 2 * N * n * n * D  # each of a row's numbers goes into n * n mixed ones
    assert (forward, backward) == (PRODUCT + mix, PRODUCT * ((x or a) + s) + mix * (x + a + s))


def test_inference():
    with torch.inference_mode():
        x, w, target = spiky(N, D), spiky(V, D), class_targets((N,), V)
        assert sum(count(regfast.linear, x, w)) == PRODUCT
        assert sum(count(regfast.linear_cross_entropy, x, w, target)) == PRODUCT


def test_what_multiplies_nothing_counts_nothing():
    x = spiky(N, V).requires_grad_()
    for fn in (regfast.softmax, regfast.logsumexp, lambda x: regfast.mse_loss(x, x.detach() * 2)):
        assert count(fn, x) == (0, 0)
