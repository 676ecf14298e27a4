"""accelerate(products=True): what ATen computes within its own kernels by slow products of half types, by ours."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from util import HALF, LAYOUTS, assert_as_good, evaluate, lay_out, spiky

import regfast
from regfast._paths import recorded

half_types = pytest.mark.parametrize("dtype", HALF, ids=str)


def compare(call, *tensors, by=(), absolute=False, what=""):
    """Values and gradients with our products, by kernels of these names, against ATen's and float64. Where sums cancel,
    errors are compared with those of absolute values."""
    with regfast.accelerate(products=True), recorded() as calls:
        out, grad, grads = evaluate(call, tensors, None)
    assert set(by) <= {c.op for c in calls}, calls
    with recorded() as calls:
        their_out, their_grad, _ = evaluate(call, tensors, grads)
    assert not calls
    true_out, true_grad, _ = evaluate(call, tensors, grads, torch.float64)
    sizes = [None] * (len(out) + len(grad))
    if absolute:
        plain = [t.detach().abs().requires_grad_(t.requires_grad) for t in tensors]
        size_out, size_grad, _ = evaluate(call, plain, [g.abs() for g in grads], torch.float64)
        sizes = [*size_out, *size_grad]
    results = zip(out + grad, their_out + their_grad, true_out + true_grad, sizes, strict=True)
    for i, (ours, theirs, true, size) in enumerate(results):
        assert_as_good(ours, theirs, true, f"{what} result {i}", size)
        assert ours.stride() == theirs.stride() or i >= len(out), f"{what} result {i}"


@functools.cache
def reaches_us(dtype: torch.dtype) -> bool:
    """Whether ATen computes convolutions of this type by its own loops: its library has instructions on other CPUs."""
    x, w = torch.ones(1, 1, 3, 3, dtype=dtype), torch.ones(1, 1, 2, 2, dtype=dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        F.conv2d(x, w)
    return any(event.key == "aten::_slow_conv2d_forward" for event in profile.key_averages())


@pytest.fixture
def by_loops(dtype):
    if not reaches_us(dtype):
        pytest.skip(f"this CPU has instructions for convolutions of {dtype}")


BOTH = ("conv2d", "conv2d_backward")
# images, channels, height, width, outputs, kernel, stride, padding
CONVOLUTIONS = [
    (2, 3, 32, 32, 16, 16, 16, 0),  # patches of a vision transformer
    (3, 5, 17, 19, 7, 3, 1, 1),
    (1, 4, 9, 9, 6, 1, 1, 0),  # pointwise
    (3, 4, 9, 9, 6, 1, 2, 0),
    (2, 8, 12, 10, 5, (3, 2), (2, 1), (1, 0)),
    (2, 3, 9, 9, 4, 2, 3, 0),  # numbers of no patch
    (5, 32, 66, 65, 8, 3, 1, 1),  # more numbers than are made at a time
    (2, 32, 92, 92, 3, 3, 1, 0),  # and of one image alone
    (1, 1, 1, 1, 1, 1, 1, 0),
]


@half_types
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutions(case, bias, dtype, by_loops):
    n, c, h, w, outputs, kernel, stride, padding = case
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    tensors = [spiky(n, c, h, w, dtype=dtype), spiky(outputs, c, *kernel, dtype=dtype)]
    tensors += [spiky(outputs, dtype=dtype)] if bias else []

    def conv(x, w, b=None):
        return F.conv2d(x, w, b, stride, padding)

    compare(conv, *(t.requires_grad_() for t in tensors), by=BOTH, absolute=True)
    for wanted in range(len(tensors)):  # each gradient alone
        some = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        compare(conv, *some, by=BOTH, absolute=True, what=f"gradient {wanted} alone")


@half_types
@pytest.mark.parametrize("layout", [*LAYOUTS, "channels_last"])
def test_layouts_of_convolutions(layout, dtype, by_loops):
    x, w = (lay_out(spiky(*s, dtype=dtype), layout).requires_grad_() for s in ((3, 4, 11, 12), (6, 4, 3, 3)))
    compare(lambda x, w: F.conv2d(x, w, stride=2), x, w, by=BOTH, absolute=True)
    # Its gradient is expanded.
    compare(lambda x, w: F.conv2d(x, w).sum(), x, w, by=BOTH, absolute=True)


@half_types
def test_results_have_channels_last_where_atens_have(dtype, by_loops):
    formats = (torch.contiguous_format, torch.channels_last)
    cases = (((2, 3, 8, 8), 3, 1), ((2, 1, 8, 8), 1, 1), ((2, 4, 4, 4), 4, 4), ((1, 4, 6, 6), 1, 1))
    for shape, kernel, stride in cases:
        for of_x, of_w in itertools.product(formats, formats):
            x = spiky(*shape, dtype=dtype).contiguous(memory_format=of_x).requires_grad_()
            w = spiky(5, shape[1], kernel, kernel, dtype=dtype).contiguous(memory_format=of_w).requires_grad_()

            def strides(x=x, w=w, stride=stride):
                y = F.conv2d(x, w, stride=stride)
                results = (y, *torch.autograd.grad(y, (x, w), torch.ones_like(y)))
                return [s for t in results for s, size in zip(t.stride(), t.shape, strict=True) if size > 1]

            true = strides()
            with regfast.accelerate(products=True):
                assert strides() == true, (shape, of_x, of_w)


@half_types
def test_kinds_of_convolutions(dtype, by_loops):
    """Of one dimension, in groups, without a batch; what stays ATen's; and its errors."""
    x, w = spiky(2, 6, 12, 12, dtype=dtype), spiky(4, 6, 3, 3, dtype=dtype)
    ours = {
        "one dimension": lambda x, w: F.conv1d(x[:, :, 0], w[..., 0]),
        "groups": lambda x, w: F.conv2d(x, w[:, :3], groups=2),
        "no batch": lambda x, w: F.conv2d(x[0], w),
        "same": lambda x, w: F.conv2d(x, w, padding="same"),
    }
    others = {
        "dilated": lambda x, w: F.conv2d(x, w, dilation=2),
        "float32": lambda x, w: F.conv2d(x.float(), w.float()),
        "no images": lambda x, w: F.conv2d(x[:0], w),
    }
    for name, call in (ours | others).items():
        if name != "float32":
            compare(call, x.requires_grad_(), w.requires_grad_(), by=BOTH * (name in ours), absolute=True, what=name)
        true = call(x, w)
        with regfast.accelerate(products=True), recorded() as calls:
            result = call(x, w)
        times = 0 if name in others else 2 if name == "groups" else 1
        assert result.stride() == true.stride() and [c.op for c in calls].count("conv2d") == times, name
    for wrong in (
        lambda: F.conv2d(x, w[:, :5]),
        lambda: F.conv2d(x, w, torch.zeros(3, dtype=dtype)),
        lambda: F.conv2d(x, w.double()),
        lambda: F.conv2d(x[..., :2], w),
        lambda: F.conv2d(x, w, stride=0),
        lambda: F.conv2d(x, w, padding=-1),
    ):
        with pytest.raises(RuntimeError) as true_error:
            wrong()
        with regfast.accelerate(products=True), pytest.raises(RuntimeError) as error:
            wrong()
        assert str(error.value) == str(true_error.value)


ATTENTION = [  # batch, heads, queries, keys, features
    (2, 3, 17, 17, 8),
    (1, 4, 130, 130, 64),
    (2, 2, 300, 500, 16),  # more scores than are made at a time: blocks of rows
    (1, 70, 40, 40, 24),  # and of heads
    (1, 2, 70, 2100, 8),  # and of the fewest rows
    (1, 1, 5, 9, 32),
    (1, 1, 1, 1, 1),
]
MASKS = ("none", "causal", "bool", "floating", "expanded", "whole rows")


def attention_of(case, mask, dtype, scale=None):
    """Inputs as models have them, and the call, in double precision by torch's formula."""
    batch, heads, queries, keys, features = case
    tensors = [
        spiky(batch, length, heads, features, dtype=dtype, size=1.0).transpose(1, 2).requires_grad_()
        for length in (queries, keys, keys)
    ]
    seen = torch.rand(queries, keys) > 0.3
    seen[:, 0] = True
    masks = {
        "bool": seen,
        "floating": torch.randn(batch, heads, queries, keys).to(dtype),
        "expanded": torch.randn(batch, 1, 1, keys).to(dtype).expand(batch, 1, queries, keys),
        "whole rows": seen & (torch.arange(queries) % 3 > 0)[:, None],
    }
    chosen = masks.get(mask)

    def attention(q, k, v):
        of = chosen if chosen is None or chosen.dtype is torch.bool else chosen.to(q.dtype)
        with sdpa_kernel(SDPBackend.MATH if q.dtype is torch.float64 else SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, of, is_causal=mask == "causal", scale=scale)

    return tensors, attention


@half_types
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_gradients_of_attention(case, mask, dtype):
    tensors, attention = attention_of(case, mask, dtype)
    compare(attention, *tensors, by=["attention_backward"])


@half_types
def test_kinds_of_attention(dtype):
    case = (2, 3, 20, 30, 16)
    tensors, attention = attention_of(case, "none", dtype, scale=0.7)
    compare(attention, *tensors, by=["attention_backward"], what="scale")
    for layout in ("contiguous", "padded", "expanded", "misaligned"):  # features have to be adjacent
        some = [lay_out(t.detach(), layout).requires_grad_() for t in tensors]
        compare(attention, *some, by=["attention_backward"], what=layout)
        compare(lambda *leaves: attention(*leaves).sum(), *some, by=["attention_backward"], what=f"{layout} sum")
    q, k, v = (t.detach() for t in tensors)
    few = [t.requires_grad_() for t in (spiky(2, 6, 20, 16, dtype=dtype), k, v)]
    compare(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), *few, what="shared heads")
    q, k, v = (t.float().requires_grad_() for t in (q, k.detach(), v.detach()))
    with regfast.accelerate(products=True), recorded() as calls:
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    assert "attention_backward" not in [c.op for c in calls]


@half_types
def test_the_same_bits_with_any_number_of_threads(dtype, threads):
    tensors, attention = attention_of((2, 3, 300, 300, 24), "causal", dtype)
    tensors += [spiky(3, 5, 40, 41, dtype=dtype).requires_grad_(), spiky(6, 5, 3, 3, dtype=dtype).requires_grad_()]
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        torch.manual_seed(1)
        with regfast.accelerate(products=True):
            out, grad, _ = evaluate(lambda *t: (attention(*t[:3]), F.conv2d(*t[3:])), tensors, None)
        results.append([*out[1:], *grad])  # attention's forward is ATen's
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
