"""mse_loss: values and gradients against float64, broadcasting, weights, layouts, errors."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from util import (
    INF,
    LAYOUTS,
    NAN,
    assert_same_error,
    check,
    evaluate,
    lay_out,
    spiky,
    torchs_mse_loss,
    virtual,
    with_all_kernels,
)

import regfast

pytestmark = pytest.mark.kernels("mse_loss")

REDUCTIONS = ("none", "mean", "sum")
reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def check_mse(x, y, reduction="mean", weight=None, grads=None):
    """As torch, for the same arguments; float64 sums the same terms, so no magnitude is needed: all are positive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        check(
            lambda x, y, w: regfast.mse_loss(x, y, reduction=reduction, weight=w),
            lambda x, y, w: torchs_mse_loss(x, y, reduction=reduction, weight=w),
            x,
            y,
            weight,
            grads=grads,
        )


@reduction
@pytest.mark.parametrize("shape", [(), (1,), (7,), (256, 1), (33, 17), (3, 5, 7, 11), (50000,)], ids=str)
def test_values_and_gradients(reduction, shape, dtype, device):
    x = spiky(*shape, dtype=dtype, device=device).requires_grad_()
    check_mse(x, spiky(*shape, dtype=dtype, device=device).requires_grad_(), reduction)


@with_all_kernels
@reduction
@pytest.mark.parametrize("x_layout, y_layout", list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts(reduction, x_layout, y_layout):
    x = lay_out(spiky(9, 4, 13), x_layout).requires_grad_()
    check_mse(x, lay_out(spiky(9, 4, 13), y_layout).requires_grad_(), reduction)


# Runs of adjacent numbers around those that are moved without a call (tuning.h: kShortRun = 16), of every other one and
# every third; more elements than are gathered at a time (kGatherPiece = 2048) and than a thread's block; 3 runs deep.
@reduction
@pytest.mark.parametrize("size, step", [*((n, 1) for n in (1, 2, 3, 15, 16, 17, 40)), (7, 2), (20, 2), (9, 3)])
def test_slices(reduction, size, step, dtype):
    full = (5, 600 // size + 40, size * step + 3)
    cut = (slice(1, None), slice(None, -2), slice(1, 1 + size * step, step))
    x, y = (spiky(*full, dtype=dtype)[cut].detach().requires_grad_() for _ in range(2))
    check_mse(x, y, reduction, grads=None if reduction != "none" else [spiky(*full, dtype=dtype)[cut]])
    other = spiky(*reversed(full), dtype=dtype).permute(2, 1, 0)[cut].detach().requires_grad_()
    check_mse(x, other, reduction)
    check_mse(spiky(*x.shape, dtype=dtype).requires_grad_(), y, reduction)


@with_all_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_gradient(layout, dtype):
    x, y = spiky(9, 13, dtype=dtype).requires_grad_(), spiky(9, 13, dtype=dtype).requires_grad_()
    check_mse(x, y, "none", grads=[lay_out(spiky(9, 13, dtype=dtype), layout)])


@with_all_kernels
@reduction
@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=2)), ids=str)
def test_only_the_gradients_that_are_asked_for(reduction, mask):
    x, y = spiky(9, 13).requires_grad_(mask[0]), spiky(9, 13).requires_grad_(mask[1])
    assert regfast.mse_loss(x, y, reduction=reduction).requires_grad == any(mask)
    check_mse(x, y, reduction)


@reduction
@pytest.mark.parametrize(
    "x_shape, y_shape", [((4, 5), (5,)), ((5,), (4, 5)), ((4, 1), (1, 5)), ((4, 5), ()), ((0, 5), (5,))]
)
@pytest.mark.composite("input and target differ in kind")
def test_broadcasting_warns_as_torch(reduction, x_shape, y_shape):
    x, y = spiky(*x_shape).requires_grad_(), spiky(*y_shape).requires_grad_()
    check_mse(x, y, reduction)
    with pytest.warns(UserWarning, match="Using a target size"):
        regfast.mse_loss(x, y, reduction=reduction)


@reduction
@pytest.mark.composite("a weight of each element")
def test_weights(reduction, dtype):
    x, y = spiky(9, 13, dtype=dtype).requires_grad_(), spiky(9, 13, dtype=dtype).requires_grad_()
    check_mse(x, y, reduction, weight=torch.rand(9, 13).to(dtype))
    check_mse(x, y, reduction, weight=torch.rand(9, 13).to(dtype).requires_grad_())
    check_mse(x, y, reduction, weight=torch.rand(13, 9).to(dtype).T)


@reduction
@pytest.mark.composite("input and target differ in kind", "a weight of each element")
def test_mixed_dtypes_are_promoted(reduction):
    for a, b in itertools.permutations([torch.float32, torch.float64, torch.bfloat16, torch.float16], 2):
        check_mse(spiky(9, 13, dtype=a).requires_grad_(), spiky(9, 13, dtype=b).requires_grad_(), reduction)
    check_mse(spiky(9, 13).requires_grad_(), torch.randint(5, (9, 13)), reduction)
    check_mse(spiky(9, 13), spiky(9, 13), reduction, weight=torch.rand(9, 13, dtype=torch.float64))


@with_all_kernels
@reduction
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)], ids=str)
def test_empty(reduction, shape):
    check_mse(torch.empty(shape, requires_grad=True), torch.empty(shape), reduction)


def test_mean_of_many_elements():
    # A float32 running sum stalls near 2**24 terms; partial sums do not (PyTorch #55657).
    n = 2**24 + 2**20
    x = torch.ones(n)
    assert regfast.mse_loss(x, torch.zeros(1).expand(n)).item() == 1.0
    assert regfast.mse_loss(x, torch.zeros(1).expand(n), reduction="sum").item() == n


@with_all_kernels
def test_half_sums_do_not_overflow():
    # The sum of 1000 squares of 100 is 1e7, above float16's 65504; the mean is 1e4 (PyTorch #61523).
    x = torch.full((1000,), 100.0, dtype=torch.float16, requires_grad=True)
    loss = regfast.mse_loss(x, torch.zeros_like(x))
    assert loss.item() == 10000
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(grad, torch.full_like(grad, 0.2))


@with_all_kernels
@reduction
def test_special_values(reduction):
    x = torch.tensor([0.0, INF, -INF, NAN, 1e30, 2.0] * 5)
    y = torch.tensor([INF, INF, INF, 0.0, -1e30, 1.0] * 5)
    torch.testing.assert_close(
        regfast.mse_loss(x, y, reduction=reduction), F.mse_loss(x, y, reduction=reduction), equal_nan=True
    )


@reduction
def test_same_bits_on_every_run(reduction, dtype):
    x, y = spiky(100, 1000, dtype=dtype).requires_grad_(), spiky(100, 1000, dtype=dtype).requires_grad_()
    fn = lambda x, y: regfast.mse_loss(x, y, reduction=reduction)  # noqa: E731
    first = evaluate(fn, [x, y], None)
    for _ in range(3):
        again = evaluate(fn, [x, y], first[2])
        assert all(torch.equal(p, q) for p, q in zip(first[0] + first[1], again[0] + again[1], strict=True))


@pytest.mark.parametrize("flags", [(False, None), (None, False), (True, True), (False, True)], ids=str)
def test_legacy_arguments(flags):
    x, y = spiky(4, 5), spiky(4, 5)
    with pytest.warns(UserWarning, match="size_average and reduce"):
        ours = regfast.mse_loss(x, y, *flags)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(ours, F.mse_loss(x, y, *flags))


def test_offsets_beyond_2_31_elements():
    stride = 2**30 + 8
    x = virtual(2 * stride + 24, torch.bfloat16).as_strided((3, 20), (stride, 1))
    x.copy_(spiky(3, 20)).requires_grad_()
    for mode in REDUCTIONS:
        check_mse(x, spiky(3, 20, dtype=x.dtype).requires_grad_(), mode)


@with_all_kernels
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    mode=st.sampled_from(REDUCTIONS),
    mask=st.tuples(st.booleans(), st.booleans()),
)
def test_any_shape_and_option(shape, dtype, layouts, mode, mask):
    torch.manual_seed(sum(shape))
    x, y = (lay_out(spiky(*shape, dtype=dtype), layout) for layout in layouts)
    check_mse(x.requires_grad_(mask[0]), y.requires_grad_(mask[1]), mode)


X = torch.ones(4, 5)


@pytest.mark.parametrize(
    "argument, arguments, options",
    [
        ("target", (X, torch.ones(4)), {}),
        ("reduction", (X, X), {"reduction": "median"}),
        ("weight", (X, X), {"weight": torch.ones(5)}),
        ("reduction", (X, X), {"weight": X, "reduction": "median"}),
        ("input", (X.long(), X.long()), {}),
        ("input", (X.cfloat(), X.cfloat()), {}),
        ("input", (X.bool(), X.bool()), {}),
    ],
    ids=["shape", "reduction", "weight", "weighted reduction", "int", "complex", "bool"],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.no_kernels("errors")
def test_errors_are_torchs_and_say_more(argument, arguments, options):
    assert_same_error(
        lambda: regfast.mse_loss(*arguments, **options), lambda: F.mse_loss(*arguments, **options), "mse_loss", argument
    )


@pytest.mark.parametrize("how", ("transposed", "channels_last", "strided", "expanded"))
@pytest.mark.parametrize("other", ("same", "contiguous"))
def test_results_have_the_strides_of_the_input(how, other, device):
    x = lay_out(spiky(3, 5, 4, 6, device=device), how)
    y = lay_out(spiky(3, 5, 4, 6, device=device), how if other == "same" else "contiguous")
    true = F.mse_loss(x, y, reduction="none")
    ours = regfast.mse_loss(x, y, reduction="none")
    torch.testing.assert_close(ours, true)
    if how in ("transposed", "channels_last"):
        assert ours.stride() == true.stride()
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(regfast.mse_loss(leaf, y), leaf)
        assert grad.stride() == leaf.stride()
        torch.testing.assert_close(grad, 2 * (x - y) / x.numel())
