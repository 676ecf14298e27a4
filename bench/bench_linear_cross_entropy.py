"""The cross-entropy of a linear classifier, against F.linear with F.cross_entropy and against PyTorch's chunked op."""

import functools

import harness
import pytest
import shapes
import torch
import torch.nn.functional as F
from harness import Case, Work, make_call
from runner import run_case

import regfast

# Products of 2 NVD FLOPs: the logits, and one for each gradient.
PRODUCTS = {"fwd": 1, "fwd_bwd": 3}
CHUNKED = hasattr(torch.nn, "LinearCrossEntropyOptions")  # since torch 2.13
CHUNKS = 8  # after so many, at least, errors are looked at


def matrices(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and weights whose logits have a spread of 3, and targets."""
    n, d, v = shape
    x = torch.empty(n, d, dtype=dtype).normal_().requires_grad_()
    w = torch.empty(v, d, dtype=dtype).normal_(0, 3 * d**-0.5).requires_grad_()
    return x, w, torch.randint(v, (n,))


def unfused(x, w, target):
    return F.cross_entropy(F.linear(x, w), target)


def chunked(x, w, target, **options):
    return F.linear_cross_entropy(x, w, target, options=torch.nn.LinearCrossEntropyOptions(**options))


def build(shape: tuple[int, int, int], dtype: torch.dtype) -> Work:
    x, w, target = matrices(shape, dtype)
    return Work(
        inputs=[x, w],
        eager=functools.partial(unfused, target=target),
        regfast=functools.partial(regfast.linear_cross_entropy, target=target),
        chunked=functools.partial(chunked, target=target) if CHUNKED else None,
        errors=functools.partial(weight_gradient_errors, x, w, target) if dtype == torch.bfloat16 else None,
    )


def build_parts(shape: tuple[int, int, int], dtype: torch.dtype) -> Work:
    """Calls that leave out some of the work."""
    x, w, target = matrices(shape, dtype)
    half = target.clone()
    half[torch.randperm(len(half))[: len(half) // 2]] = -100
    loss = functools.partial(regfast.linear_cross_entropy, target=target)
    work = Work([x, w], functools.partial(unfused, target=target), loss)
    work.parts = {
        "half of the rows ignored": make_call(
            functools.partial(regfast.linear_cross_entropy, target=half), work.inputs, "fwd_bwd"
        ),
        "W frozen": make_call(lambda x: loss(x, w.detach()), [x], "fwd_bwd"),
        "no gradient": make_call(loss, work.inputs, "fwd"),
    }
    return work


def build_peaked(shape: tuple[int, int, int], dtype: torch.dtype) -> Work:
    """A trained model's rows: the target and ten other classes have nearly all of the probability."""
    n, _, v = shape
    x, w, target = matrices(shape, dtype)
    with torch.no_grad():
        x.copy_(2 * w[target] + 1.5 * w[torch.randint(v, (n, 10))].sum(1))
    loss = functools.partial(regfast.linear_cross_entropy, target=target)
    work = Work([x, w], functools.partial(unfused, target=target), loss)
    work.parts = {
        f"filter_eps = 2^{power}": make_call(functools.partial(loss, filter_eps=2.0**power), work.inputs, "fwd_bwd")
        for power in (-20, -12)
    }
    return work


def weight_gradient_errors(x, w, target) -> dict[str, float]:
    """Relative error against float64 of the weight's gradient, a sum over chunks that a half type could spoil."""
    rows = len(x) // CHUNKS
    budget = 4 * rows * len(w)  # of the float32 logits of that many rows
    plan = regfast.linear_cross_entropy_plan(*x.shape, len(w), x.dtype, memory_budget=budget)
    assert plan.chunks >= CHUNKS, plan
    functions = {
        "PyTorch": unfused,
        f"regfast in {plan.chunks} chunks": functools.partial(regfast.linear_cross_entropy, memory_budget=budget),
    }
    if CHUNKED:
        functions[f"PyTorch's in {CHUNKS}"] = functools.partial(chunked, batch_chunk_size=rows, chunking_method=None)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    (truth,) = torch.autograd.grad(unfused(*exact, target), exact[1])
    return {
        name: ((torch.autograd.grad(fn(x, w, target), w)[0] - truth).norm() / truth.norm()).item()
        for name, fn in functions.items()
    }


def case(mode, dtype, shape, label="", build=build, **more) -> Case:
    n, d, v = shape
    reads, writes, formula = n * d + v * d, 0, "2NVD; read ND + VD"
    if mode == "fwd_bwd":
        writes, formula = n * d + v * d, "6NVD; read ND + VD, write ND + VD"
    return Case(
        op="linear_cross_entropy",
        mode=mode,
        dtype=dtype,
        shape=shape,
        label=label,
        build=functools.partial(build, shape, dtype),
        reads=reads * dtype.itemsize,
        writes=writes * dtype.itemsize,
        flops=2 * PRODUCTS[mode] * n * d * v,
        formula=formula,
        largest=n * v * dtype.itemsize,
        **more,
    )


def rows() -> list[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    found = []
    for shape in shapes.LINEAR_CROSS_ENTROPY:
        for mode in ("fwd", "fwd_bwd"):
            small, both = shape in shapes.LINEAR_CROSS_ENTROPY_SMALL, mode == "fwd_bwd"
            found.append(
                case(
                    mode,
                    f32,
                    shape,
                    environments=() if small else ("huge_pages",),
                    compile=both,
                    headline=both and not small,
                    quick=small and shape[2] == 1000,
                )
            )
    for mode in ("fwd", "fwd_bwd"):
        both = mode == "fwd_bwd"
        found.append(case(mode, bf16, shapes.LINEAR_CROSS_ENTROPY_HALF, compile=both, headline=both))
    return found


def parts() -> list[Case]:
    shape = shapes.LINEAR_CROSS_ENTROPY_OPTIONS
    return [
        case("fwd_bwd", torch.float32, shape, "parts", build_parts),
        case("fwd_bwd", torch.float32, shape, "peaked", build_peaked),
    ]


def vocabularies() -> list[Case]:
    n, d = shapes.VOCABULARIES_ROWS
    return [case("fwd_bwd", torch.float32, (n, d, v), vocabulary=True) for v in shapes.VOCABULARIES]


ROWS, PARTIAL, VOCABULARIES = rows(), parts(), vocabularies()
CASES = ROWS + PARTIAL + VOCABULARIES  # where worker.py finds them


@pytest.mark.benchmark(group="linear cross-entropy")
@harness.parametrize(ROWS)
def test_against_pytorch(benchmark, case):
    run_case(benchmark, case, __name__)


@pytest.mark.benchmark(group="linear cross-entropy, less work")
@harness.parametrize(PARTIAL)
def test_less_work(benchmark, case):
    run_case(benchmark, case, __name__)


@pytest.mark.benchmark(group="linear cross-entropy over V")
@harness.parametrize(VOCABULARIES)
def test_vocabulary(benchmark, case):
    run_case(benchmark, case, __name__)
