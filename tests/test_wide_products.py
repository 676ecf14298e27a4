"""Products in the accumulator's type, of which the losses of divided vocabularies make their chunks."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from util import HALF, LAYOUTS, MULTIPLIES_PAIRS, check, lay_out, spiky

pytestmark = pytest.mark.kernels("_product", "_add_product_")
product, add_product = (getattr(torch.ops.regfast, name).default for name in ("_product", "_add_product_"))
SHAPES = [(1, 7, 5), (7, 1, 5), (5, 7, 1), (40, 33, 50), (130, 64, 100)]


def acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_acc(a, b):
    return a.to(acc(b.dtype)) @ b.to(acc(b.dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrices(layout, dtype):
    for m, k, n in SHAPES:
        a, b, bias = (lay_out(spiky(*s, dtype=dtype), layout) for s in ((m, k), (k, n), (n,)))
        magnitude = lambda a, b, *_: in_acc(a.abs(), b.abs())  # noqa: E731
        for left, right in ((a, b), (b.T, a.T)):
            check(lambda a, b: product(a, b, None), in_acc, left, right, magnitude=magnitude)
        check(product, lambda a, b, c: in_acc(a, b) + c.to(acc(dtype)), a, b, bias, magnitude=magnitude)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_factor_of_the_accumulators_type(layout, dtype):
    """A logits' gradient beside the weight; beside pairs of bfloat16 it is rounded to it."""
    for m, k, n in SHAPES:
        g, b = lay_out(spiky(m, k, dtype=acc(dtype)), layout), lay_out(spiky(k, n, dtype=dtype), layout)
        exact, size = g.double() @ b.double(), g.double().abs() @ b.double().abs()
        eps = 2.0**-8 if dtype == torch.bfloat16 and MULTIPLIES_PAIRS else 1e-6
        for got in (product(g, b, None), product(b.T, g.T, None).T):
            assert got.dtype == acc(dtype)
            assert ((got - exact).abs() <= eps * size).all()
        for left, right, true in ((g, b, exact), (b.T, g.T, exact.T)):
            start = spiky(*true.shape, dtype=acc(dtype))
            total = start.clone()
            add_product(total, left, right)
            bound = eps * ((size if true is exact else size.T) + start.abs())
            assert ((total - (start + true)).abs() <= bound).all()


def elsewhere(t):
    """The same rows, or columns, at an address that is no multiple of a line."""
    return lay_out(t.T, "misaligned").T if t.stride(0) == 1 else lay_out(t, "misaligned")


def test_bits_are_the_same_at_any_address(dtype):
    # K in whole steps of the micro-kernels and not, one block of it and several, either side the longer one.
    for m, k, n in ((5, 64, 40), (40, 64, 5), (33, 1120, 70), (70, 1100, 33), (200, 2240, 64)):
        for a_type in (dtype, acc(dtype)):
            a, b = spiky(m, k, dtype=a_type), spiky(k, n, dtype=dtype)
            for left, right in ((a, b), (a.T.contiguous().T, b), (a, b.T.contiguous().T)):
                moved = product(elsewhere(left), elsewhere(right), None)
                assert torch.equal(product(left, right, None), moved)


def test_nothing_to_add_up(dtype):
    empty, bias, total = torch.zeros(3, 0, dtype=dtype), spiky(4, dtype=dtype), spiky(3, 4, dtype=acc(dtype))
    before = total.clone()
    assert_close(product(empty, torch.zeros(0, 4, dtype=dtype), None), torch.zeros_like(total))
    assert_close(product(empty, torch.zeros(0, 4, dtype=dtype), bias), bias.to(total.dtype).expand(3, 4))
    add_product(total, empty, torch.zeros(0, 4, dtype=dtype))
    assert_close(total, before)
    assert product(empty.T, torch.zeros(3, 4, dtype=dtype), None).shape == (0, 4)


@pytest.mark.no_kernels("errors")
def test_what_does_not_fit():
    a, b, total = torch.randn(3, 4), torch.randn(4, 5), torch.randn(3, 5)
    for arguments, words in (
        ((a[0], b, None), "a: expected a matrix"),
        ((a, b.T, None), "b: expected 4 rows"),
        ((a, b.int(), None), "b: expected .*, got Int"),
        ((a, b.double(), None), "b: expected Float"),
        ((a.half(), b.bfloat16(), None), "a: expected BFloat16 or Float, got Half"),
        ((a, b, torch.randn(4)), "bias: expected shape"),
        ((a, b.to("meta"), None), "b: expected a tensor on cpu"),
    ):
        with pytest.raises(RuntimeError, match=rf"regfast\._product: {words}"):
            product(*arguments)
    for arguments, words in (
        ((total.double(), a, b), "sum: expected Float"),
        ((total.T, a, b), "sum: expected shape"),
        ((torch.randn(5, 3).T, a, b), "sum: expected a contiguous tensor"),
    ):
        with pytest.raises(RuntimeError, match=rf"regfast\._add_product_: {words}"):
            add_product(*arguments)


@pytest.mark.parametrize("type", [torch.float32, *HALF])
def test_schemas_and_operations(type):
    a, b, bias = spiky(3, 4, dtype=type), spiky(4, 5, dtype=type), spiky(5, dtype=type)
    tests = ("test_schema", "test_faketensor")
    for tensors in ((a, b, None), (a, b, bias), (a.float(), b, None)):
        torch.library.opcheck(product, tensors, test_utils=tests)
    torch.library.opcheck(add_product, (torch.randn(3, 5), a, b), test_utils=tests)
    with FlopCounterMode(display=False) as counter:
        product(a, b, bias)
        add_product(torch.randn(3, 5), a, b)
    assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 5


def test_a_sum_has_memory_of_its_own_and_a_version():
    q, w = torch.randn(130, 130), torch.randn(130, 130)
    for factors in ((q, w), (w, q), (q.t(), w)):
        with pytest.raises(RuntimeError, match="_add_product_: sum: expected memory of its own"):
            add_product(q, *factors)
    with pytest.raises(RuntimeError, match="_add_product_: sum: expected a tensor without a gradient"):
        add_product(q.clone().requires_grad_(), q, w)
    kept, v = torch.randn(3, 5), torch.randn(3, 5, requires_grad=True)
    y = (kept * v).sum()
    add_product(kept, torch.randn(3, 4), torch.randn(4, 5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
