"""A weight that is a sum of Kronecker products: against PyTorch, which stores it, and beside dense layers."""

import functools
from functools import reduce

import harness
import pytest
import shapes
import torch
import torch.nn.functional as F
from harness import Case, Work, make_call
from runner import run_case

import regfast


def composed(x, a, s, b):
    return F.linear(x, reduce(torch.add, map(torch.kron, a, s)), b)


def build(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Work:
    """Inputs and parameters as PHMLinear passes them."""
    rows, d, q, n = shape
    layer = regfast.PHMLinear(d, q, n, dtype=dtype)
    x = torch.empty(rows, d, dtype=dtype).normal_().requires_grad_()
    return Work([x, layer.a, layer.matrices.detach().requires_grad_(), layer.bias], composed, regfast.phm_linear)


def build_dense(shape: tuple[int, int, int, int], dtype: torch.dtype, mode: str) -> Work:
    """Dense layers of the same size, beside which phm_linear reads an n-th of the weights."""
    work, (_, d, q, _) = build(shape, dtype), shape
    dense = torch.nn.Linear(d, q, dtype=dtype)
    inputs = [work.inputs[0].detach().clone().requires_grad_(), dense.weight, dense.bias]
    contiguous = [t.detach().contiguous().requires_grad_() for t in work.inputs]
    out = torch.empty(shape[0], q, dtype=dtype).normal_() if mode == "fwd_bwd" else None
    work.parts = {
        "regfast.linear": make_call(regfast.linear, inputs, mode, out),
        "F.linear": make_call(F.linear, inputs, mode, out),
        "s in another layout": make_call(regfast.phm_linear, contiguous, mode, out),
    }
    return work


def case(mode, dtype, shape, build=build, label="", **more) -> Case:
    n, d, v, blocks = shape
    weights = d * v // blocks
    reads, writes, formula = n * d + weights, n * v, "2NDV; read ND + DV/n, write NV"
    if mode == "fwd_bwd":  # two products more, each with its own reading of both operands
        reads, writes = 2 * (n * d + weights) + 2 * n * v, n * v + n * d + weights
        formula = "6NDV; read 2ND + 2DV/n + 2NV, write NV + ND + DV/n"
    return Case(
        op="phm_linear",
        mode=mode,
        dtype=dtype,
        shape=shape,
        label=label,
        build=functools.partial(build, shape, dtype),
        reads=reads * dtype.itemsize,
        writes=writes * dtype.itemsize,
        flops=(2 if mode == "fwd" else 6) * n * d * v,
        formula=formula,
        largest=max(n * v, d * v) * dtype.itemsize,
        **more,
    )


def cases() -> tuple[list[Case], list[Case]]:
    found, dense = [], []
    for shape in shapes.PHM_LINEAR:
        for mode in ("fwd", "fwd_bwd"):
            wide = shape == shapes.PHM_LINEAR[0]
            found.append(
                case(mode, torch.float32, shape, headline=wide, peak=wide and mode == "fwd_bwd", quick=shape[0] <= 8)
            )
            parts = functools.partial(build_dense, mode=mode)
            dense.append(case(mode, torch.float32, shape, parts, "beside dense layers", quick=shape[0] == 8))
    found.append(case("fwd", torch.bfloat16, shapes.PHM_LINEAR_HALF))
    return found, dense


ROWS, DENSE = cases()
CASES = ROWS + DENSE  # where worker.py finds them


@pytest.mark.benchmark(group="phm_linear")
@harness.parametrize(ROWS)
def test_against_pytorch(benchmark, case):
    run_case(benchmark, case, __name__)


@pytest.mark.benchmark(group="phm_linear, dense layers")
@harness.parametrize(DENSE)
def test_beside_dense_layers(benchmark, case):
    run_case(benchmark, case, __name__)
