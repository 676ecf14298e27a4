"""softmax, log_softmax and logsumexp: values and gradients against float64, dimensions, layouts, infinities, errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from util import (
    INF,
    LAYOUTS,
    NAN,
    assert_as_good,
    assert_same_error,
    check,
    evaluate,
    lay_out,
    spiky,
    virtual,
    with_all_kernels,
)

import regfast

pytestmark = pytest.mark.kernels("softmax", "logsumexp")

OPS = {
    "softmax": (regfast.softmax, F.softmax),
    "log_softmax": (regfast.log_softmax, F.log_softmax),
    "logsumexp": (regfast.logsumexp, torch.logsumexp),
}

# rows, classes
SHAPES = [
    (1, 1),
    (3, 2),  # less than a vector
    (300, 10),  # many short rows
    (5, 17),  # a vector and a tail
    (7, 129),
    (4, 2048),  # one cache block exactly
    (4, 2051),  # one cache block and a tail
    (2, 12000),
]

op = pytest.mark.parametrize("op", OPS)


def expansions(up):
    """A sum's gradient, and those of sums over classes (dimension 1), over rows, and over all but rows."""
    yield up.flatten()[0].expand(up.shape)
    yield up[:, :1].expand(up.shape)
    yield up[:1].expand(up.shape)
    yield up.flatten(1)[:, :1].view(-1, *[1] * (up.dim() - 1)).expand(up.shape)


@op
@pytest.mark.parametrize(
    "shape",
    [(70, 3), (70, 20), (37, 100), (5, 2100), (3, 5, 33), (3, 21, 4, 32), (2, 70, 15), (2, 600, 130), (3, 1000, 7, 7)],
    ids=str,
)
def test_expanded_gradients(op, shape, dtype, device):
    """As those that are written out; a softmax's is zero but for rounding where all classes have one number."""
    ours = OPS[op][0]
    x, up = (spiky(*shape, dtype=dtype, device=device).requires_grad_() for _ in range(2))
    y = ours(x, 1)
    for grad in expansions(up.detach()):
        grad = grad[:, 0] if op == "logsumexp" else grad
        results = [torch.autograd.grad(y, x, g, retain_graph=True)[0].double() for g in (grad, grad.contiguous())]
        eps = 8 * torch.finfo(dtype).eps
        size = grad.abs().double().mean().item() * (shape[1] if op == "log_softmax" else 1)
        torch.testing.assert_close(*results, rtol=eps, atol=eps * size)


@op
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(op, shape, dtype, device):
    ours, theirs = OPS[op]
    x = spiky(*shape, dtype=dtype, device=device, size=8).requires_grad_()
    check(lambda x: ours(x, -1), lambda x: theirs(x, -1), x)


@with_all_kernels
@op
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2, -4])
def test_any_dimension(op, dim, dtype):
    ours, theirs = OPS[op]
    x = spiky(5, 9, 4, 7, dtype=dtype).requires_grad_()
    check(lambda x: ours(x, dim), lambda x: theirs(x, dim), x)


@with_all_kernels
@with_all_kernels
@op
@pytest.mark.parametrize("positions", [7, 33, 130])  # less than a vector, several and a rest, many
@pytest.mark.parametrize("plane", [520, 2048])  # the latter whole pages, of all dtypes
def test_classes_apart(op, plane, positions, dtype):
    # Around what a vector, a tile, and a set of the cache hold of them.
    ours, theirs = OPS[op]
    for classes in (8, 9, 21, 65, 130, 260):
        x, up = (torch.zeros(2, classes, plane, dtype=dtype)[:, :, :positions] for _ in range(2))
        x.copy_(spiky(2, classes, positions, dtype=dtype))
        up.copy_(spiky(2, classes, positions, dtype=dtype))
        grads = [up[:, 0] if op == "logsumexp" else up]
        check(lambda x: ours(x, 1), lambda x: theirs(x, 1), x.requires_grad_(), grads=grads)


@op
@pytest.mark.parametrize("layout", (*LAYOUTS, "channels_last"))
@pytest.mark.parametrize("dim", [0, 1, 3])
def test_layouts(op, layout, dim):
    ours, theirs = OPS[op]
    x = lay_out(spiky(3, 18, 5, 11), layout).requires_grad_()
    check(lambda x: ours(x, dim), lambda x: theirs(x, dim), x)


@with_all_kernels
@op
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_gradient(op, layout, dtype):
    ours, theirs = OPS[op]
    x = spiky(6, 19, 5, dtype=dtype).requires_grad_()
    grad = lay_out(spiky(6, 5, dtype=dtype) if op == "logsumexp" else spiky(6, 19, 5, dtype=dtype), layout)
    check(lambda x: ours(x, 1), lambda x: theirs(x, 1), x, grads=[grad])


def test_default_dimension_is_the_last():
    x = spiky(3, 4, 5)
    assert_as_good(regfast.softmax(x), F.softmax(x, -1), F.softmax(x.double(), -1))
    assert_as_good(regfast.log_softmax(x), F.log_softmax(x, -1), F.log_softmax(x.double(), -1))
    assert_as_good(regfast.logsumexp(x), torch.logsumexp(x, -1), torch.logsumexp(x.double(), -1))


@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
@pytest.mark.parametrize(
    "given_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64], ids=str
)
@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_argument(op, given_dtype, asked):
    ours, theirs = OPS[op]
    x = (spiky(5, 33) * 2).to(given_dtype).requires_grad_(given_dtype.is_floating_point)
    check(
        lambda x: ours(x, 1, dtype=asked),
        lambda x: theirs(x, 1, dtype=asked),
        x,
        exact=lambda x: theirs((x if asked.itemsize >= given_dtype.itemsize else x.to(asked)).double(), 1),
    )


@with_all_kernels
@pytest.mark.parametrize("dim", [(0, 1), (0, 2), (2, 0), (-1, -2, -3), [1], (1,)], ids=str)
@pytest.mark.parametrize("keepdim", [False, True])
def test_logsumexp_over_several_dimensions(dim, keepdim):
    x = spiky(5, 6, 7).requires_grad_()
    check(lambda x: regfast.logsumexp(x, dim, keepdim), lambda x: torch.logsumexp(x, dim, keepdim), x)


@with_all_kernels
def test_logsumexp_keeps_the_dimension_when_asked(dtype):
    x = spiky(5, 6, 7, dtype=dtype).requires_grad_()
    for dim in (0, 1, 2):
        check(lambda x, d=dim: regfast.logsumexp(x, d, True), lambda x, d=dim: torch.logsumexp(x, d, True), x)


@pytest.mark.composite("has no kernel")
def test_logsumexp_of_integers_is_floating():
    for x in (torch.randint(-5, 5, (4, 6)), torch.randint(2, (4, 6)).bool()):
        torch.testing.assert_close(regfast.logsumexp(x, 1), torch.logsumexp(x, 1))


@with_all_kernels
@op
def test_no_dimensions(op):
    ours, theirs = OPS[op]
    for dim in (0, -1):
        check(lambda x, d=dim: ours(x, d), lambda x, d=dim: theirs(x, d), torch.tensor(3.5, requires_grad=True))


@with_all_kernels
@op
@pytest.mark.parametrize("shape, dim", [((0, 5), 1), ((0, 5), 0), ((4, 0, 3), 0), ((4, 0, 3), 1), ((0,), 0)], ids=str)
def test_empty(op, shape, dim):
    ours, theirs = OPS[op]
    x = torch.empty(shape, requires_grad=True)
    check(lambda x: ours(x, dim), lambda x: theirs(x, dim), x)


@with_all_kernels
@op
@pytest.mark.parametrize("dim", [0, 1])
def test_infinities_and_nan(op, dim, dtype):
    ours, theirs = OPS[op]
    rows = torch.tensor(
        [
            [-INF, 1.0, 2.0, -INF, 0.5],  # masked classes: probability 0, log -inf
            [-INF, -INF, -INF, -INF, -INF],  # nothing left: NaN, and logsumexp -inf
            [INF, 0.0, 1.0, -INF, 2.0],
            [INF, INF, 0.0, 0.0, 0.0],
            [NAN, 0.0, 1.0, 2.0, 3.0],
            [-INF, NAN, -INF, 0.0, 0.0],
            [1.0, 2.0, 3.0, 4.0, 5.0],  # stays finite next to them
        ],
        dtype=dtype,
    )
    # A long row takes the vector path, a short one the tail.
    for x in (rows, torch.cat([rows] * 9, 1)):
        x = x if dim == 1 else x.T
        torch.testing.assert_close(ours(x, dim), theirs(x, dim), equal_nan=True)
    masked = rows[[0, 6]].contiguous()
    check(
        lambda x: ours(x, dim),
        lambda x: theirs(x, dim),
        (masked if dim == 1 else masked.T).detach().requires_grad_(),
    )


@with_all_kernels
@op
def test_huge_and_offset_logits(op, dtype):
    # exp overflows without the shift by the maximum; the shift must be exact for offsets that dwarf the differences.
    ours, theirs = OPS[op]
    largest = torch.finfo(dtype).max
    x = torch.stack([spiky(21) + 1000, spiky(21) - 1000, spiky(21) * 300, spiky(21)]).to(dtype)
    check(lambda x: ours(x, 1), lambda x: theirs(x, 1), x.requires_grad_())
    extreme = torch.tensor([[largest, -largest, 0.0], [largest, largest, largest], [-largest] * 3], dtype=dtype)
    torch.testing.assert_close(ours(extreme, 1), theirs(extreme, 1), equal_nan=True)


# Columns in lanes where they lie (classes up to kLaneClasses = 512), and in tiles whose sums are put aside (8192).
@pytest.mark.parametrize("classes", [40, 512, 513, 2048, 8192, 9000])
@pytest.mark.parametrize("below", [-20.0, -17.0, -0.3, -0.01, 0.0])
def test_sums_down_columns_lose_no_terms(classes, below):
    """Equal terms beside a large one, each of which may be less than the last digit of the sum."""
    x = torch.full((classes, 40), below)
    x[classes // 3] = 0
    exact = x.double().log_softmax(0)
    torch.testing.assert_close(regfast.log_softmax(x, 0).double(), exact, rtol=2e-6, atol=1e-12)
    torch.testing.assert_close(regfast.softmax(x, 0).double(), exact.exp(), rtol=2e-6, atol=0)


@with_all_kernels
def test_log_softmax_keeps_small_probabilities():
    # log(softmax) underflows to -inf where log_softmax is -200.
    x = torch.tensor([[200.0, 0.0, 100.0]])
    assert torch.equal(regfast.log_softmax(x, 1), torch.tensor([[0.0, -200.0, -100.0]]))


@op
def test_same_bits_on_every_run(op, dtype):
    x = spiky(130, 517, dtype=dtype).requires_grad_()
    out, grad, grads = evaluate(lambda x: OPS[op][0](x, 1), [x], None)
    for _ in range(3):
        again = evaluate(lambda x: OPS[op][0](x, 1), [x], grads)
        assert torch.equal(out[0], again[0][0]) and torch.equal(grad[0], again[1][0])


@op
def test_offsets_beyond_2_31_elements(op):
    ours, theirs = OPS[op]
    stride = 2**30 + 8
    for shape, strides in (((3, 20), (stride, 1)), ((20, 3), (1, stride))):
        x = virtual(2 * stride + 24, torch.bfloat16).as_strided(shape, strides)
        x.copy_(spiky(*shape)).requires_grad_()
        check(lambda x: ours(x, 1), lambda x: theirs(x, 1), x)


@with_all_kernels
@given(
    op=st.sampled_from(list(OPS)),
    shape=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(op, shape, data, dtype, layout):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    torch.manual_seed(sum(shape))
    ours, theirs = OPS[op]
    x = lay_out(spiky(*shape, dtype=dtype), layout).requires_grad_()
    check(lambda x: ours(x, dim), lambda x: theirs(x, dim), x)


@op
@pytest.mark.parametrize(
    "argument, x, dim", [("dim", torch.ones(3, 4), 2), ("dim", torch.ones(3, 4), -3), ("dim", torch.tensor(1.0), 1)]
)
@pytest.mark.no_kernels("errors")
def test_errors_for_dimensions(op, argument, x, dim):
    assert_same_error(lambda: OPS[op][0](x, dim), lambda: OPS[op][1](x, dim), op, argument)


@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
@pytest.mark.parametrize("other", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.no_kernels("errors")
def test_errors_for_dtypes(op, other):
    x = torch.ones(3, 4).to(other)
    assert_same_error(lambda: OPS[op][0](x, 1), lambda: OPS[op][1](x, 1), op, "input")


@pytest.mark.no_kernels("errors")
def test_error_for_a_dimension_that_appears_twice():
    assert_same_error(
        lambda: regfast.logsumexp(torch.ones(3, 4), (0, 0)),
        lambda: torch.logsumexp(torch.ones(3, 4), (0, 0)),
        "logsumexp",
        "dim",
    )


@op
@pytest.mark.no_kernels("errors")
def test_errors_for_what_is_no_dimension(op):
    for dim in ("a", 1.0):
        with pytest.raises(TypeError):
            OPS[op][0](torch.ones(3, 4), dim)
