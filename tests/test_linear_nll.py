"""linear_nll and linear_mse_loss: values and gradients against float64 for every family, option, shape and layout."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from linear_nll_cases import (
    FAMILIES,
    REDUCTIONS,
    SHAPES,
    check_nll,
    each_family,
    each_reduction,
    operands,
    ours,
    references,
    scales,
    targets,
    torchs,
)
from torch.testing import assert_close
from util import DTYPES, HALF, LAYOUTS, MULTIPLIES_PAIRS, Pool, evaluate, lay_out, spiky

import regfast

pytestmark = pytest.mark.kernels("linear_nll")


# Values and gradients


@each_family
@each_reduction
def test_values_and_gradients(family, mode, dtype, pool):
    options = {"family": family, "reduction": mode, "pool": pool}
    options["terms"] = 1.0 if mode == "mean" else 8.0  # slopes of both signs cancel
    for lead, d, v in SHAPES:
        x, w, b = operands(lead, d, v, dtype)
        t = targets(family, *lead, v, dtype=dtype)
        check_nll(x, w, t, b, **options, what=f"{lead} {d} {v}")
        check_nll(x, w, t, **options, what=f"{lead} {d} {v} without bias")


@each_family
@each_reduction
def test_options_together(family, mode, dtype, pool):
    for (lead, d, v), weighted in itertools.product([((33,), 5, 3), ((40,), 33, 8), ((3, 13), 12, 21)], (False, True)):
        x, w, b = operands(lead, d, v, dtype)
        t = targets(family, *lead, v, dtype=dtype)
        weights = torch.rand(lead).to(dtype) if weighted else None
        for scale, full in itertools.product(scales(family, v, dtype), (False, True)):
            options = {"family": family, "reduction": mode}
            if family in ("gaussian", "poisson"):
                options["full"] = full
            check_nll(x, w, t, None if weighted == full else b, scale, weights, pool=pool, **options)


@each_family
@each_reduction
@pytest.mark.parametrize("half", HALF, ids=str)
def test_half_types_are_computed_in_float32_and_rounded_once(half, mode, family):
    # F.linear rounds its predictions; this one is as good as float32 operators whose results alone are rounded. Where
    # pairs of bfloat16 are multiplied, the residuals of more outputs than one pass takes are rounded too.
    pairs = half is torch.bfloat16 and MULTIPLIES_PAIRS
    theirs = torchs if pairs else references
    pool = Pool(half)
    for lead, d, v in [((70,), 9, 5), ((40,), 33, 2), ((37,), 30, 129)]:
        x, w, b = operands(lead, d, v, half)
        t, weights = targets(family, *lead, v, dtype=half), torch.rand(lead).to(half)
        fns = [lambda *t, fn=fn: fn(*t, family=family, reduction=mode) for fn in (ours, torchs)]
        out, grads, seeds = evaluate(fns[0], [x, w, t, b, None, weights], None)
        true_out, true_grads, _ = evaluate(fns[1], [x, w, t, b, None, weights], seeds, dtype=torch.float64)
        for i, (got, true) in enumerate(zip((*out, *grads), (*true_out, *true_grads), strict=True)):
            finite = true.to(half).isfinite()
            error = (got.double() - true)[finite].abs().max() / true[finite].abs().max() / torch.finfo(half).eps
            allowed = 1.0 if pairs and i >= len(out) else 0.51
            assert error <= allowed, f"{lead} {d} {v} {tuple(got.shape)}: {error:.3g} epsilons"
        check_nll(x, w, t, b, None, weights, theirs=theirs, pool=pool, family=family, reduction=mode)
    pool.check()


@pytest.mark.parametrize("half", HALF, ids=str)
def test_sigma_of_a_half_type_is_squared_in_float32(half):
    # 300 squared is beyond float16, and of 2**-13 squared is nothing left there.
    x, w, b = operands((40,), 5, 2, half)
    for size in (300.0, 2.0**-8):
        t = (size * spiky(40, 2)).to(half)
        x, w = (size * x.detach()).requires_grad_(), w.detach().requires_grad_()
        sigma = torch.tensor([size, 1.1 * size]).to(half).requires_grad_()
        check_nll(x, w, t, b, sigma, family="gaussian", eps=1e-12, theirs=references)


@each_family
def test_many_rows_are_summed_in_parts(family, dtype, threads):
    # Several partial sums of each, also where the rows are no multiple of anything.
    for (n, d, v), count in itertools.product([(20_000, 3, 2), (9_001, 20, 1), (9_001, 20, 12)], (1, 2)):
        torch.set_num_threads(count)
        x, w, b = operands((n,), d, v, dtype)
        t, weights = targets(family, n, v, dtype=dtype), torch.rand(n).to(dtype)
        for scale in (scales(family, v, dtype)[0], scales(family, v, dtype)[-1]):
            check_nll(x, w, t, b, scale, weights, family=family, theirs=references if dtype in HALF else torchs)


@each_family
def test_chunks_are_the_sum_of_their_rows(family):
    # 76 MiB of predictions, where two cores may have 64 MiB of them at once; a tenth of the rows are one chunk.
    n, v = 66_001, 300
    x, w, b = operands((n,), 2, v)
    t, weights, scale = targets(family, n, v), torch.rand(n), scales(family, v)[-1]
    leaves = [x, w, b] + ([scale] if scale is not None and scale.requires_grad else [])

    def sums(rows):
        loss = ours(x[rows], w, t[rows], b, scale, weights[rows], family=family, reduction="sum")
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    parts = [sums(slice(begin, begin + n // 10)) for begin in range(0, n, n // 10)]
    for whole, *part in zip(sums(slice(None)), *parts, strict=True):
        total = torch.stack(part).double().sum(0)
        assert_close(whole.double(), total, rtol=1e-5, atol=1e-5 * total.abs().max().item())


def test_few_outputs_of_very_many_features(dtype):
    # Weights whose partial sums would be too large for one pass are left to the products.
    for lead, d, v in [((9,), 140_000, 1), ((3,), 30_011, 8)]:
        x, w, b = operands(lead, d, v, dtype)
        check_nll(x, w, targets("bernoulli", *lead, v, dtype=dtype), b, family="bernoulli", terms=1.0)


@each_family
@each_reduction
def test_one_sample_without_batch(family, mode, dtype):
    for d, v in ((5, 3), (40, 2), (5, 20)):
        x, w, b = operands((), d, v, dtype)
        t, weight = targets(family, v, dtype=dtype), torch.tensor(0.7, dtype=dtype)
        check_nll(x, w, t, b, family=family, reduction=mode)
        check_nll(x, w, t, b, None, weight, family=family, reduction=mode)


def test_mean_squared_error_is_that_of_the_layer(dtype, pool):
    # The composition that linear_mse_loss replaces, by name, with PyTorch's own weighted mean.
    x, w, b = operands((50,), 6, 3, dtype)
    t, weights = targets("squared", 50, 3, dtype=dtype), torch.rand(50).to(dtype)
    got = regfast.linear_mse_loss(x, w, t, b, sample_weight=weights)
    true = F.mse_loss(
        F.linear(*(v.double() for v in (x, w, b))), t.double(), weight=weights.double()[:, None].expand(50, 3)
    )
    assert_close(got.double(), true, rtol=4 * torch.finfo(dtype).eps, atol=0)


# Types


@each_family
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool], ids=str)
def test_integer_and_boolean_targets(family, kind, dtype):
    for v in (3, 20):
        x, w, b = operands((40,), 7, v, dtype)
        t = torch.randint(2 if kind == torch.bool or family == "bernoulli" else 9, (40, v)).to(kind)
        for mode in REDUCTIONS:
            got = ours(x, w, t, b, family=family, reduction=mode)
            assert got.dtype == dtype
            check_nll(x, w, t, b, family=family, reduction=mode, theirs=references if dtype in HALF else torchs)


@each_family
@pytest.mark.parametrize("wide", DTYPES, ids=str)
def test_targets_of_another_type(family, wide, dtype, pool):
    for v, mode in itertools.product((3, 20), REDUCTIONS):
        x, w, b = operands((40,), 7, v, dtype)
        t = targets(family, 40, v, dtype=wide)
        got = ours(x, w, t, b, family=family, reduction=mode)
        assert got.dtype == torch.promote_types(dtype, wide)
        assert all(g.dtype == dtype for g in torch.autograd.grad(got.sum(), [x, w, b]))
        check_nll(
            x,
            w,
            t,
            b,
            family=family,
            reduction=mode,
            theirs=references if dtype in HALF else torchs,
            terms=1.0,
            pool=pool,
        )


@each_family
@pytest.mark.parametrize("loss_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_loss_dtype(family, loss_dtype, dtype):
    for v, mode in itertools.product((3, 20), ("none", "mean")):
        x, w, b = operands((40,), 7, v, dtype)
        t = targets(family, 40, v, dtype=dtype)
        got = ours(x, w, t, b, family=family, reduction=mode, loss_dtype=loss_dtype)
        assert got.dtype == loss_dtype
        exact = torchs(x.double(), w.double(), t.double(), b.double(), family=family, reduction=mode)
        # A float32 loss of half types was never rounded to them.
        eps = max(
            torch.finfo(loss_dtype).eps, torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        )
        assert (got.double() - exact).abs().max() <= 32 * eps * exact.abs().max()
        assert all(g.dtype == dtype for g in torch.autograd.grad(got.sum(), [x, w, b]))


@pytest.mark.parametrize("half", HALF, ids=str)
def test_float32_scales_and_weights_beside_half_inputs(half):
    x, w, b = operands((40,), 7, 3, half)
    for family in FAMILIES:
        t, weights = targets(family, 40, 3, dtype=half), torch.rand(40)
        for scale in scales(family, 3):
            exact = torchs(*(t.double() for t in (x, w, t, b)), scale, weights, family=family)
            got = ours(x, w, t, b, scale, weights, family=family)
            assert_close(got.double(), exact, rtol=torch.finfo(half).eps, atol=1e-6)
            if isinstance(scale, torch.Tensor) and scale.requires_grad:
                (ds,) = torch.autograd.grad(got, scale)
                (true,) = torch.autograd.grad(exact, scale)
                assert ds.dtype == torch.float32
                assert_close(ds, true, rtol=1e-5, atol=1e-5)


# Layouts


@each_family
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(family, layout, dtype, pool):
    for (n, d, v), mode in itertools.product([(36, 5, 3), (36, 40, 2), (36, 10, 21)], ("none", "mean")):
        tensors = [
            *(t.detach() for t in operands((n,), d, v, dtype)),
            targets(family, n, v, dtype=dtype),
            torch.rand(n).to(dtype),
        ]
        for odd in range(5):
            x, w, b, t, weights = (lay_out(t, layout) if i == odd else t for i, t in enumerate(tensors))
            x, w, b = (t.requires_grad_() for t in (x, w, b))
            check_nll(
                x,
                w,
                t,
                b,
                None,
                weights,
                family=family,
                reduction=mode,
                terms=2.0,
                pool=pool,
                what=f"{layout} {odd} {mode}",
                theirs=references if dtype in HALF else torchs,
            )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_more_dimensions_and_of_scales(layout):
    pool = Pool(torch.float32)
    for d, v in ((4, 3), (40, 3), (4, 20)):
        for family in FAMILIES:
            x, w, b = operands((6, 5), d, v)
            x = lay_out(x.detach(), layout).requires_grad_()
            t, weights = lay_out(targets(family, 6, 5, v), layout), lay_out(torch.rand(6, 5), layout)
            for scale in scales(family, v)[-3:]:
                if isinstance(scale, torch.Tensor):
                    scale = lay_out(scale.detach(), layout).requires_grad_(family == "gaussian")
                for mode in REDUCTIONS:
                    check_nll(
                        x,
                        w,
                        t,
                        b,
                        scale,
                        weights,
                        family=family,
                        reduction=mode,
                        terms=100.0,
                        pool=pool,
                        what=f"{layout} {family}",
                    )
    pool.check()


# Features beside those that become columns of tiles (tile_features: 4, 8 and 16 on NEON, AVX2 and AVX-512, none of
# float64), and more than those; outputs of one pass, and one more (kFewOutputs: 8).
@each_family
@pytest.mark.parametrize("layout", ["transposed", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_features_that_lie_apart(dtype, layout, family):
    pool = Pool(dtype)
    for d, v in itertools.product((1, 2, 4, 5, 8, 9, 16, 17, 40), (1, 3, 9)):
        x, w, b = operands((130,), d, v, dtype)
        x = lay_out(x.detach(), layout).requires_grad_()
        for mode in REDUCTIONS:
            check_nll(
                x,
                w,
                targets(family, 130, v),
                b,
                family=family,
                reduction=mode,
                terms=100.0,
                pool=pool,
                what=f"{d} {v} {mode}",
                theirs=references if dtype in HALF else torchs,
            )
    pool.check()


@each_family
def test_grad_outputs_of_any_layout(family):
    # Random, each of them another; stride 0 in all, the first or the last dimension; strided and transposed.
    for d, v in ((4, 3), (40, 3), (4, 20)):
        x, w, b = operands((40,), d, v)
        t = targets(family, 40, v)
        seeds = [torch.randn(40, v), torch.tensor(0.7).expand(40, v), torch.randn(40, 1).expand(40, v)]
        seeds += [torch.randn(v).expand(40, v), torch.randn(v, 40).T, torch.randn(80, 2 * v)[::2, ::2]]
        for seed in seeds:
            check_nll(x, w, t, b, scales(family, v)[-1], torch.rand(40), family=family, reduction="none", grads=[seed])
        for seed in (0.0, 1.0, -3.0, 1e-4):
            for mode in ("mean", "sum"):
                check_nll(x, w, t, b, family=family, reduction=mode, grads=[torch.tensor(seed)])


# Only what is asked for


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=4)), ids=str)
@each_reduction
def test_only_the_gradients_that_are_asked_for(mask, mode):
    for d, v in ((4, 3), (40, 3), (4, 20)):
        sigma = scales("gaussian", v)[-2]
        tensors = *operands((40,), d, v), sigma
        x, w, b, s = leaves = [t.detach().requires_grad_(m) for t, m in zip(tensors, mask, strict=True)]
        t = targets("gaussian", 40, v)
        loss = ours(x, w, t, b, s, family="gaussian", reduction=mode)
        assert loss.requires_grad == any(mask)
        if any(mask):
            loss.backward(torch.full_like(loss, 0.5))
        assert [t.grad is not None for t in leaves] == list(mask)
        check_nll(x, w, t, b, s, family="gaussian", reduction=mode)


@each_family
@pytest.mark.composite("a target, weight or scale that requires grad")
def test_gradients_of_what_is_observed(family):
    # Targets and weights of samples: rare, and composed of plain operators.
    x, w, b = operands((40,), 4, 3, torch.float64)
    t = targets(family, 40, 3, dtype=torch.float64)
    for scale, mode in itertools.product(scales(family, 3, torch.float64), REDUCTIONS):
        weights = torch.rand(40, dtype=torch.float64).requires_grad_()
        check_nll(x, w, t, b, scale, weights, family=family, reduction=mode)
        check_nll(x, w, t.clone().requires_grad_(), b, scale, weights, family=family, reduction=mode)


@pytest.mark.composite("a target, weight or scale that requires grad")
def test_gradient_of_pos_weight():
    # torch's binary_cross_entropy_with_logits refuses it.
    x, w, b = operands((40,), 4, 3)
    t = targets("bernoulli", 40, 3)
    for factors in (torch.tensor(2.0, requires_grad=True), torch.rand(3, requires_grad=True)):
        losses = regfast.linear_nll(x, w, t, b, family="bernoulli", pos_weight=factors, reduction="none")
        ones = F.softplus(-F.linear(x, w, b))
        true = losses.detach() - (factors * t * ones + (1 - t) * F.softplus(F.linear(x, w, b)))
        assert_close(true, torch.zeros_like(true), atol=1e-5, rtol=0)
        (got,) = torch.autograd.grad(losses.sum(), factors)
        assert_close(got, (t * ones).sum_to_size(factors.shape))


# Anything together


@given(
    n=st.integers(0, 70),
    lead=st.lists(st.integers(1, 3), max_size=2),
    d=st.integers(0, 40),
    v=st.integers(1, 20),
    family=st.sampled_from(FAMILIES),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    odd=st.integers(0, 3),
    scale=st.integers(0, 5),
    biased=st.booleans(),
    weighted=st.booleans(),
    full=st.booleans(),
    mode=st.sampled_from(REDUCTIONS),
    mask=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_any_combination(n, lead, d, v, family, dtype, layout, odd, scale, biased, weighted, full, mode, mask):
    torch.manual_seed(n + 13 * v + 7 * d)
    x, w, b = (t.detach() for t in operands((n, *lead), d, v, dtype))
    t = targets(family, n, *lead, v, dtype=dtype)
    x, w, b, t = (lay_out(t, layout) if i == odd and t.numel() else t for i, t in enumerate((x, w, b, t)))
    x, w, b = (t.requires_grad_(m) for t, m in zip((x, w, b), mask, strict=True))
    choices = scales(family, v, dtype)
    options = {"full": full} if family in ("gaussian", "poisson") else {}
    check_nll(
        x,
        w,
        t,
        b if biased else None,
        choices[scale % len(choices)],
        torch.rand(n, *lead).to(dtype) if weighted else None,
        family=family,
        reduction=mode,
        terms=1.0,
        theirs=references if dtype in HALF else torchs,
        **options,
    )
