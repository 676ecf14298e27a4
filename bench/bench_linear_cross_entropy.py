"""The cross-entropy of a linear classifier, against F.linear with F.cross_entropy and against PyTorch's chunked op."""

import functools

import harness
import pytest
import shapes
import torch
import torch.nn.functional as F
from harness import Case, Work
from runner import run_case

import regfast

# Products of 2 NVD FLOPs: the logits, and one for each gradient.
PRODUCTS = {"fwd": 1, "fwd_bwd": 3}


def build(shape: tuple[int, int, int], dtype: torch.dtype, label: str) -> Work:
    n, d, v = shape
    x = torch.empty(n, d, dtype=dtype).normal_().requires_grad_()
    w = torch.empty(v, d, dtype=dtype).normal_(0, 3 * d**-0.5).requires_grad_(label != "frozen W")
    target = torch.randint(v, (n,))
    if label == "half ignored":
        target[torch.randperm(n)[: n // 2]] = -100

    def chunked(x, w):
        return F.linear_cross_entropy(x, w, target, options=torch.nn.LinearCrossEntropyOptions())

    return Work(
        inputs=[x, w],
        eager=lambda x, w: F.cross_entropy(F.linear(x, w), target),
        regfast=lambda x, w: regfast.linear_cross_entropy(x, w, target),
        chunked=chunked,
    )


def case(mode, dtype, shape, label="", environments=("chunked",), **more) -> Case:
    n, d, v = shape
    rows, products = n, PRODUCTS[mode]
    reads, writes, formula = n * d + v * d, 0, "2NVD; read ND + VD"
    if mode == "fwd_bwd":
        writes, formula = n * d + v * d, "6NVD; read ND + VD, write ND + VD"
    if label == "frozen W":
        products, writes, formula = 2, n * d, "4NVD; read ND + VD, write ND"
    if label == "half ignored":
        rows, formula = n - n // 2, formula + ", with N the rows that are not ignored"
    return Case(
        op="linear_cross_entropy",
        mode=mode,
        dtype=dtype,
        shape=shape,
        label=label,
        build=functools.partial(build, shape, dtype, label),
        reads=reads * dtype.itemsize,
        writes=writes * dtype.itemsize,
        flops=2 * products * rows * d * v,
        formula=formula,
        largest=n * v * dtype.itemsize,
        environments=environments,
        **more,
    )


def cases() -> list[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    found = []
    for shape in shapes.LINEAR_CROSS_ENTROPY:
        for mode in ("fwd", "fwd_bwd"):
            both, small = mode == "fwd_bwd", shape in shapes.LINEAR_CROSS_ENTROPY_SMALL
            others = ("chunked",) if small else ("huge_pages", "chunked")
            found.append(
                case(
                    mode, f32, shape, environments=others, headline=both and not small, quick=small and shape[2] == 1000
                )
            )
    for mode in ("fwd", "fwd_bwd"):
        found.append(case(mode, bf16, shapes.LINEAR_CROSS_ENTROPY_HALF, headline=mode == "fwd_bwd"))
    for label in ("half ignored", "frozen W"):
        found.append(case("fwd_bwd", f32, shapes.LINEAR_CROSS_ENTROPY_OPTIONS, label=label))
    n, d = shapes.VOCABULARIES_ROWS
    for v in shapes.VOCABULARIES:
        found.append(case("fwd_bwd", f32, (n, d, v), vocabulary=True))
    return found


CASES = cases()


@pytest.mark.benchmark(group="linear cross-entropy")
@harness.parametrize(CASES)
def test_linear_cross_entropy(benchmark, case):
    run_case(benchmark, case, __name__)
