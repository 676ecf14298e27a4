"""cross_entropy: values and gradients against float64 for everything that F.cross_entropy accepts."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from util import (
    HALF,
    LAYOUTS,
    check,
    class_targets,
    evaluate,
    lay_out,
    probability_targets,
    spiky,
    virtual,
    with_all_kernels,
)

import regfast

pytestmark = pytest.mark.kernels("cross_entropy")

REDUCTIONS = ("none", "mean", "sum")
reduction = pytest.mark.parametrize("reduction", REDUCTIONS)

# N, C
SHAPES = [
    (1, 1),  # one class: loss 0, gradient 0
    (3, 2),
    (256, 10),  # the notes' softmax regression
    (5, 17),  # a vector and a tail
    (64, 129),
    (9, 1000),
    (4, 2048),  # one cache block exactly
    (5, 2051),  # one cache block and a tail
    (3, 32003),  # a vocabulary, no multiple of anything
]

# Input shapes with dimensions after the classes; the classes are strided there.
SPATIAL = [(2, 5, 1), (3, 10, 7), (2, 33, 4, 5), (1, 129, 3, 2, 2), (4, 3, 0), (2, 6, 40, 3)]


def check_ce(x, target, weight=None, *, grads=None, what="", **options):
    """Class targets are no leaves; probability targets and the weights may require gradients."""
    rows = x.numel() // max(1, x.shape[1 if x.dim() > 1 else 0])
    terms = None
    if target.is_floating_point():  # p * sum(t) - t cancels
        terms = target.detach().abs().max().item() if target.numel() else 1.0
        terms = 2 * max(1.0, terms) / (rows if options.get("reduction", "mean") == "mean" and rows else 1)
    check(
        lambda x, t, w: regfast.cross_entropy(x, t, w, **options),
        lambda x, t, w: F.cross_entropy(x, t, w, **options),
        x,
        target,
        weight,
        grads=grads,
        terms=terms,
        what=what or str(options),
    )


@reduction
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_class_targets(reduction, shape, dtype, device):
    n, c = shape
    x = spiky(n, c, dtype=dtype, device=device).requires_grad_()
    check_ce(x, class_targets((n,), c, 0.2).to(device), reduction=reduction)


@reduction
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_probability_targets(reduction, shape, dtype, device):
    x = spiky(*shape, dtype=dtype, device=device).requires_grad_()
    check_ce(x, probability_targets(*shape, dtype=dtype).to(device).requires_grad_(), reduction=reduction)


@with_all_kernels
@reduction
@pytest.mark.parametrize("shape", SPATIAL, ids=str)
def test_more_dimensions(reduction, shape, dtype):
    n, c, *rest = shape
    x = spiky(*shape, dtype=dtype).requires_grad_()
    check_ce(x, class_targets((n, *rest), c, 0.2), reduction=reduction)
    check_ce(x, probability_targets(*shape, dtype=dtype).requires_grad_(), reduction=reduction)


@with_all_kernels
@reduction
def test_one_sample_without_batch(reduction, dtype):
    x = spiky(37, dtype=dtype).requires_grad_()
    check_ce(x, torch.tensor(5), reduction=reduction)
    # torch takes a target of one element too, but its backward then fails.
    loss, again = (regfast.cross_entropy(x, torch.tensor(t), reduction=reduction) for t in (5, [5]))
    assert again.shape == F.cross_entropy(x, torch.tensor([5]), reduction=reduction).shape and torch.equal(loss, again)
    assert torch.equal(*(torch.autograd.grad(value, x)[0] for value in (loss, again)))
    check_ce(x, probability_targets(37, dtype=dtype).requires_grad_(), reduction=reduction)


OPTIONS = [
    dict(zip(("weight", "smoothing", "ignored", "reduction"), values, strict=True))
    for values in itertools.product([False, True], [0.0, 0.1, 1.0], [0.0, 0.4], REDUCTIONS)
]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_options_together(option, dtype):
    weight = torch.rand(33).to(dtype) if option["weight"] else None
    options = {"label_smoothing": option["smoothing"], "reduction": option["reduction"]}
    for shape in ((20, 33), (3, 33, 7)):
        x = spiky(*shape, dtype=dtype).requires_grad_()
        rows = (shape[0], *shape[2:])
        check_ce(x, class_targets(rows, 33, option["ignored"], 4), weight, ignore_index=4, **options)
        check_ce(x, class_targets(rows, 33, option["ignored"]), weight, **options)
        if not option["ignored"]:
            check_ce(x, probability_targets(*shape, dtype=dtype).requires_grad_(), weight, **options)
            check_ce(x, probability_targets(*shape, dtype=dtype), weight, **options)


@pytest.mark.composite("a weight that requires grad")
def test_weights_of_probability_targets_have_a_gradient():
    x, target = spiky(6, 9).requires_grad_(), probability_targets(6, 9).requires_grad_()
    for mode in REDUCTIONS:
        check_ce(x, target, torch.rand(9).requires_grad_(), reduction=mode, label_smoothing=0.1)


@with_all_kernels
@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=2)), ids=str)
def test_only_the_gradients_that_are_asked_for(mask):
    x, target = spiky(6, 9).requires_grad_(mask[0]), probability_targets(6, 9).requires_grad_(mask[1])
    assert regfast.cross_entropy(x, target).requires_grad == any(mask)
    check_ce(x, target, label_smoothing=0.1)


@with_all_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    x = lay_out(spiky(12, 41, dtype=dtype), layout).requires_grad_()
    for mode in REDUCTIONS:
        check_ce(x, class_targets((12,), 41, 0.2), reduction=mode)


@with_all_kernels
@pytest.mark.parametrize("layout", (*LAYOUTS, "channels_last"))
def test_layouts_with_more_dimensions(layout):
    x = lay_out(spiky(2, 19, 6, 5), layout).requires_grad_()
    for mode in REDUCTIONS:
        check_ce(x, class_targets((2, 6, 5), 19, 0.2), reduction=mode)
        check_ce(x, probability_targets(2, 19, 6, 5), reduction=mode)


@with_all_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_targets_and_weights(layout):
    x = spiky(12, 41).requires_grad_()
    # NaN, which fills the gaps, has no integer: the gaps of class targets are zeros.
    check_ce(x, lay_out(probability_targets(12, 41), layout).requires_grad_(), lay_out(torch.rand(41), layout))
    spaced = torch.stack([class_targets((12,), 41, 0.2), torch.full((12,), 10**9)], 1)[:, 0]
    check_ce(x, spaced, lay_out(torch.rand(41), layout))
    check_ce(x, torch.tensor([7]).expand(12), lay_out(torch.rand(41), layout))
    check_ce(spiky(4, 41, 3).requires_grad_(), class_targets((3, 4), 41, 0.2).T)


@with_all_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_gradient(layout):
    for shape in ((12, 41), (4, 41, 3)):
        x = spiky(*shape).requires_grad_()
        rows = (shape[0], *shape[2:])
        grad = lay_out(spiky(*rows), layout)
        check_ce(x, class_targets(rows, 41, 0.2), reduction="none", grads=[grad])
        check_ce(x, probability_targets(*shape).requires_grad_(), reduction="none", grads=[grad])


@with_all_kernels
def test_rows_with_an_offset():
    # The loss is a difference: it must come from (x - max) - log sum exp(x - max), not from lse - x.
    x = spiky(8, 50) + torch.tensor([0.0, 30, -30, 1000, -1000, 1e5, 3e4, -7])[:, None]
    target = x.argmax(1)
    target[::2] = 3
    for mode in REDUCTIONS:
        check_ce(x.detach().requires_grad_(), target, reduction=mode)
        check_ce(x.detach().requires_grad_(), F.one_hot(target, 50).float(), reduction=mode)


@with_all_kernels
def test_confident_rows():
    # softmax - 1 cancels where the target's probability is almost 1 : 1 - p must not be rounded twice.
    x = torch.zeros(6, 40)
    x[:, 3] = torch.tensor([5.0, 10, 15, 20, 40, 90])
    for mode in REDUCTIONS:
        check_ce(x.clone().requires_grad_(), torch.full((6,), 3), reduction=mode)


@with_all_kernels
@pytest.mark.parametrize("half", HALF, ids=str)
def test_half_types_are_rounded_once(half):
    # Our float32 arithmetic leaves one rounding: half an ulp of the result, wherever PyTorch stands.
    x = spiky(64, 333, dtype=half).requires_grad_()
    target = class_targets((64,), 333)
    exact = F.cross_entropy(x.detach().double(), target, reduction="none")
    ours = regfast.cross_entropy(x, target, reduction="none")
    assert ((ours.double() - exact).abs() <= 0.55 * torch.finfo(half).eps * exact.abs()).all()
    (grad,) = torch.autograd.grad(ours, x, torch.ones(64, dtype=half))
    softmax = x.detach().double().softmax(1)
    true = softmax - F.one_hot(target, 333)
    smallest = torch.finfo(half).smallest_normal
    assert ((grad.double() - true).abs() <= 0.55 * torch.finfo(half).eps * true.abs().clamp(min=smallest)).all()


@with_all_kernels
def test_uint8_targets():
    x = spiky(9, 200).requires_grad_()
    target = torch.randint(200, (9,), dtype=torch.uint8)
    check_ce(x, target)
    check_ce(x, target, label_smoothing=0.1, ignore_index=int(target[0]))
    wide = torch.randn(1, 200)
    # -100 is no byte: class 156 is not ignored.
    assert regfast.cross_entropy(wide, torch.tensor([156], dtype=torch.uint8)).item() > 0


def test_mixed_dtypes_of_probabilities():
    # torch promotes: float64 probabilities or weights make a float64 loss.
    for a, b in itertools.permutations([torch.float32, torch.float64, torch.bfloat16], 2):
        x, target = spiky(6, 9, dtype=a).requires_grad_(), probability_targets(6, 9, dtype=b).requires_grad_()
        check_ce(x, target)
        check_ce(x, target, torch.rand(9, dtype=torch.float64), reduction="none")


@with_all_kernels
def test_probabilities_need_not_sum_to_one():
    # The gradient is softmax * sum(t) - t, not softmax - t.
    x, target = spiky(7, 12).requires_grad_(), torch.randn(7, 12).requires_grad_()
    for smoothing in (0.0, 0.2):
        check_ce(x, target, torch.rand(12), label_smoothing=smoothing, reduction="none")


@reduction
def test_same_bits_on_every_run(reduction, dtype):
    x, target = spiky(300, 777, dtype=dtype).requires_grad_(), class_targets((300,), 777, 0.2)
    fn = lambda x: regfast.cross_entropy(x, target, reduction=reduction, label_smoothing=0.1)  # noqa: E731
    out, grad, grads = evaluate(fn, [x], None)
    for _ in range(3):
        again = evaluate(fn, [x], grads)
        assert torch.equal(out[0], again[0][0]) and torch.equal(grad[0], again[1][0])


def test_offsets_beyond_2_31_elements():
    stride = 2**30 + 8
    # Rows far apart, then classes far apart.
    for shape, strides in (((3, 20), (stride, 1)), ((20, 3), (1, stride))):
        x = virtual(2 * stride + 24, torch.bfloat16).as_strided(shape, strides)
        x.copy_(spiky(*shape)).requires_grad_()
        for mode in REDUCTIONS:
            check_ce(x, class_targets(shape[:1], shape[1]), reduction=mode)
            check_ce(x, probability_targets(*shape, dtype=x.dtype), reduction=mode)


def test_more_than_2_31_logits():
    # Rows whose index times the number of classes needs 64 bits; the zeros between take no memory.
    n, c = 2**16 + 3, 2**15
    x = virtual(n * c, torch.bfloat16).view(n, c)
    x[-1] = spiky(c, dtype=x.dtype)
    x[n // 2] = spiky(c, dtype=x.dtype)
    with torch.no_grad():
        lse = regfast.cross_entropy(x, torch.zeros(n, dtype=torch.int64), outputs="lse")
    for row in (0, n // 2, n - 1):
        torch.testing.assert_close(lse[row].double(), torch.logsumexp(x[row].double(), 0), rtol=2**-8, atol=0)
    assert lse.sum(dtype=torch.float64).isfinite()


@with_all_kernels
@given(
    n=st.integers(0, 12),
    c=st.integers(1, 70),
    rest=st.lists(st.integers(0, 5), max_size=3),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    probabilities=st.booleans(),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    mode=st.sampled_from(REDUCTIONS),
)
def test_any_shape_and_option(n, c, rest, layout, dtype, probabilities, weighted, smoothing, ignored, mode):
    torch.manual_seed(n + 13 * c + 911 * sum(rest))
    x = lay_out(spiky(n, c, *rest, dtype=dtype), layout).requires_grad_()
    weight = torch.rand(c).to(dtype) if weighted else None
    if probabilities:
        target = lay_out(probability_targets(n, c, *rest, dtype=dtype), layout).requires_grad_()
    else:
        target = class_targets((n, *rest), c, ignored)
    check_ce(x, target, weight, label_smoothing=smoothing, reduction=mode)
