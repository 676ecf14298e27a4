"""Layer and loss together, forward and backward, and whole training steps of the notes' two models with SGD."""

import functools

import harness
import pytest
import shapes
import torch
import torch.nn.functional as F
from harness import Case, Work
from runner import run_case

import regfast


def build_pair(shape: tuple[int, int, int]) -> Work:
    """linear and cross_entropy as functions; the input is data and needs no gradient."""
    n, d, v = shape
    x, target = torch.randn(n, d), torch.randint(v, (n,))
    w = torch.empty(v, d).normal_(0, 0.01).requires_grad_()
    b = torch.zeros(v, requires_grad=True)
    return Work(
        inputs=[w, b],
        eager=lambda w, b: F.cross_entropy(F.linear(x, w, b), target),
        regfast=lambda w, b: regfast.cross_entropy(regfast.linear(x, w, b), target),
    )


def build_step(shape: tuple[int, int, int], classes: bool) -> Work:
    """Modules as a user writes them. Both models share their parameters, so neither gets easier ones."""
    n, d, v = shape
    x = torch.randn(n, d)
    target = torch.randint(v, (n,)) if classes else torch.randn(n, v)
    layer, fast_layer = torch.nn.Linear(d, v), regfast.Linear(d, v)
    fast_layer.weight, fast_layer.bias = layer.weight, layer.bias
    loss, fast_loss = (
        (torch.nn.CrossEntropyLoss(), regfast.CrossEntropyLoss())
        if classes
        else (torch.nn.MSELoss(), regfast.MSELoss())
    )
    return Work(
        inputs=[layer.weight, layer.bias],
        eager=lambda w, b: loss(layer(x), target),
        regfast=lambda w, b: fast_loss(fast_layer(x), target),
    )


def case(op, mode, shape, build, **more) -> Case:
    n, d, v = shape
    return Case(
        op=op,
        mode=mode,
        dtype=torch.float32,
        shape=shape,
        build=build,
        reads=4 * (2 * n * d + v * d),
        writes=4 * v * d,
        flops=4 * n * d * v,
        formula="4NDV; read ND twice and VD, write VD",
        **more,
    )


def cases() -> list[Case]:
    found = []
    for shape in shapes.TRAINING:
        build = functools.partial(build_pair, shape)
        found.append(case("linear+cross_entropy", "fwd_bwd", shape, build, compile=True, headline=True, quick=True))
        build = functools.partial(build_step, shape, True)
        first = shape == shapes.TRAINING[0]
        found.append(case("softmax_regression", "step", shape, build, compile=first, headline=True))
    build = functools.partial(build_step, shapes.REGRESSION, False)
    found.append(case("linear_regression", "step", shapes.REGRESSION, build, compile=True, headline=True, quick=True))
    return found


CASES = cases()


@pytest.mark.benchmark(group="training")
@harness.parametrize(CASES)
def test_training_step(benchmark, case):
    run_case(benchmark, case, __name__)
