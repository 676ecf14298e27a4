"""linear_nll's CUDA kernels, on a GPU where there is one and emulated: values and gradients against float64 for every
family and option, several chunks, same bits, and what a call must not do."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from on_cuda import PRODUCTS, WAITS, on, placed, seen
from torch.testing import assert_close
from util import HALF, LAYOUTS, Pool, check, evaluate, lay_out, spiky

import regfast
from regfast.reference import FAMILIES

pytestmark = pytest.mark.kernels("linear_nll")

ops = torch.ops.regfast
REDUCTIONS = ("none", "mean", "sum")
ROWS = 131  # in two chunks, of 128 rows and the rest, on a device without memory
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def chunks(cuda_device):
    """Of 128 rows, which the emulator's device is told to have no memory for; a GPU has all of it and makes one."""
    if cuda_device != "cpu":
        yield
        return
    from conftest import EMULATOR

    before = EMULATOR.set_memory(0)
    try:
        yield EMULATOR.set_memory
    finally:
        EMULATOR.set_memory(before)


def operands(n, d, v, dtype=torch.float32, family="squared"):
    """Rows, weights and a bias that make predictions of a few units, with spikes where those have no exponential."""
    size = 0.5 if family == "poisson" else 4.0
    x = spiky(*((n, d) if n is not None else (d,)), dtype=dtype, size=size)
    w = spiky(v, d, size=size) / (2 * max(1, d) ** 0.5)
    return [t.to(dtype).requires_grad_() for t in (x, w, spiky(v, size=0.5))]


def targets(family, *shape, dtype=torch.float32):
    if family == "poisson":
        return torch.poisson(torch.full(shape, 1.5)).to(dtype)
    return (torch.rand(shape) if family == "bernoulli" else 2 * spiky(*shape)).to(dtype)


def scales(family, v, dtype=torch.float32, *, one=False):
    """Variances, which are learned, or weights of positives."""
    if family not in ("gaussian", "bernoulli"):
        return None
    return (torch.rand(() if one else v) + 0.3).to(dtype).requires_grad_(family == "gaussian")


def regfasts(x, w, y, b=None, s=None, c=None, *, family, variance=1.0, full=False, reduction="mean", loss_dtype=None):
    number = FAMILIES.index(family)
    return ops.linear_nll(x, w, y, b, s, c, number, variance, full, REDUCTIONS.index(reduction), loss_dtype)


def torchs(x, w, y, b=None, s=None, c=None, *, family, variance=1.0, full=False, reduction="mean"):
    """F.linear and the losses of torch.nn.functional in the inputs' dtype, in float32 at least beyond the product."""
    result = torch.promote_types(x.dtype, y.dtype) if y.is_floating_point() else x.dtype
    wide = torch.promote_types(x.dtype, torch.float32)
    x, w, b, s, c = (t if t is None else t.to(wide) for t in (x, w, b, s, c))
    eta, y = F.linear(x, w, b), y.to(wide)
    if family == "squared":
        loss = F.mse_loss(eta, y, reduction="none")
    elif family == "gaussian":
        v = torch.full_like(eta, variance) if s is None else s.expand(eta.shape)
        loss = F.gaussian_nll_loss(eta, y, v, full=full, reduction="none")
    elif family == "bernoulli":
        loss = F.binary_cross_entropy_with_logits(eta, y, pos_weight=s, reduction="none")
    else:
        loss = F.poisson_nll_loss(eta, y, full=full, reduction="none")
    weights = torch.ones_like(loss) if c is None else c.unsqueeze(-1).expand(loss.shape)
    if reduction == "none":
        return (loss * weights).to(result)
    total = (loss * weights).sum()
    return (total if reduction == "sum" else total / weights.sum()).to(result)


def check_nll(*tensors, pool=None, what="", terms=None, loss_dtype=None, **options):
    def ours(*t):
        return regfasts(*t, loss_dtype=loss_dtype, **options)

    def theirs(*t):
        loss = torchs(*t, **options)
        return loss if loss_dtype is None else loss.to(loss_dtype)

    check(ours, theirs, *tensors, exact=lambda *t: torchs(*t, **options), pool=pool, what=what, terms=terms)


# Values and gradients


@each_family
@pytest.mark.parametrize("mode", ("mean", "none"))
def test_values_and_gradients(cuda_device, family, mode, dtype):
    pool = Pool(dtype)
    for n, d, v in [(1, 1, 1), (5, 3, 1), (1, 17, 33), (19, 30, 129), (ROWS, 8, 19), (3 * ROWS, 2, 1)]:
        x, w, b = operands(n, d, v, dtype, family)
        y, s = targets(family, n, v, dtype=dtype), scales(family, v, dtype)
        tensors = on(cuda_device, x, w, y, b, s, torch.rand(n).to(dtype))
        check_nll(*tensors, family=family, reduction=mode, full=True, pool=pool, what=f"{n} {d} {v}")
    pool.check()


@each_family
def test_options_together(cuda_device, family, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for bias, scale, weight, full, mode in itertools.product(
        (False, True), (None, "one", "each"), (None, dtype, wide), (False, True), REDUCTIONS
    ):
        if (scale and scales(family, 1) is None) or (full and family in ("squared", "bernoulli")):
            continue
        x, w, b = operands(ROWS, 5, 6, dtype, family)
        s = scales(family, 6, wide if full else dtype, one=scale == "one") if scale else None
        c = None if weight is None else torch.rand(ROWS).to(weight)
        tensors = on(cuda_device, x, w, targets(family, ROWS, 6, dtype=dtype), b if bias else None, s, c)
        check_nll(*tensors, family=family, full=full, reduction=mode, variance=0.4, terms=1.0)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, *HALF, torch.float32], ids=str)
def test_target_dtypes(cuda_device, kind, dtype):
    if dtype in HALF and kind in HALF and kind != dtype:
        kind = torch.int32
    for family, mode in itertools.product(("squared", "bernoulli", "poisson"), REDUCTIONS):
        x, w, b = operands(ROWS, 4, 9, dtype, family)
        y = torch.randint(0, 2 if family == "bernoulli" else 7, (ROWS, 9)).to(kind)
        check_nll(*on(cuda_device, x, w, y, b), family=family, reduction=mode, full=family == "poisson", terms=1.0)


@pytest.mark.parametrize("loss_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_loss_dtype(cuda_device, loss_dtype, dtype):
    x, w, b = operands(ROWS, 4, 9, dtype)
    tensors = on(cuda_device, x, w, targets("gaussian", ROWS, 9, dtype=dtype), b)
    for mode in REDUCTIONS:
        assert regfasts(*tensors, family="gaussian", reduction=mode, loss_dtype=loss_dtype).dtype == loss_dtype
        check_nll(*tensors, family="gaussian", reduction=mode, loss_dtype=loss_dtype, terms=1.0)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3, 50)], ids=str)
def test_leading_dimensions(cuda_device, lead, dtype):
    for family, mode in itertools.product(("gaussian", "poisson"), REDUCTIONS):
        rows = torch.Size(lead).numel()
        x, w, b = operands(rows, 5, 7, dtype, family)
        x = x.detach().reshape(*lead, 5).requires_grad_()
        y, c = targets(family, *lead, 7, dtype=dtype), torch.rand(lead).to(dtype)
        tensors = on(cuda_device, x, w, y, b, scales(family, 7, dtype), c)
        check_nll(*tensors, family=family, reduction=mode, terms=1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(cuda_device, layout, dtype):
    for lead, mode in itertools.product(((ROWS,), (3, 50)), REDUCTIONS):
        x, w, b = operands(ROWS, 5, 9, dtype)
        x = spiky(*lead, 5, dtype=dtype).requires_grad_()
        x, w, b = (lay_out(t.detach(), layout).requires_grad_() for t in (x, w, b))
        y, s = lay_out(targets("gaussian", *lead, 9, dtype=dtype), layout), scales("gaussian", 9, dtype)
        s, c = lay_out(s.detach(), layout).requires_grad_(), lay_out(torch.rand(lead).to(dtype), layout)
        check_nll(*placed(cuda_device, x, w, y, b, s, c), family="gaussian", reduction=mode, terms=1.0)


@pytest.mark.parametrize("n, d, v", [(0, 3, 5), (4, 0, 5), (4, 3, 0), (0, 0, 0)], ids=str)
def test_nothing(cuda_device, n, d, v):
    for family, mode, weighted in itertools.product(("squared", "gaussian"), REDUCTIONS, (False, True)):
        x, w, b = operands(n, d, v)
        y, s = targets(family, n, v), scales(family, v)
        tensors = on(cuda_device, x, w, y, b, s, torch.rand(n) if weighted else None)
        check_nll(*tensors, family=family, reduction=mode)


@settings(max_examples=30)
@given(
    n=st.integers(0, 140),
    d=st.integers(1, 12),
    v=st.integers(1, 20),
    family=st.sampled_from(FAMILIES),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.float64, *HALF]),
    wide_target=st.booleans(),
    given=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    one=st.booleans(),
    full=st.booleans(),
    mode=st.sampled_from(REDUCTIONS),
    memory=st.sampled_from([0, 2**20, 2**31]),
)
def test_any_combination(
    cuda_device, chunks, n, d, v, family, layout, dtype, wide_target, given, one, full, mode, memory
):
    if chunks:
        chunks(memory)
    torch.manual_seed(n + 13 * v + 7 * d)
    biased, scaled, weighted = given
    x, w, b = operands(n, d, v, dtype, family)
    x = lay_out(x.detach(), layout).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    y = lay_out(targets(family, n, v, dtype=wide if wide_target else dtype), layout)
    s = scales(family, v, dtype, one=one) if scaled else None
    c = torch.rand(n).to(dtype) if weighted else None
    full = full and family in ("gaussian", "poisson")
    check_nll(
        *placed(cuda_device, x, w, y, b if biased else None, s, c), family=family, full=full, reduction=mode, terms=1.0
    )


# Precision and chunks


@each_family
def test_any_number_of_chunks_gives_the_same(cuda_device, chunks, family, dtype):
    if not chunks:
        pytest.skip("a GPU has memory for one chunk")
    n, d, v = 260, 7, 10
    x, w, b = operands(n, d, v, dtype, family)
    y, c = targets(family, n, v, dtype=dtype), torch.rand(n).to(dtype)
    tensors = (x, w, y, b, scales(family, v, dtype), c)
    for mode in REDUCTIONS:
        results, seeds = [], None
        for memory in (0, 2**31):  # three chunks, one
            chunks(memory)
            out, grads, seeds = evaluate(
                lambda *t, m=mode: regfasts(*t, family=family, reduction=m), placed("cpu", *tensors), seeds
            )
            results.append([*out, *grads])
        accumulated = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        for several, one in zip(*results, strict=True):
            size = one.detach().double().abs().max().item()
            distance = (several.double() - one.double()).abs().max().item()
            assert distance <= ((torch.finfo(dtype).eps if dtype in HALF else 0) + 64 * accumulated) * size


@pytest.mark.parametrize("half", HALF, ids=str)
def test_predictions_are_not_rounded_to_half_types(cuda_device, half):
    # Of a model that fits, what is left over is less than a prediction's last digit.
    x, w, b = operands(ROWS, 16, 3, half)
    b = (b.detach() + 100).requires_grad_()
    noise = 0.01 * torch.randn(ROWS, 3)
    y = F.linear(x.double(), w.double(), b.double()).detach().float() + noise
    tensors = on(cuda_device, x, w, y, b)
    loss = regfasts(*tensors, family="squared")
    assert_close(loss.cpu(), noise.square().mean(), rtol=1e-3, atol=0)
    (db,) = torch.autograd.grad(loss, tensors[3])
    assert_close(db.cpu().float(), -2 * noise.mean(0) / 3, rtol=2**-6, atol=2e-5)


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("size", [1e-3, 1e4])
def test_the_mean_of_many_rows_keeps_small_and_large_slopes(cuda_device, half, size):
    # Of float16 the slopes of a mean, of size / (rows V), or of a sum, of size * weight, may be out of range.
    n, d, v = 2048, 3, 9
    x, w = (torch.randn(*s).to(half).requires_grad_() for s in ((n, d), (v, d)))
    y, c = size * torch.randn(n, v), 20 * torch.rand(n)
    for weights in (None, c):
        at, wt, yt, ct = on(cuda_device, x, w, y, weights)
        double = wt.detach().double().requires_grad_()
        options = {"family": "squared", "reduction": "mean"}
        exact = torch.autograd.grad(
            torchs(at.detach().double(), double, yt.double(), c=None if ct is None else ct.double(), **options), double
        )[0]
        ours = torch.autograd.grad(regfasts(at, wt, yt, None, None, ct, **options), wt)[0]
        assert (ours.double() - exact).norm() <= 4 * torch.finfo(half).eps * exact.norm()


def test_bernoulli_of_certain_predictions(cuda_device, dtype):
    x = torch.tensor([[1e4], [-1e4], [88.0], [-88.0], [104.0], [-104.0], [0.0]]).to(dtype)
    w = torch.ones(2, 1, dtype=dtype)
    y = torch.tensor([[0.0, 1.0]]).expand(7, 2).to(dtype)
    tensors = on(cuda_device, x.requires_grad_(), w.requires_grad_(), y)
    for mode in REDUCTIONS:
        check_nll(*tensors, family="bernoulli", reduction=mode)


# Graphs


@pytest.mark.parametrize("mode", REDUCTIONS)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_second_backward_through_a_retained_graph(cuda_device, mode, half):
    dtype = torch.bfloat16 if half else torch.float32
    x, w, b = operands(ROWS, 5, 11, dtype)
    y, s = targets("gaussian", ROWS, 11, dtype=dtype), scales("gaussian", 11, dtype)
    x, w, y, b, s, c = on(cuda_device, x, w, y, b, s, torch.rand(ROWS).to(dtype))
    out = regfasts(x, w, y, b, s, c, family="gaussian", reduction=mode)
    results = []
    for scale in (1.0, -2.5):
        grads = torch.autograd.grad(out, [x, w, b, s], torch.full_like(out, scale), retain_graph=True)
        results.append([g / scale for g in grads])
        for g in grads:
            g.fill_(1e6)  # they are given away
    for first, second in zip(*results, strict=True):
        assert (first - second).abs().max() <= 8 * torch.finfo(dtype).eps * first.abs().max()


@each_family
def test_inputs_are_not_changed(cuda_device, family, dtype):
    for mode in REDUCTIONS:
        x, w, b = operands(9, 5, 9, dtype, family)
        y, s, c = targets(family, 9, 9, dtype=dtype), scales(family, 9, dtype), torch.rand(9).to(dtype)
        every = [t for t in on(cuda_device, x, w, y, b, s, c) if t is not None]
        before = [t.detach().clone() for t in every]
        given = every if s is not None else [*every[:4], None, every[4]]
        out = regfasts(*given, family=family, reduction=mode)
        out.backward(torch.full_like(out, 0.3))
        assert all(t._version == 0 and torch.equal(t.detach(), old) for t, old in zip(every, before, strict=True))


@each_family
def test_same_bits_on_every_run(cuda_device, family):
    for dtype, mode in itertools.product((torch.float32, torch.bfloat16), REDUCTIONS):
        x, w, b = operands(3 * ROWS, 9, 17, dtype, family)
        y, s, c = targets(family, 3 * ROWS, 17, dtype=dtype), scales(family, 17, dtype), torch.rand(3 * ROWS).to(dtype)
        results, seeds = [], None
        for _ in range(2):
            tensors = on(cuda_device, x, w, y, b, s, c)
            out, grads, seeds = evaluate(lambda *t, m=mode: regfasts(*t, family=family, reduction=m), tensors, seeds)
            results.append([*out, *grads])
        assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


# Only what is asked for, and nothing that a GPU would have to be waited for


def calls(device, family, mode, mask):
    """The ops below autograd, where the emulator's tensors are no longer known to be the CPU's."""
    x, w, b = (t.detach() for t in operands(ROWS, 5, 9, family=family))
    s = scales(family, 9)
    tensors = on(device, x, w, targets(family, ROWS, 9), b, None if s is None else s.detach(), torch.rand(ROWS))
    saved = (*tensors, FAMILIES.index(family), 1.0, True, REDUCTIONS.index(mode))
    up = torch.randn((ROWS, 9) if mode == "none" else (), device=device)
    yield "forward", lambda: ops.linear_nll_forward(*saved, None)
    if mode != "none":
        yield "forward_backward", lambda: ops.linear_nll_forward_backward(*saved, None, mask)
    yield "backward", lambda: ops.linear_nll_backward(up, *saved, mask)


@each_family
@pytest.mark.parametrize("mode", REDUCTIONS)
def test_nothing_waits_for_the_device(cuda_device, family, mode):
    for what, call in calls(cuda_device, family, mode, [True, True, True, family == "gaussian"]):
        assert not WAITS & seen(call).keys(), what


def test_frozen_inputs_cost_no_product(cuda_device, chunks):
    # In each chunk one for the predictions, by ATen or not, and ATen's for each gradient of x and w.
    count = 2 if chunks else 1
    for mask in itertools.product([False, True], repeat=3):
        products = {}
        for what, call in calls(cuda_device, "gaussian", "mean", [*mask, False]):
            counts = seen(call)
            products[what] = sum(counts.get(name, 0) for name in PRODUCTS)
        predictions = products.pop("forward")
        assert predictions in (0, count) and products.keys() == {"forward_backward", "backward"}
        assert set(products.values()) == {predictions + count * (mask[0] + mask[1])}, mask


def test_only_the_gradients_that_are_asked_for(cuda_device):
    for *mask, mode in itertools.product(*[[False, True]] * 4, REDUCTIONS):
        x, w, b = operands(9, 4, 9)
        tensors = on(cuda_device, *(t.detach() for t in (x, w, b, scales("gaussian", 9))))
        x, w, b, s = (t.requires_grad_(wanted) for t, wanted in zip(tensors, mask, strict=True))
        (y,) = on(cuda_device, targets("gaussian", 9, 9))
        if any(mask):
            check_nll(x, w, y, b, s, family="gaussian", reduction=mode, terms=1.0)
        else:
            assert not regfasts(x, w, y, b, s, family="gaussian", reduction=mode).requires_grad


def test_as_it_is_called(cuda_device):
    x, w, b = operands(ROWS, 5, 3)
    x, w, b, y, sigma = on(cuda_device, x, w, b, targets("gaussian", ROWS, 3), torch.rand(3) + 0.5)
    ours = regfast.linear_nll(x, w, y, b, family="gaussian", sigma=sigma)
    assert "rf::" in ours.grad_fn.name()  # and not the composite
    assert_close(ours, torchs(x, w, y, b, sigma.square(), family="gaussian", full=True))
    assert_close(regfast.linear_mse_loss(x, w, y, b), F.mse_loss(F.linear(x, w, b), y))
