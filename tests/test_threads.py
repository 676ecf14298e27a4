"""Every op has the same bits with any number of threads, forward and backward, on both sides of each size at which work
is divided (csrc/cpu/tuning.h). Products are ours here (REGFAST_GEMM=own, see conftest.py): those of ATen are ATen's."""

import pytest
import torch
from linear_nll_cases import FAMILIES, operands, scales, targets
from util import class_targets, lay_out, probability_targets, spiky

import regfast
from regfast import _C

pytestmark = [
    pytest.mark.kernels("linear", "phm_linear", "softmax", "logsumexp", "cross_entropy", "mse_loss"),
    pytest.mark.usefixtures("threads"),
]
THREADS = (1, 2, 3, 7)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    """Integers in the place of numbers, so that NaNs and the signs of zeros count too."""
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def assert_same_bits(fn, *tensors):
    """fn's results and gradients, for upstream gradients that are not one, with each number of threads."""
    runs, seeds = [], []
    for count in THREADS:
        torch.set_num_threads(count)
        leaves = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
        outputs = fn(*leaves)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        roots = [o for o in outputs if o.requires_grad]
        seeds = seeds or [spiky(*o.shape, dtype=o.dtype) for o in roots]
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        runs.append([*outputs, *torch.autograd.grad(roots, wanted, seeds)])
    for count, run in zip(THREADS[1:], runs[1:], strict=True):
        for i, (one, several) in enumerate(zip(runs[0], run, strict=True)):
            different = (bits(one.detach()) != bits(several.detach())).sum().item()
            assert not different, f"result {i} of {tuple(one.shape)}: {different} differ between 1 and {count} threads"


def leaf(*shape, dtype, layout="contiguous"):
    return lay_out(spiky(*shape, dtype=dtype, size=1.0), layout).requires_grad_()


# N, K, V: dot products of few rows and of few columns, B in place along rows and along columns, packed with either side
# longer and K below, at and beyond each block, narrow, K in parts; each with the work of one thread and of several.
PRODUCTS = [
    (1, 300, 700),
    (8, 2050, 700),
    (9, 700, 9),
    (300, 2050, 2),
    (2000, 100, 32),
    (3000, 31, 65),
    (33, 40, 50),
    (130, 257, 140),
    (260, 1025, 130),
    (97, 2050, 300),
    (700, 513, 257),
    (150, 4097, 150),
    (40, 9000, 40),
    (1200, 300, 700),
]


@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
@pytest.mark.parametrize("layouts", [("contiguous", "contiguous"), ("transposed", "padded"), ("strided", "transposed")])
def test_linear(shape, layouts, dtype):
    n, k, v = shape
    x, w = leaf(n, k, dtype=dtype, layout=layouts[0]), leaf(v, k, dtype=dtype, layout=layouts[1])
    for activation in ("none", "gelu"):
        assert_same_bits(
            lambda x, w, b, a=activation: regfast.linear(x, w, b, activation=a), x, w, leaf(v, dtype=dtype)
        )


@pytest.mark.parametrize("rows, part_in, part_out, n", [(3, 100, 90, 4), (60, 70, 65, 4), (900, 129, 130, 2)])
def test_phm_linear(rows, part_in, part_out, n, dtype):
    x, a = leaf(rows, n * part_in, dtype=dtype), leaf(n, n, n, dtype=dtype)
    s, b = leaf(n, part_out, part_in, dtype=dtype), leaf(n * part_out, dtype=dtype)
    for activation in ("none", "silu"):
        assert_same_bits(lambda *t, activation=activation: regfast.phm_linear(*t, activation=activation), x, a, s, b)


# Narrow rows, a vector of rows at a time, rows in one piece and in blocks; all classes adjacent, and rows adjacent.
ROWS = [(5, 3), (3001, 10), (4099, 3), (700, 33), (200, 513), (37, 5000), (3, 70001)]


@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("op", ["softmax", "log_softmax", "logsumexp"])
def test_softmax(op, shape, layout, dtype):
    x = leaf(*shape, dtype=dtype, layout=layout)
    for dim in (0, 1):
        assert_same_bits(lambda x, d=dim: getattr(regfast, op)(x, d), x)


@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
def test_cross_entropy(shape, layout, probabilities, dtype):
    n, c = shape
    target = class_targets((n,), c, 0.2)
    if probabilities:
        target = probability_targets(n, c, dtype=dtype).requires_grad_()
    names = ("loss", "lse", "entropy", "logprob")
    weight = torch.rand(c).to(dtype)
    x = leaf(*shape, dtype=dtype, layout=layout)
    for options in (
        {},
        {"reduction": "none", "label_smoothing": 0.1, "softcap": 5.0},
        {"outputs": names, "z_loss": 0.1},
        {"weight": weight},
    ):
        assert_same_bits(lambda x, t, o=options: regfast.cross_entropy(x, t, **o), x, target)


@pytest.mark.parametrize("size", [(5, 40, 30), (700, 40, 333), (300, 65, 2050)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy(size, reduction, dtype):
    n, d, c = size
    x, w, b = leaf(n, d, dtype=dtype), leaf(c, d, dtype=dtype), leaf(c, dtype=dtype)
    target, weight = class_targets((n,), c, 0.2), torch.rand(c).to(dtype)
    budget = _C.linear_cross_entropy_budget(100, d, c, str(dtype).removeprefix("torch."))
    for options in ({}, {"memory_budget": budget}, {"weight": weight, "label_smoothing": 0.1}, {"filter_eps": 1e-3}):
        assert_same_bits(
            lambda x, w, b, o=options: regfast.linear_cross_entropy(
                x, w, target, linear_bias=b, reduction=reduction, **o
            ),
            x,
            w,
            b,
        )


# One pass over the input with features up to a vector and more, of one part and of several; then the products.
MODELS = [(5, 119, 3), (9001, 7, 2), (9001, 40, 3), (70000, 5, 1), (400, 119, 9), (4100, 300, 17), (3, 5, 40000)]


@pytest.mark.parametrize("size", MODELS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_linear_nll(family, size, dtype):
    n, d, v = size
    x, w, b = operands((n,), d, v, dtype)
    t, weights, scale = targets(family, n, v, dtype=dtype), torch.rand(n).to(dtype), scales(family, v, dtype)
    for layout, mode in (("contiguous", "mean"), ("transposed", "none"), ("strided", "sum")):
        x = lay_out(x.detach(), layout).requires_grad_()

        def loss(x, w, b, scale, mode=mode):
            if family == "squared":
                return regfast.linear_mse_loss(x, w, t, b, reduction=mode, sample_weight=weights)
            options = {"gaussian": {"sigma": scale}, "bernoulli": {"pos_weight": scale}}.get(family, {"full": True})
            return regfast.linear_nll(x, w, t, b, family=family, reduction=mode, sample_weight=weights, **options)

        for each in (scale[0], scale[-1]) if len(scale) > 1 else scale:
            tensor = each if isinstance(each, torch.Tensor) else None
            assert_same_bits(loss, x, w, b, tensor)


@pytest.mark.parametrize("n", [100, 16 * 1024 + 1, 3 * 16 * 1024 + 5, 300001])
@pytest.mark.parametrize("mode", ["none", "mean", "sum"])
def test_mse_loss(n, mode, dtype):
    assert_same_bits(lambda x, y: regfast.mse_loss(x, y, reduction=mode), leaf(n, dtype=dtype), leaf(n, dtype=dtype))


def test_special_values(dtype):
    x = leaf(3001, 40, dtype=dtype)
    with torch.no_grad():
        x[::7, ::3], x[5::11, 1::4], x[::13] = float("inf"), float("nan"), -float("inf")
    w, target = leaf(50, 40, dtype=dtype), class_targets((3001,), 40)
    assert_same_bits(regfast.softmax, x)
    assert_same_bits(lambda x: regfast.logsumexp(x, 1), x)
    assert_same_bits(lambda x, w: regfast.linear(x, w, activation="gelu"), x, w)
    assert_same_bits(lambda x: regfast.cross_entropy(x, target, reduction="none"), x)
