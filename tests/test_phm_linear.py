"""phm_linear: values and gradients against the stored weight, masks, layouts, memory."""

import itertools
from functools import reduce
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_linear import ACTIVATIONS
from torch.testing import assert_close
from util import INF, LAYOUTS, NAN, check, evaluate, fresh_process, lay_out, measures_memory, spiky, with_all_kernels

import regfast
from regfast import reference

pytestmark = pytest.mark.kernels("phm_linear", "linear")

# rows, inputs, outputs, n
SHAPES = [
    (1, 2, 2, 2),  # parts of one element
    (1, 64, 48, 4),  # one row, whose mixed rows are dot products
    (7, 15, 9, 3),  # n is no power of two: tiles of one part, groups of 30 mixed rows
    (5, 40, 24, 8),  # 40 mixed rows: more than one group of dot products
    (9, 40, 24, 8),  # 72: beyond the dot products
    (5, 34, 66, 2),  # parts with tails
    (33, 48, 32, 16),  # n * n = 256 combinations
    (70, 60, 100, 5),  # blocks of rows in a's gradient
]
MANY_PARTS = (6, 66, 33, 33)  # n beyond a group of dot products; one output to a part
LARGE = (1500, 512, 256, 4)  # 12 MB of mixed rows: chunks, with caches of up to 32 MB


def weight(a, s):
    return reduce(torch.add, map(torch.kron, a.contiguous(), s.contiguous()))  # kron refuses some layouts


def composed(activation="none"):
    """The layer as it is written in PyTorch."""
    return lambda x, a, s, b: ACTIVATIONS[activation](F.linear(x, weight(a, s), b))


def operands(rows, inputs, outputs, n, dtype=torch.float32, bias=True, size=4.0):
    x, a = spiky(rows, inputs, dtype=dtype, size=size), (spiky(n, n, n, size=size) / n).to(dtype)
    s = (spiky(n, outputs // n, inputs // n, size=size) / 4).to(dtype)
    b = spiky(outputs, dtype=dtype, size=size).requires_grad_() if bias else None
    return x.requires_grad_(), a.requires_grad_(), s.requires_grad_(), b


def check_phm(x, a, s, b, activation="none", grads=None, what="", pool=None):
    """An activation's derivative is at most 1.13, so the plain product bounds the terms of every sum."""
    check(
        lambda *t: regfast.phm_linear(*t, activation=activation),
        composed(activation),
        x,
        a,
        s,
        b,
        grads=grads,
        magnitude=composed(),
        what=what or activation,
        pool=pool,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_values_and_gradients(shape, bias, dtype, device):
    check_phm(*(t if t is None else t.detach().to(device).requires_grad_() for t in operands(*shape, dtype, bias)))


@with_all_kernels
def test_many_parts(dtype):
    # Slow where the CPU plays the GPU, whose tiles of parts are smaller and have all orders of the threads above: one
    # order, and a bias with two of the dtypes.
    check_phm(*operands(*MANY_PARTS, dtype, bias=dtype in (torch.float32, torch.bfloat16)))


def test_chunks_of_rows(dtype):
    check_phm(*operands(*LARGE, dtype), "silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype):
    for rows in (2, 40):
        x, a, s, b = operands(rows, 24, 20, 4, dtype, size=1)
        check_phm(x, a, s, b, activation)
        exact = [t.detach().double() for t in (x, a, s, b)]
        assert_close(reference.phm_linear(*exact, activation=activation), composed(activation)(*exact))


@pytest.mark.no_kernels("the reference")
def test_the_reference_stores_the_sum_of_kronecker_products():
    a, s = spiky(3, 3, 3, dtype=torch.float64), spiky(3, 4, 5, dtype=torch.float64)
    assert_close(reference.phm_weight(a, s), weight(a, s))


def test_quaternions():
    # Hamilton's table: ij = k, ji = -k, and the squares of i, j and k are -1.
    table = torch.zeros(4, 4, 4)
    for row, col, index, sign in [
        (0, 0, 0, 1), (0, 1, 1, -1), (0, 2, 2, -1), (0, 3, 3, -1),
        (1, 0, 1, 1), (1, 1, 0, 1), (1, 2, 3, -1), (1, 3, 2, 1),
        (2, 0, 2, 1), (2, 1, 3, 1), (2, 2, 0, 1), (2, 3, 1, -1),
        (3, 0, 3, 1), (3, 1, 2, -1), (3, 2, 1, 1), (3, 3, 0, 1),
    ]:  # fmt: skip
        table[index, row, col] = sign
    i, j, k = torch.eye(4)[1:]
    for p, q, product in ((i, j, k), (j, k, i), (k, i, j), (j, i, -k), (i, i, torch.tensor([-1.0, 0, 0, 0]))):
        assert torch.equal(regfast.phm_linear(q, table, p.view(4, 1, 1)), product)


@with_all_kernels
def test_one_summand_is_the_dense_layer(dtype, kernels):
    x, a, s, b = operands(9, 14, 10, 1, dtype)
    one = torch.ones_like(a)
    for activation in ("none", "gelu"):
        ours = regfast.phm_linear(x, one, s, b, activation=activation)
        dense = regfast.linear(x, s[0], b, activation=activation)
        if kernels == "cpu":
            assert torch.equal(ours, dense)
        else:  # products that are ATen's have another order of sums, and half types round the mixed rows
            bounds = {"rtol": 0.02, "atol": 0.02} if dtype.itemsize == 2 else {}
            torch.testing.assert_close(ours, dense, **bounds)
        check_phm(x, a, s, b, activation)


@with_all_kernels
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (4, 1, 5), (2, 0, 3)], ids=str)
def test_leading_dimensions(lead, dtype):
    _, a, s, b = operands(1, 12, 8, 4, dtype)
    x = spiky(*lead, 12, dtype=dtype).requires_grad_()
    assert regfast.phm_linear(x, a, s, b).shape == (*lead, 8)
    check_phm(x, a, s, b, "gelu")


@pytest.mark.parametrize("rows, inputs, outputs", [(0, 6, 4), (3, 0, 4), (3, 6, 0), (0, 0, 0), (3, 0, 0)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_empty(rows, inputs, outputs, bias):
    for activation in ("none", "silu"):
        check_phm(*operands(rows, inputs, outputs, 2, bias=bias), activation)


@with_all_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [2, 40])
def test_layouts(layout, rows):
    leaves = operands(rows, 24, 20, 4)
    check_phm(*(lay_out(t.detach(), layout).requires_grad_() for t in leaves), "silu")
    seed = [lay_out(spiky(rows, 20), layout)]
    for activation in ("none", "relu", "gelu"):
        check_phm(*leaves, activation, grads=seed)
    whole = spiky(4, 6, 5, 24)
    for x in (whole.transpose(0, 2), whole[:, ::2], whole.permute(2, 1, 0, 3), whole[:, :1].expand(4, 6, 5, 24)):
        check_phm(x.detach().requires_grad_(), *leaves[1:])


def test_gradient_from_sum_is_expanded():
    x, a, s, b = operands(40, 24, 20, 4, size=1)
    check(
        lambda *t: regfast.phm_linear(*t, activation="tanh").sum() * 0.7,
        lambda *t: composed("tanh")(*t).sum() * 0.7,
        x,
        a,
        s,
        b,
        magnitude=lambda *t: composed()(*t).sum(),
    )


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.composite("create_graph")
def test_only_the_gradients_that_are_asked_for(mask, activation):
    leaves = [t.detach().requires_grad_(m) for t, m in zip(operands(9, 12, 8, 4), mask, strict=True)]
    assert regfast.phm_linear(*leaves, activation=activation).requires_grad == any(mask)
    check_phm(*leaves, activation)
    # Second derivatives of what was left out of the saved tensors.
    if any(mask):
        results = []
        for fn in (lambda *t: regfast.phm_linear(*t, activation=activation), composed(activation)):
            exact = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
            wanted = [t for t in exact if t.requires_grad]
            first = torch.autograd.grad(fn(*exact).square().sum(), wanted, create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in first), wanted, materialize_grads=True))
        assert_close(*results)


def test_a_frozen_input_costs_no_product():
    # The graph keeps what its gradients need: not the input where a and s are frozen.
    x, a, s, b = operands(9, 12, 8, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        regfast.phm_linear(x, a.detach(), s.detach(), b)
    assert x.data_ptr() not in kept and s.data_ptr() in kept
    dx, da, ds, db = torch.ops.regfast.phm_linear_backward(
        spiky(9, 8), x, a, s, None, "none", [False, True, False, False]
    )
    assert dx.numel() == ds.numel() == db.numel() == 0 and da.shape == a.shape


def test_accumulates_in_float32_for_half_types():
    # 4096 ones make 256 in a bf16 accumulator, where adding 1 changes nothing any more.
    for half in (torch.bfloat16, torch.float16):
        a, s = torch.ones(2, 2, 2, dtype=half), torch.ones(2, 2, 1024, dtype=half)
        assert (regfast.phm_linear(torch.ones(2, 2048, dtype=half), a, s) == 4096).all()
        x, s = torch.ones(4096, 2, dtype=half), torch.ones(2, 1, 1, dtype=half, requires_grad=True)
        (gs,) = torch.autograd.grad(regfast.phm_linear(x, a, s), s, torch.full((4096, 2), 0.25, dtype=half))
        assert (gs == 4096).all()


def test_special_values_are_not_masked():
    x, a, s, b = (t.detach() for t in operands(40, 24, 20, 4))
    x[3, 5], s[2, 4, 1] = NAN, INF
    out, true = regfast.phm_linear(x, a, s, b), composed()(x, a, s, b)
    assert torch.equal(out.isfinite(), true.isfinite()) and out[3].isnan().all()


@pytest.mark.parametrize("shape", [(3, 96, 64, 4), (130, 96, 64, 4), (1100, 512, 64, 4)], ids=str)
def test_same_bits_on_every_run_and_with_any_number_of_threads(shape, dtype, threads):
    leaves = operands(*shape, dtype)
    results, seeds = [], None
    for count in (2, 2, 1):
        torch.set_num_threads(count)
        out, grads, seeds = evaluate(lambda *t: regfast.phm_linear(*t, activation="gelu"), list(leaves), seeds)
        results.append([*out, *grads])
    for again in results[1:]:
        assert all(map(torch.equal, results[0], again))


@given(
    rows=st.integers(0, 40),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    n=st.integers(1, 6),
    bias=st.booleans(),
    activation=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    mask=st.tuples(*[st.booleans()] * 4),
)
def test_any_shape_and_option(rows, sizes, n, bias, activation, dtype, layouts, mask):
    torch.manual_seed(rows + 41 * sizes[0] + 2911 * sizes[1] + n)
    x, a, s, b = operands(rows, n * sizes[0], n * sizes[1], n, dtype, bias, size=1)
    x, a, s = (
        lay_out(t.detach(), layout).requires_grad_(m) for t, layout, m in zip((x, a, s), layouts, mask, strict=False)
    )
    seed = [lay_out(spiky(rows, n * sizes[1], dtype=dtype), layouts[3])]
    check_phm(x, a, s, b if b is None else b.detach().requires_grad_(mask[3]), activation, grads=seed)


# Errors

X, A, S, B = torch.ones(4, 6), torch.ones(2, 2, 2), torch.ones(2, 5, 3), torch.ones(10)


@pytest.mark.parametrize(
    "argument, arguments",
    [
        ("a", (X, torch.ones(2, 2), S)),
        ("a", (X, torch.ones(2, 2, 3), S)),
        ("a", (X, torch.ones(0, 0, 0), S)),
        ("s", (X, A, torch.ones(5, 3))),
        ("s", (X, A, torch.ones(3, 5, 2))),
        ("input", (torch.ones(4, 5), A, S)),
        ("input", (torch.tensor(1.0), A, S)),
        ("bias", (X, A, S, torch.ones(5))),
        ("bias", (X, A, S, torch.ones(1, 10))),
        ("a", (X, A.double(), S)),
        ("s", (X, A, S.bfloat16())),
        ("bias", (X, A, S, B.double())),
        ("s", (X, A, S.to("meta"))),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.no_kernels("errors")
def test_errors_name_the_argument(argument, arguments):
    with pytest.raises(RuntimeError, match=rf"regfast\.phm_linear: {argument}: expected .*, got"):
        regfast.phm_linear(*arguments)


@pytest.mark.no_kernels("errors")
def test_errors_of_other_types():
    for module in (regfast, reference):
        with pytest.raises(ValueError, match=r"regfast\.phm_linear: activation: expected .*relu.*, got.*swish"):
            module.phm_linear(X, A, S, activation="swish")
    for arguments in ((None, A, S), (X, 1.0, S), (X, A, None), (X, A, S, 1.0)):
        with pytest.raises(TypeError, match=r"regfast\.phm_linear: .*: expected a Tensor, got"):
            regfast.phm_linear(*arguments)
    for arguments in ((X, torch.ones(2, 2), S), (X, A, torch.ones(3, 5, 2))):
        with pytest.raises(RuntimeError, match=r"regfast\.phm_linear: .: expected .*, got"):
            reference.phm_linear(*arguments)


# Memory


PEAK = """
    import torch, regfast
    from pathlib import Path
    def status(name):
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
    def step(rows, inputs, outputs, n, copied):
        torch.manual_seed(0)
        layer = regfast.PHMLinear(inputs, outputs, n, activation="relu")
        x, g = torch.randn(rows, inputs, requires_grad=True), torch.randn(rows, outputs)
        s = layer.matrices.detach().contiguous().requires_grad_() if copied else None
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        y = regfast.phm_linear(x, layer.a, s, layer.bias, activation="relu") if copied else layer(x)
        y.backward(g)
        return status("VmHWM") - before
    for copied in (False, True):
        step(8, 64, 64, 4, copied)
        print(step(32, 4096, 8192, 8, copied))
"""


@measures_memory
@pytest.mark.no_kernels("another process")
def test_the_weight_is_never_stored():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this kernel does not reset the high-water mark")
    # W takes 128 MiB, s and its gradient 16 each, rows and their mixture less than 8 together.
    for line, copies in zip(fresh_process(PEAK, MALLOC_MMAP_THRESHOLD_="65536").splitlines(), (1, 3), strict=True):
        assert int(line) < (16 * copies + 24) * 2**20, f"{int(line) / 2**20:.1f} MiB"
