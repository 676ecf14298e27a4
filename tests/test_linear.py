"""linear: values and gradients against float64, layouts, masks, shapes, errors."""

import itertools

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
    fresh_process,
    lay_out,
    spiky,
    virtual,
    with_all_kernels,
)

import regfast
from regfast import reference

pytestmark = pytest.mark.kernels("linear_forward", "linear_backward")

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}

# N, K, V
SHAPES = [
    (1, 1, 1),
    (1, 64, 10),  # one row: no packing
    (7, 3, 1),  # one output: a matrix-vector product
    (5, 17, 33),  # every size ragged
    (64, 784, 10),  # skinny outputs, the notes' softmax regression
    (12, 1030, 18),  # skinny outputs, several chains of additions
    (150, 40, 34),  # the input is the longer side: read in place, the weight packed
    (9, 24, 2070),  # the weight is
    (96, 128, 96),  # nothing ragged
]
# Of the CPU's engine alone: tests/cuda_on_host has the sizes that the CUDA kernels tell apart.
LARGE_SHAPES = [
    (40, 4500, 70),  # two blocks of K in place; its gradients' longer side is packed, in several blocks of K
    (300, 270, 290),  # several tasks to a thread
    (20, 9000, 33),  # few outputs: K in parts
]


def torch_linear(activation):
    return lambda x, w, b: ACTIVATIONS[activation](F.linear(x, w, b))


def check_linear(x, w, b, activation="none", grads=None, what="", pool=None):
    """An activation's derivative is at most 1.13, so the plain product bounds the terms of every sum."""
    check(
        lambda x, w, b: regfast.linear(x, w, b, activation=activation),
        torch_linear(activation),
        x,
        w,
        b,
        grads=grads,
        magnitude=F.linear,
        what=what or activation,
        pool=pool,
    )


def check_values_and_gradients(shape, bias, dtype, device):
    n, k, v = shape
    x = spiky(n, k, dtype=dtype, device=device).requires_grad_()
    w = spiky(v, k, dtype=dtype, device=device).requires_grad_()
    b = spiky(v, dtype=dtype, device=device).requires_grad_() if bias else None
    check_linear(x, w, b)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_values_and_gradients(shape, bias, dtype, device):
    check_values_and_gradients(shape, bias, dtype, device)


@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_large_values_and_gradients(shape, bias, dtype):
    check_values_and_gradients(shape, bias, dtype, "cpu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype, device):
    x = spiky(37, 19, dtype=dtype, device=device).requires_grad_()
    w = (spiky(21, 19, dtype=dtype, device=device) / 4).requires_grad_()
    b = spiky(21, dtype=dtype, device=device).requires_grad_()
    check_linear(x, w, b, activation)
    assert torch.equal(
        evaluate(lambda *t: reference.linear(*t, activation=activation), [x.double(), w.double(), b.double()], None)[0][
            0
        ],
        torch_linear(activation)(x.double(), w.double(), b.double()),
    )


@with_all_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_special_points(activation):
    # 0 is where relu has its kink; far out, exp overflows in a careless silu or tanh.
    points = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1.0, -1.0, 9.5, -9.5, 100.0, -100.0, 1e4, -1e4])[:, None]
    check_linear(points.requires_grad_(), torch.ones(1, 1), None, activation)
    # At -inf torch's gelu and silu are -inf * 0, and its vectorized gelu is NaN even at +inf: the limits are asked for.
    infinite = torch.tensor([INF, NAN] * 20)[:, None]
    limit = 1.0 if activation in ("sigmoid", "tanh") else INF
    ours = regfast.linear(infinite, torch.ones(1, 1), activation=activation)
    torch.testing.assert_close(ours, torch.tensor([limit, NAN] * 20)[:, None], equal_nan=True)


@with_all_kernels
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (4, 1, 5), (2, 0, 3)], ids=str)
def test_leading_dimensions(lead, dtype):
    x = spiky(*lead, 11, dtype=dtype).requires_grad_()
    w, b = spiky(6, 11, dtype=dtype).requires_grad_(), spiky(6, dtype=dtype).requires_grad_()
    assert regfast.linear(x, w, b).shape == (*lead, 6)
    check_linear(x, w, b, "gelu")


@with_all_kernels
@pytest.mark.parametrize("n, k, v", [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0), (4, 0, 0)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_empty(n, k, v, bias):
    # With K = 0 the output is the bias, and the output's memory must still be written.
    x, w = torch.ones(n, k, requires_grad=True), torch.ones(v, k, requires_grad=True)
    check_linear(x, w, torch.randn(v, requires_grad=True) if bias else None)


@with_all_kernels
@pytest.mark.parametrize("x_layout, w_layout", list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts(x_layout, w_layout):
    x = lay_out(spiky(13, 21), x_layout).requires_grad_()
    w = lay_out(spiky(18, 21), w_layout).requires_grad_()
    check_linear(x, w, lay_out(spiky(18), "strided").requires_grad_(), "silu")


@with_all_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_gradient(layout, dtype):
    x, w = spiky(13, 21, dtype=dtype).requires_grad_(), spiky(18, 21, dtype=dtype).requires_grad_()
    b = spiky(18, dtype=dtype).requires_grad_()
    for activation in ("none", "relu", "gelu"):
        check_linear(x, w, b, activation, grads=[lay_out(spiky(13, 18, dtype=dtype), layout)])


@with_all_kernels
def test_layouts_of_batches():
    whole = spiky(4, 6, 5, 9)
    for x in (whole.transpose(0, 2), whole[:, ::2], whole.permute(2, 1, 0, 3), whole[:, :1].expand(4, 6, 5, 9)):
        check_linear(x.detach().requires_grad_(), spiky(7, 9).requires_grad_(), spiky(7).requires_grad_())


@with_all_kernels
def test_gradient_from_sum_is_expanded():
    x, w = spiky(40, 30).requires_grad_(), (spiky(20, 30) / 8).requires_grad_()
    check(
        lambda x, w: regfast.linear(x, w, activation="tanh").sum() * 0.7,
        lambda x, w: torch.tanh(F.linear(x, w)).sum() * 0.7,
        x,
        w,
        magnitude=lambda x, w: F.linear(x, w).sum(),
    )


@with_all_kernels
@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_only_the_gradients_that_are_asked_for(mask, activation):
    x, w, b = spiky(9, 14), spiky(5, 14), spiky(5)
    for tensor, wanted in zip((x, w, b), mask, strict=True):
        tensor.requires_grad_(wanted)
    assert regfast.linear(x, w, b, activation=activation).requires_grad == any(mask)
    check_linear(x, w, b, activation)


def test_bias_alone_without_its_weight_gradient():
    # A frozen weight with a trained bias: the gradient of the rows came back without the sum over them elsewhere.
    x, w, b = spiky(9, 14), spiky(5, 14), spiky(5).requires_grad_()
    (gb,) = torch.autograd.grad(regfast.linear(x, w, b), b, torch.ones(9, 5) * 2)
    assert torch.equal(gb, torch.full((5,), 18.0))


@pytest.mark.parametrize("bias_shape", [(1,), (), (1, 6), (4, 6)], ids=str)
@pytest.mark.composite("weight or bias of an unusual shape")
def test_bias_shapes_that_torch_broadcasts(bias_shape):
    x, w, b = spiky(4, 5).requires_grad_(), spiky(6, 5).requires_grad_(), spiky(*bias_shape).requires_grad_()
    check_linear(x, w, b)


@pytest.mark.composite("weight or bias of an unusual shape")
def test_weight_of_one_dimension():
    for x in (spiky(5), spiky(4, 5), spiky(2, 4, 5)):
        w = spiky(5).requires_grad_()
        check(regfast.linear, F.linear, x.requires_grad_(), w, magnitude=F.linear)


@pytest.mark.parametrize("other", [torch.int64, torch.int32, torch.complex64], ids=str)
@pytest.mark.composite("has no kernel")
def test_other_dtypes_go_to_torch(other):
    x, w, b = (torch.randint(-5, 5, shape).to(other) for shape in ((4, 7), (3, 7), (3,)))
    assert torch.equal(regfast.linear(x, w, b), F.linear(x, w, b))


@with_all_kernels
def test_special_values_are_not_masked():
    # 0 * inf is NaN, and a NaN in one row or column stays in its row or column.
    x, w = spiky(20, 33), spiky(17, 33)
    x[3, 5], w[4, 7], x[:, 7] = NAN, INF, 0.0
    torch.testing.assert_close(regfast.linear(x, w), F.linear(x, w), equal_nan=True)
    assert torch.equal(regfast.linear(x, w).isnan(), F.linear(x, w).isnan())


def test_accumulates_in_float32_for_half_types():
    # 4096 ones make 256 in a bf16 accumulator, where adding 1 changes nothing any more.
    for half in (torch.bfloat16, torch.float16):
        x, w = torch.ones(4096, 3, dtype=half, requires_grad=True), torch.ones(2, 3, dtype=half, requires_grad=True)
        (gw,) = torch.autograd.grad(regfast.linear(x, w), w, torch.ones(4096, 2, dtype=half))
        assert torch.equal(gw, torch.full((2, 3), 4096.0, dtype=half))
        assert regfast.linear(torch.ones(2, 4096, dtype=half), torch.ones(3, 4096, dtype=half))[0, 0] == 4096


@with_all_kernels
def test_same_bits_on_every_run(dtype):
    x, w, b = (spiky(*s, dtype=dtype).requires_grad_() for s in ((130, 90), (70, 90), (70,)))
    first = evaluate(regfast.linear, [x, w, b], None)
    for _ in range(3):
        again = evaluate(regfast.linear, [x, w, b], first[2])
        assert all(torch.equal(p, q) for p, q in zip(first[0] + first[1], again[0] + again[1], strict=True))


def test_offsets_beyond_2_31_elements():
    stride = 2**30 + 8
    x = virtual(2 * stride + 16, torch.bfloat16).as_strided((3, 16), (stride, 1))
    x.copy_(spiky(3, 16))
    check_linear(x.requires_grad_(), spiky(4, 16, dtype=x.dtype).requires_grad_(), None)
    check_linear(spiky(5, 16, dtype=x.dtype).requires_grad_(), x, None)


@with_all_kernels
@given(
    n=st.integers(0, 40),
    k=st.integers(0, 70),
    v=st.integers(0, 70),
    bias=st.booleans(),
    activation=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    mask=st.tuples(*[st.booleans()] * 3),
)
def test_any_shape_and_option(n, k, v, bias, activation, dtype, layouts, mask):
    torch.manual_seed(n + 41 * k + 2911 * v)
    x = lay_out(spiky(n, k, dtype=dtype), layouts[0]).requires_grad_(mask[0])
    w = lay_out(spiky(v, k, dtype=dtype) / 4, layouts[1]).requires_grad_(mask[1])
    b = spiky(v, dtype=dtype).requires_grad_(mask[2]) if bias else None
    check_linear(x, w, b, activation, grads=[lay_out(spiky(n, v, dtype=dtype), layouts[2])])


X, W, B = torch.ones(4, 5), torch.ones(6, 5), torch.ones(6)


@pytest.mark.parametrize(
    "argument, arguments",
    [
        ("weight", (X, torch.ones(6, 4), None)),
        ("weight", (X, torch.ones(2, 6, 5), None)),
        ("bias", (X, W, torch.ones(4))),
        ("bias", (torch.ones(2, 3, 5), W, torch.ones(4))),
        ("input", (torch.tensor(1.0), W, B)),
        ("weight", (X.double(), W, B)),
        ("weight", (X.bfloat16(), W, B)),
        ("bias", (X, W, B.double())),
    ],
    ids=["inner", "weight 3-D", "bias", "bias batch", "input 0-D", "dtype", "dtype bf16", "bias dtype"],
)
@pytest.mark.no_kernels("errors")
def test_errors_are_torchs_and_say_more(argument, arguments):
    assert_same_error(lambda: regfast.linear(*arguments), lambda: F.linear(*arguments), "linear", argument)


@pytest.mark.no_kernels("errors")
def test_errors_for_what_is_no_tensor():
    for arguments in ((None, W), ([1.0], W), (X, W, 1.0)):
        with pytest.raises(TypeError):
            regfast.linear(*arguments)


@pytest.mark.no_kernels("errors")
def test_error_for_an_unknown_activation():
    with pytest.raises(ValueError, match=r"regfast\.linear.*activation.*expected.*relu.*got.*swish"):
        regfast.linear(X, W, B, activation="swish")


@pytest.mark.parametrize("gemm", ["own", "aten"])
@pytest.mark.no_kernels("another process")
def test_who_multiplies(gemm):
    # The switch forces a side, build_info tells, and either side gives the same result.
    printed = fresh_process(
        """
        import torch, regfast
        torch.manual_seed(0)
        x, w = torch.randn(70, 300), torch.randn(90, 300)
        print(regfast.linear(x, w).double().sub(x.double() @ w.double().t()).abs().max().item() < 1e-3)
        print(sorted(set(regfast.build_info()["linear"].values())))
        """,
        REGFAST_GEMM=gemm,
    )
    assert printed.split("\n")[:2] == ["True", "['regfast']" if gemm == "own" else "['aten']"]
