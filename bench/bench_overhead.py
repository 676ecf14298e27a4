"""What one call of each op costs before any arithmetic: inputs of 4 x 8, one thread's worth of nothing."""

import functools
from collections.abc import Callable

import harness
import pytest
import shapes
import torch
import torch.nn.functional as F
from harness import Case, Work
from runner import run_case

import regfast

N, C = shapes.TINY


def build(pair: Callable[[], tuple[Callable, Callable]], weights: bool) -> Work:
    x = torch.randn(N, C, requires_grad=True)
    inputs = [x]
    if weights:
        inputs += [torch.randn(C, C, requires_grad=True), torch.randn(C, requires_grad=True)]
    eager, fast = pair()
    return Work(inputs, eager, fast)


def linear():
    return F.linear, regfast.linear


def linear_relu():
    return lambda *t: F.relu(F.linear(*t)), lambda *t: regfast.linear(*t, activation="relu")


def softmax():
    return lambda x: torch.softmax(x, -1), lambda x: regfast.softmax(x, -1)


def log_softmax():
    return lambda x: torch.log_softmax(x, -1), lambda x: regfast.log_softmax(x, -1)


def logsumexp():
    return lambda x: torch.logsumexp(x, -1), lambda x: regfast.logsumexp(x, -1)


def cross_entropy():
    target = torch.randint(C, (N,))
    return lambda x: F.cross_entropy(x, target), lambda x: regfast.cross_entropy(x, target)


def mse_loss():
    target = torch.randn(N, C)
    return lambda x: F.mse_loss(x, target), lambda x: regfast.mse_loss(x, target)


def linear_cross_entropy():
    target = torch.randint(C, (N,))
    return (
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), target),
        lambda x, w, b: regfast.linear_cross_entropy(x, w, target, linear_bias=b),
    )


def linear_mse_loss():
    target = torch.randn(N, C)
    return (
        lambda x, w, b: F.mse_loss(F.linear(x, w, b), target),
        lambda x, w, b: regfast.linear_mse_loss(x, w, target, b),
    )


LAYERS = linear, linear_relu, linear_cross_entropy, linear_mse_loss


def cases() -> list[Case]:
    found = []
    for pair in (*LAYERS, softmax, log_softmax, logsumexp, cross_entropy, mse_loss):
        weights = pair in LAYERS
        for mode in ("fwd", "fwd_bwd"):
            found.append(
                Case(
                    op=pair.__name__,
                    mode=mode,
                    dtype=torch.float32,
                    shape=(N, C, C) if weights else (N, C),
                    build=functools.partial(build, pair, weights),
                    label="overhead",
                    formula="none: a call",
                    compile=mode == "fwd" and pair in (linear, cross_entropy),
                    quick=pair is cross_entropy,
                )
            )
    return found


CASES = cases()


@pytest.mark.benchmark(group="overhead")
@harness.parametrize(CASES)
def test_overhead(benchmark, case):
    run_case(benchmark, case, __name__)
