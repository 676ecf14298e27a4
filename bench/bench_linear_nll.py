"""Likelihoods of linear models, against F.linear with the loss of torch that each is named after."""

import functools

import harness
import pytest
import shapes
import torch
import torch.nn.functional as F
from harness import Case, Work
from runner import run_case

import regfast

LOSSES = {
    "squared": F.mse_loss,
    "bernoulli": F.binary_cross_entropy_with_logits,
    "poisson": F.poisson_nll_loss,
}


def build(shape: tuple[int, int, int], family: str, input_gradient: bool) -> Work:
    n, d, v = shape
    x, b = torch.randn(n, d, requires_grad=input_gradient), torch.zeros(v, requires_grad=True)
    w = torch.empty(v, d).normal_(0, d**-0.5).requires_grad_()
    target = {
        "squared": lambda: torch.randn(n, v),
        "bernoulli": lambda: torch.randint(2, (n, v)).float(),
        "poisson": lambda: torch.poisson(torch.rand(n, v) * 3),
    }[family]()
    loss = LOSSES[family]
    ours = regfast.linear_mse_loss if family == "squared" else functools.partial(regfast.linear_nll, family=family)
    return Work(
        inputs=[x, w, b],
        eager=lambda x, w, b: loss(F.linear(x, w, b), target),
        regfast=lambda x, w, b: ours(x, w, target, b),
    )


def case(shape: tuple[int, int, int], family: str, input_gradient: bool = False, **more) -> Case:
    n, d, v = shape
    products, dx = (6, " + ND") if input_gradient else (4, "")
    label = "" if family == "squared" else family
    return Case(
        op="linear_mse_loss" if family == "squared" else "linear_nll",
        mode="fwd_bwd",
        dtype=torch.float32,
        shape=shape,
        label=label + " with dX" * input_gradient,
        build=functools.partial(build, shape, family, input_gradient),
        reads=4 * (n * d + n * v + v * d + v),
        writes=4 * (v * d + v + (n * d if input_gradient else 0)),
        flops=products * n * d * v,
        formula=f"{products}NDV; read ND + NV + VD, write VD{dx}",
        largest=4 * n * v,
        environments=("huge_pages",),
        compile=not input_gradient,
        headline=True,
        **more,
    )


CASES = [case(shape, "squared", quick=shape == shapes.REGRESSION) for shape in shapes.LINEAR_MSE] + [
    case(shapes.LINEAR_NLL, family, input_gradient)
    for family in ("bernoulli", "poisson")
    for input_gradient in (False, True)
]


@pytest.mark.benchmark(group="likelihoods of linear models")
@harness.parametrize(CASES)
def test_likelihood(benchmark, case):
    run_case(benchmark, case, __name__)
