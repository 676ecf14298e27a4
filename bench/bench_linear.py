"""The fully connected layer: forward and forward with backward, each regime of sizes, half types, an activation."""

import functools

import harness
import pytest
import shapes
import torch
import torch.nn.functional as F
from harness import Case, Work
from runner import run_case

import regfast


def build(shape: tuple[int, int, int], dtype: torch.dtype, activation: str) -> Work:
    n, d, v = shape
    x = torch.empty(n, d, dtype=dtype).normal_().requires_grad_()
    w = torch.empty(v, d, dtype=dtype).normal_(0, d**-0.5).requires_grad_()
    b = torch.empty(v, dtype=dtype).normal_().requires_grad_()
    if activation:
        act = getattr(F, activation)
        return Work([x, w, b], lambda *t: act(F.linear(*t)), lambda *t: regfast.linear(*t, activation=activation))
    return Work([x, w, b], F.linear, regfast.linear, numpy=lambda x, w, b: x @ w.T)


def case(mode, dtype, shape, activation="", environments=("huge_pages",), **more) -> Case:
    n, d, v = shape
    reads, writes, flops, formula = n * d + v * d + v, n * v, 2 * n * d * v, "2NDV; read ND + VD, write NV"
    if mode == "fwd_bwd":  # dX = dY W and dW = dY^T X, each with its own reading of both operands
        reads, writes = 2 * (n * d + v * d) + 2 * n * v, n * v + n * d + v * d
        flops, formula = 6 * n * d * v, "6NDV; read 2ND + 2VD + 2NV, write NV + ND + VD"
    return Case(
        op="linear",
        mode=mode,
        dtype=dtype,
        shape=shape,
        label=activation,
        build=functools.partial(build, shape, dtype, activation),
        reads=reads * dtype.itemsize,
        writes=writes * dtype.itemsize,
        flops=flops,
        formula=formula,
        largest=max(n * v, n * d if mode != "fwd" else 0, v * d if mode != "fwd" else 0) * dtype.itemsize,
        environments=environments,
        **more,
    )


def cases() -> list[Case]:
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    skinny, square, wide = (256, 784, 10), (1024, 1024, 1024), (2048, 1024, 4096)
    found = []
    for shape in shapes.LINEAR:
        for mode in ("fwd", "fwd_bwd"):
            found.append(
                case(
                    mode,
                    f32,
                    shape,
                    compile=mode == "fwd_bwd" and shape == skinny,
                    headline=shape in (skinny, wide),
                    quick=shape == skinny or (shape == square and mode == "fwd"),
                )
            )
    # The halves also on CPUs without instructions for them, where PyTorch's products are slowest.
    without = ("avx512_no_bf16", "avx2")
    for dtype in (bf16, f16):
        for shape in shapes.LINEAR_HALF:
            for mode in ("fwd", "fwd_bwd"):
                found.append(
                    case(
                        mode,
                        dtype,
                        shape,
                        environments=without if shape == square else (),
                        headline=shape == square and dtype == bf16,
                        quick=shape == square and dtype == bf16 and mode == "fwd",
                    )
                )
    for mode in ("fwd", "fwd_bwd"):
        found.append(case(mode, f32, shapes.LINEAR_ACTIVATION, activation="gelu"))
    found.append(case("fwd", f32, skinny, cold=True))
    return found


CASES = cases()


@pytest.mark.benchmark(group="linear")
@harness.parametrize(CASES)
def test_linear(benchmark, case):
    run_case(benchmark, case, __name__)
