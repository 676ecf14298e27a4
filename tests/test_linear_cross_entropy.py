"""linear_cross_entropy: values and gradients against float64 for every option, at one chunk and at many."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from util import (
    DTYPES,
    HALF,
    INF,
    LAYOUTS,
    NAN,
    Pool,
    check,
    class_targets,
    evaluate,
    fresh_process,
    lay_out,
    probability_targets,
    spiky,
)

import regfast
from regfast import reference

REDUCTIONS = ("none", "mean", "sum")
NAMES = ("loss", "lse", "entropy", "logprob", "argmax")
FLOATING = NAMES[:-1]
needs_torchs = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no such op")


def budget_for(chunks, n, d, v, dtype):
    """A budget that divides n rows into so many chunks; 1 byte for as many as there can be."""
    for exponent in range(1280):
        budget = int(2 ** (exponent / 32))
        if regfast.linear_cross_entropy_plan(n, d, v, dtype, memory_budget=budget).chunks == chunks:
            return budget
    raise AssertionError(f"no budget makes {chunks} chunks of {n} rows")


def operands(n, d, v, dtype=torch.float32, positions=()):
    """Rows, weights that make logits of a few units with spikes, and a bias; all of them leaves."""
    x = spiky(*((n, d) if n is not None else (d,)), dtype=dtype)
    w = spiky(v, *positions, d, dtype=torch.float64, size=2.0) / max(1, d) ** 0.5
    b = spiky(v, *positions, dtype=dtype, size=1.0)
    return [t.to(dtype).requires_grad_() for t in (x, w, b)]


def logits_of(x, w, b):
    """What F.linear makes of K-dimensional weights, in their dtype."""
    return F.linear(x, w.flatten(0, -2), None if b is None else b.flatten()).unflatten(-1, w.shape[:-1])


def torchs(x, w, t, b=None, c=None, *, z_loss=0.0, softcap=None, logit_scale=None, outputs="loss", **options):
    """F.linear and F.cross_entropy in the inputs' dtype, and plain operators for what they do not have."""
    if (z_loss, softcap, logit_scale, outputs) == (0.0, None, None, "loss") and "loss_dtype" not in options:
        return F.cross_entropy(logits_of(x, w, b), t, c, **options)
    options |= {"z_loss": z_loss, "softcap": softcap, "logit_scale": logit_scale, "outputs": outputs}
    return reference.cross_entropy(logits_of(x, w, b), t, c, **options)


def regfasts(x, w, t, b=None, c=None, **options):
    return regfast.linear_cross_entropy(x, w, t, linear_bias=b, weight=c, **options)


def check_lce(x, w, target, b=None, c=None, *, budget=None, theirs=torchs, what="", **options):
    """Ours at a budget against torch in the same dtype; half types also against float32 that is rounded once."""
    checks = {name: options.pop(name, None) for name in ("grads", "terms", "pool")}
    exact = {name: value for name, value in options.items() if name != "loss_dtype"}
    check(
        lambda *t: regfasts(*t, memory_budget=budget, **options),
        lambda *t: theirs(*t, **options),
        x,
        w,
        target,
        b,
        c,
        exact=lambda *t: torchs(*t, **exact),
        what=what or f"budget {budget} {options}",
        **checks,
    )


@pytest.fixture
def pool(dtype):
    collected = Pool(dtype)
    yield collected
    collected.check()


# N, D, V: one class; one row; tails of vectors; more rows than classes; a vocabulary that is no multiple of anything.
SHAPES = [(1, 1, 1), (5, 3, 1), (1, 17, 33), (9, 7, 2), (37, 30, 129), (130, 5, 10), (40, 64, 2051)]


@pytest.mark.parametrize("mode", REDUCTIONS)
@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
def test_values_and_gradients(mode, probabilities, dtype, pool):
    for n, d, v in SHAPES:
        x, w, b = operands(n, d, v, dtype)
        target = probability_targets(n, v, dtype=dtype).requires_grad_() if probabilities else class_targets((n,), v)
        for budget in (None, 1):
            check_lce(x, w, target, b, budget=budget, pool=pool, what=f"{n} {d} {v} {budget}", reduction=mode)


@pytest.mark.parametrize("mode", REDUCTIONS)
@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
@pytest.mark.parametrize("half", HALF, ids=str)
def test_half_types_are_computed_in_float32_and_rounded_once(half, mode, probabilities):
    # F.linear rounds its logits; this one is as good as float32 operators whose results alone are rounded.
    pool = Pool(half)
    for (n, d, v), budget in itertools.product([(37, 30, 129), (70, 9, 515)], (None, 1)):
        x, w, b = operands(n, d, v, half)
        target = class_targets((n,), v, 0.2)
        if probabilities:
            target = probability_targets(n, v, dtype=half).requires_grad_()
        ours = lambda *t, budget=budget: regfasts(*t, memory_budget=budget, reduction=mode)  # noqa: E731
        out, grads, seeds = evaluate(ours, [x, w, target, b], None)
        true_out, true_grads, _ = evaluate(
            lambda *t: torchs(*t, reduction=mode), [x, w, target, b], seeds, dtype=torch.float64
        )
        for got, true in zip((*out, *grads), (*true_out, *true_grads), strict=True):
            error = (got.double() - true).abs().max() / true.abs().max() / torch.finfo(half).eps
            assert error <= 0.51, f"{tuple(got.shape)} at {budget}: {error:.3g} epsilons"
        check_lce(x, w, target, b, budget=budget, theirs=reference_of, pool=pool, reduction=mode)
    pool.check()


def reference_of(x, w, t, b=None, c=None, **options):
    return reference.linear_cross_entropy(x, w, t, linear_bias=b, weight=c, **options)


OPTIONS = [
    dict(zip(("weighted", "smoothing", "ignored", "mode"), values, strict=True))
    for values in itertools.product([False, True], [0.0, 0.1, 1.0], [0.0, 0.4], REDUCTIONS)
]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_options_together(option, dtype):
    v = 33
    c = torch.rand(v).to(dtype) if option["weighted"] else None
    options = {"label_smoothing": option["smoothing"], "reduction": option["mode"]}
    for positions, budget in itertools.product([(), (3,)], [None, 1]):
        x, w, b = operands(40, 12, v, dtype, positions)
        target = class_targets((40, *positions), v, option["ignored"], 4)
        check_lce(x, w, target, b, c, budget=budget, ignore_index=4, **options)
        check_lce(x, w, class_targets((40, *positions), v, option["ignored"]), None, c, budget=budget, **options)
        if not option["ignored"]:
            target = probability_targets(40, v, *positions, dtype=dtype).requires_grad_()
            check_lce(x, w, target, b, c, budget=budget, **options)


@pytest.mark.parametrize("positions", [(1,), (7,), (2, 3), (3, 2, 2)], ids=str)
@pytest.mark.parametrize("mode", REDUCTIONS)
def test_more_dimensions(positions, mode, dtype):
    for v, budget in itertools.product((1, 19), (None, 1)):
        x, w, b = operands(35, 8, v, dtype, positions)
        check_lce(x, w, class_targets((35, *positions), v, 0.3), b, budget=budget, reduction=mode)
        target = probability_targets(35, v, *positions, dtype=dtype).requires_grad_()
        check_lce(x, w, target, b, budget=budget, reduction=mode)


@pytest.mark.parametrize("half", HALF, ids=str)
def test_half_input_with_float32_probabilities(half):
    # The loss is float32, and so is the gradient of the probabilities; those of input and weights are of the half type.
    x, w, b = operands(40, 12, 33, half)
    target = probability_targets(40, 33).requires_grad_()
    for mode, budget in itertools.product(REDUCTIONS, (None, 1)):
        assert regfasts(x, w, target, reduction=mode).dtype == torch.float32
        check_lce(x, w, target, b, budget=budget, reduction=mode, label_smoothing=0.1)
        check_lce(x, w, target.detach(), b, budget=budget, theirs=reference_of, reduction=mode)


def test_probabilities_of_half_type_with_wide_kernels():
    # Probabilities of bfloat16 are widened beside the logits, with and without a gradient of their own.
    for grad, budget, positions in itertools.product((False, True), (None, 1), ((), (3,))):
        x, w, b = operands(40, 12, 33, torch.bfloat16, positions)
        target = probability_targets(40, 33, *positions, dtype=torch.bfloat16).requires_grad_(grad)
        check_lce(x, w, target, b, budget=budget, reduction="none", z_loss=0.1)


# What torch does not have


@pytest.mark.parametrize("mode", REDUCTIONS)
@pytest.mark.parametrize(
    "option",
    [{"z_loss": 0.1}, {"softcap": 4.0}, {"logit_scale": 0.3}, {"logit_scale": -1.5, "softcap": 3.0, "z_loss": 0.3}],
    ids=str,
)
def test_further_options(option, mode, dtype):
    for positions, budget in itertools.product([(), (3,)], [None, 1]):
        x, w, b = operands(40, 12, 33, dtype, positions)
        c = torch.rand(33).to(dtype)
        target = class_targets((40, *positions), 33, 0.3)
        check_lce(x, w, target, b, c, budget=budget, reduction=mode, label_smoothing=0.1, **option)
        target = probability_targets(40, 33, *positions, dtype=dtype).requires_grad_()
        check_lce(x, w, target, b, budget=budget, reduction=mode, **option)


@pytest.mark.parametrize("names", [*NAMES, ("loss", "argmax"), FLOATING, NAMES[::-1], ("lse", "loss")], ids=str)
@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
def test_outputs(names, probabilities, dtype):
    extra = {"softcap": 6.0, "logit_scale": 0.8, "z_loss": 0.1, "label_smoothing": 0.1}
    for positions, mode, budget, options in itertools.product([(), (3,)], ("none", "mean"), (None, 1), ({}, extra)):
        x, w, b = operands(37, 6, 19, dtype, positions)
        if probabilities:
            target = probability_targets(37, 19, *positions, dtype=dtype).requires_grad_()
        else:
            target = class_targets((37, *positions), 19, 0.3)
        check_lce(x, w, target, b, budget=budget, outputs=names, reduction=mode, **options)
    got = regfasts(x, w, target, b, outputs=names)
    if isinstance(names, tuple):
        assert type(got).__name__ == "CrossEntropyOutput" and got._fields == names
        pairs = zip(names, got, strict=True)
    else:
        pairs = [(names, got)]
    for name, value in pairs:
        assert value.shape == (() if name == "loss" else (37, 3))
        assert value.dtype == (torch.int64 if name == "argmax" else dtype)
        assert value.requires_grad == (name != "argmax")


@pytest.mark.parametrize("used", [c for r in (1, 2, 3) for c in itertools.combinations(FLOATING, r)], ids="+".join)
def test_gradient_of_some_outputs_only(used):
    # An unused output brings no grad_output: its part of the backward must vanish, whichever it is.
    x, w, b = operands(40, 7, 21)
    target = class_targets((40,), 21, 0.3)
    for mode, budget in itertools.product(("none", "sum"), (None, 1)):

        def total(fn, mode=mode, **options):
            got = fn(x, w, target, linear_bias=b, outputs=FLOATING, reduction=mode, **options)
            got = dict(zip(FLOATING, got, strict=True))
            return sum((got[name] * (1 + i)).square().sum() for i, name in enumerate(used))

        ours = torch.autograd.grad(total(regfast.linear_cross_entropy, memory_budget=budget), [x, w, b])
        assert_close(ours, torch.autograd.grad(total(reference.linear_cross_entropy), [x, w, b]), rtol=1e-4, atol=1e-4)


def test_grad_outputs_of_any_layout():
    # Random, each row another; the first row's for all of them by stride 0; every second or fifth of a larger tensor.
    x, w, b = operands(40, 7, 21)
    target = class_targets((40,), 21, 0.3)
    for names in ("loss", "entropy", FLOATING):
        count = 1 if isinstance(names, str) else 4
        for seed in (torch.randn(40), torch.tensor(0.7).expand(40), torch.randn(80)[::2], torch.randn(40, 5)[:, 3]):
            for budget in (None, 1):
                check_lce(x, w, target, b, budget=budget, outputs=names, reduction="none", grads=[seed] * count)
    x, w, b = operands(40, 7, 21, positions=(3,))
    for seed in (torch.randn(3, 40).T, torch.randn(40, 1).expand(40, 3), torch.tensor(2.0).expand(40, 3)):
        check_lce(x, w, class_targets((40, 3), 21, 0.3), b, budget=1, outputs="loss", reduction="none", grads=[seed])


@pytest.mark.parametrize("loss_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_loss_dtype(loss_dtype, dtype):
    x, w, b = operands(40, 7, 21, dtype)
    target = class_targets((40,), 21, 0.3)
    for mode in ("none", "mean"):
        got = regfasts(x, w, target, b, outputs=NAMES, loss_dtype=loss_dtype, reduction=mode)
        assert [value.dtype for value in got] == [loss_dtype] * 4 + [torch.int64]
        check_lce(x, w, target, b, outputs=FLOATING, loss_dtype=loss_dtype, reduction=mode)
        check_lce(x, w, target, b, outputs="loss", loss_dtype=loss_dtype, reduction=mode)
    assert all(g.dtype == dtype for g in torch.autograd.grad(got.loss, [x, w, b]))
    # A float32 loss of half types was never rounded to them.
    got = regfasts(x, w, target, b, loss_dtype=torch.float32, reduction="none")
    exact = torchs(x.double(), w.double(), target, b.double(), reduction="none")
    assert (got.double() - exact).abs().max() <= 1e-6 * exact.abs().max()


# Chunks


@pytest.mark.parametrize("mode", REDUCTIONS)
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_any_number_of_chunks_gives_the_same(mode, ignored, dtype):
    n, d, v = 150, 24, 300
    x, w, b = operands(n, d, v, dtype)
    c = torch.rand(v).to(dtype)
    eps = torch.finfo(dtype).eps
    accumulated = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for target in (class_targets((n,), v, ignored), probability_targets(n, v, dtype=dtype).requires_grad_()):
        results, seeds = [], None
        for chunks in (1, 2, 5, 10):
            budget = budget_for(chunks, n, d, v, dtype)
            options = {"memory_budget": budget, "reduction": mode, "label_smoothing": 0.1}
            fn = lambda *t, options=options: regfasts(*t, **options)  # noqa: E731
            out, grads, seeds = evaluate(fn, [x, w, target, b, c], seeds)
            results.append([*out, *grads])
        for others in results[1:]:
            for a, one in zip(others, results[0], strict=True):
                # One rounding of the result apart at most, and what sums in another order differ by.
                size = one.detach().double().abs().max().item()
                distance = (a.double() - one.double()).abs().max().item()
                rounding = eps if dtype in HALF else 0
                assert distance <= (rounding + 64 * accumulated) * size


def sum_of_chunks_error(n, chunks, budget, target, x, w):
    """Errors of dW against float64: ours at so many chunks, and those of torch's chunked op at as many."""
    exact = torch.autograd.grad(torchs(*(t.double() for t in (x, w)), target), w)[0]
    ours = torch.autograd.grad(regfasts(x, w, target, memory_budget=budget), w)[0]
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=n // chunks)
    leaf = w.detach().clone().requires_grad_()
    F.linear_cross_entropy(x.detach(), leaf, target, options=options).backward()
    return [(g.double() - exact).norm() / exact.norm() for g in (ours, leaf.grad)]


@needs_torchs
@pytest.mark.parametrize("chunks", [8, 16])
def test_chunks_of_bfloat16_are_not_summed_in_bfloat16(chunks):
    # dW of all chunks is rounded once. Summed chunk by chunk in bfloat16, its error grows with their number.
    n, d, v = 512, 48, 700
    x, w, _ = operands(n, d, v, torch.bfloat16)
    target = class_targets((n,), v)
    budget = budget_for(chunks, n, d, v, torch.bfloat16)
    ours, theirs = sum_of_chunks_error(n, chunks, budget, target, x, w)
    assert ours < theirs
    # Half an ulp at most, a third of half an ulp on average: what one rounding leaves.
    assert ours < 0.25 * torch.finfo(torch.bfloat16).eps


def test_a_whole_chunk_is_ignored():
    # The rows that take part are gathered: none of chunk 2's, a part of chunk 3's.
    x, w, b = operands(64, 7, 21)
    target = class_targets((64,), 21)
    target[16:40] = -100
    for mode, budget in itertools.product(REDUCTIONS, (None, 1)):
        check_lce(x, w, target, b, budget=budget, reduction=mode)


# Ignored rows


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"outputs": ("loss", "logprob")}], ids=str
)
def test_ignored_rows_reach_nothing(bad, options, dtype):
    # NaN of an ignored row times a zero gradient was NaN in dW. dX of such rows is 0 without a sign of what was there.
    x, w, b = operands(60, 9, 30, dtype)
    target = class_targets((60,), 30, 0.4)
    ignored = target == -100
    assert ignored.any()
    wrong = torch.where(ignored[:, None], torch.tensor(bad, dtype=dtype), x.detach()).requires_grad_()
    for mode, budget in itertools.product(REDUCTIONS, (None, 1)):
        results = []
        for rows in (x, wrong):
            out = regfasts(rows, w, target, b, memory_budget=budget, reduction=mode, **options)
            out = list(out) if isinstance(out, tuple) else [out]
            seeds = [torch.linspace(3, 9, o.numel()).view(o.shape).to(o) / (1 + 9 * i) for i, o in enumerate(out)]
            results.append([*out, *torch.autograd.grad(out, [rows, w, b], seeds)])
        for good, also in zip(*results, strict=True):
            assert torch.equal(good, also)
        dx = results[1][-3]
        assert not dx[ignored].any() and dx[~ignored].any(1).all()


def test_ignored_rows_keep_the_outputs_that_do_not_need_a_target():
    x, w, b = operands(40, 7, 21)
    target = class_targets((40,), 21, 0.5)
    for budget in (None, 1):
        got = regfasts(x, w, target, b, outputs=NAMES, reduction="none", memory_budget=budget)
        logits = logits_of(x, w, b)
        assert_close(got.lse, torch.logsumexp(logits, 1))
        assert torch.equal(got.argmax, logits.argmax(1)) and (got.entropy > 0).all()
        assert not got.loss[target == -100].any() and not got.logprob[target == -100].any()
        # argmax beside a reduced loss comes from the pass that writes the gradients.
        assert torch.equal(regfasts(x, w, target, b, outputs=("loss", "argmax")).argmax, got.argmax)


@pytest.mark.parametrize("positions", [(), (3,)], ids=str)
def test_all_ignored(positions, dtype):
    x, w, b = operands(40, 7, 21, dtype, positions)
    target = torch.full((40, *positions), 5)
    for smoothing, budget in itertools.product((0.0, 0.1), (None, 1)):
        options = {"ignore_index": 5, "label_smoothing": smoothing, "memory_budget": budget}
        assert regfasts(x, w, target, b, **options).isnan()
        for mode in ("none", "sum"):
            loss = regfasts(x, w, target, b, reduction=mode, **options)
            assert not loss.any()
            assert not any(g.any() for g in torch.autograd.grad(loss.sum() * 3, [x, w, b]))


def test_some_positions_of_a_row_are_ignored():
    x, w, b = operands(40, 7, 21, positions=(3,))
    target = class_targets((40, 3), 21, 0.6)
    target[:5] = -100  # these rows take no part
    for mode, budget in itertools.product(REDUCTIONS, (None, 1)):
        check_lce(x, w, target, b, torch.rand(21), budget=budget, reduction=mode, label_smoothing=0.1)


# Only what is asked for


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_the_gradients_that_are_asked_for(mask):
    for names, mode, budget in itertools.product(("loss", FLOATING), ("mean", "none"), (None, 1)):
        x, w, b = operands(40, 7, 21)
        target = probability_targets(40, 21)
        leaves = [t.detach().requires_grad_(wanted) for t, wanted in zip((x, w, b, target), mask, strict=True)]
        x, w, b, target = leaves
        out = regfasts(x, w, target, b, memory_budget=budget, outputs=names, reduction=mode)
        out = [out] if isinstance(out, torch.Tensor) else list(out)
        assert all(o.requires_grad == any(mask) or i == 9 for i, o in enumerate(out))
        if any(mask):
            torch.autograd.backward(out, [torch.full_like(o, 0.5) for o in out])
        assert [t.grad is not None for t in leaves] == list(mask)
        if any(mask):
            check_lce(x, w, target, b, budget=budget, outputs=names, reduction=mode)


def test_losses_without_gradients():
    # The pass without gradients and the one with them give the same number.
    x, w, b = operands(40, 7, 21)
    target = class_targets((40,), 21, 0.3)
    for mode, budget in itertools.product(REDUCTIONS, (None, 1)):
        options = {"reduction": mode, "memory_budget": budget, "label_smoothing": 0.1}
        true = regfasts(x, w, target, b, **options)
        frozen = regfasts(*(t.detach() for t in (x, w)), target, b.detach(), **options)
        with torch.no_grad():
            without = regfasts(x, w, target, b, **options)
        with torch.inference_mode():
            inference = regfasts(x, w, target, b, **options)
        for value in (frozen, without, inference):
            assert not value.requires_grad
            assert_close(value, true.detach(), rtol=1e-6, atol=1e-7)
            assert_close(value, torchs(x, w, target, b, reduction=mode, label_smoothing=0.1).detach())


# Same bits


@pytest.mark.parametrize("mode", REDUCTIONS)
def test_same_bits_on_every_run_and_with_any_number_of_threads(mode, dtype, threads):
    n, d, v = 130, 40, 777
    x, w, b = operands(n, d, v, dtype)
    for target in (class_targets((n,), v, 0.3), probability_targets(n, v, dtype=dtype).requires_grad_()):
        for budget in (None, budget_for(3, n, d, v, dtype)):
            options = {"memory_budget": budget, "reduction": mode, "label_smoothing": 0.1}
            fn = lambda *t, options=options: regfasts(*t, **options)  # noqa: E731
            results, seeds = [], None
            for count in (2, 2, 1):
                torch.set_num_threads(count)
                out, grads, seeds = evaluate(fn, [x, w, target, b], seeds)
                results.append([*out, *grads])
            for again in results[1:]:
                for i, (p, q) in enumerate(zip(results[0], again, strict=True)):
                    assert torch.equal(p, q), f"tensor {i} at {budget}: {(p.double() - q.double()).abs().max():.3g}"


# Layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    n, d, v = 36, 10, 41
    for ignored, mode, budget in itertools.product((0.0, 0.3), ("none", "mean"), (None, 1)):
        x, w, b = (t.detach() for t in operands(n, d, v, dtype))
        target = class_targets((n,), v, ignored)
        for laid in ((True, False, False), (False, True, False), (False, False, True)):
            leaves = [
                (lay_out(t, layout) if odd else t).requires_grad_() for t, odd in zip((x, w, b), laid, strict=True)
            ]
            # Where all classes have one row of weights, dX is nothing but rounding errors.
            check_lce(*leaves[:2], target, leaves[2], budget=budget, reduction=mode, terms=1.0, what=f"{layout} {laid}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_with_more_dimensions(layout):
    x, w, b = (lay_out(t.detach(), layout).requires_grad_() for t in operands(36, 10, 9, positions=(2, 3)))
    for mode, budget in itertools.product(REDUCTIONS, (None, 1)):
        check_lce(x, w, class_targets((36, 2, 3), 9, 0.3), b, budget=budget, reduction=mode)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_targets_and_class_weights(layout):
    x, w, b = operands(36, 10, 41)
    c = lay_out(torch.rand(41), layout)
    for budget in (None, 1):
        target = lay_out(probability_targets(36, 41), layout).requires_grad_()
        check_lce(x, w, target, b, c, budget=budget)
        # NaN, which fills the gaps, has no integer: the gaps of class targets are out of range.
        spaced = torch.stack([class_targets((36,), 41, 0.3), torch.full((36,), 10**9)], 1)[:, 0]
        check_lce(x, w, spaced, b, c, budget=budget)
        check_lce(x, w, torch.tensor([7]).expand(36), b, c, budget=budget)
    x, w, b = operands(36, 10, 41, positions=(3,))
    check_lce(x, w, class_targets((3, 36), 41, 0.3).T, b, c, budget=1)
    target = lay_out(probability_targets(36, 41, 3), layout).requires_grad_()
    check_lce(x, w, target, b, c, budget=1, reduction="none")
    check_lce(x, w, probability_targets(36, 3, 41).transpose(1, 2).requires_grad_(), b, budget=1)


def test_layouts_of_probabilities_with_two_positions():
    # In a process of its own: strides that do not merge once were a null pointer's.
    assert float(fresh_process(TWO_POSITIONS, PYTHONPATH="tests")) < 1e-12


TWO_POSITIONS = """
    import itertools, torch, regfast
    from util import LAYOUTS, lay_out, probability_targets
    worst = 0
    for layout, grad, mode, budget in itertools.product(LAYOUTS, (False, True), ("none", "mean"), (None, 1)):
        target = lay_out(probability_targets(20, 5, 2, 3, dtype=torch.float64), layout).requires_grad_(grad)
        x = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
        w = torch.randn(5, 2, 3, 4, dtype=torch.float64, requires_grad=True)
        leaves = [t for t in (x, w, target) if t.requires_grad]
        results = []
        for fn in (regfast.linear_cross_entropy, regfast.reference.linear_cross_entropy):
            loss = fn(x, w, target, reduction=mode, memory_budget=budget)
            results.append([loss, *torch.autograd.grad(loss.square().sum(), leaves)])
        worst = max(worst, *((p - q).abs().max().item() for p, q in zip(*results)))
    print(worst)
"""


def test_one_tensor_in_several_places():
    # An autoencoder whose rows are its classes: the gradient is the sum of both places'.
    x = spiky(30, 8, dtype=torch.float64).requires_grad_()
    target = class_targets((30,), 30)
    for mode, budget in itertools.product(("mean", "none"), (None, 1)):
        seed = torch.randn(30 if mode == "none" else (), dtype=torch.float64)
        ours, true = (
            torch.autograd.grad(fn(x, x, target, reduction=mode, **o), x, seed)[0]
            for fn, o in ((regfasts, {"memory_budget": budget}), (torchs, {}))
        )
        assert_close(ours, true)


def test_uint8_targets():
    x, w, b = operands(40, 7, 200)
    target = torch.randint(200, (40,), dtype=torch.uint8)
    check_lce(x, w, target, b)
    check_lce(x, w, target, b, budget=1, label_smoothing=0.1, ignore_index=int(target[0]))
    # -100 is no byte: class 156 is not ignored.
    assert regfasts(x, w, torch.full((40,), 156, dtype=torch.uint8)).item() > 0


@pytest.mark.parametrize("mode", REDUCTIONS)
def test_one_sample_without_batch(mode, dtype):
    x, w, b = operands(None, 13, 37, dtype)
    check_lce(x, w, torch.tensor(5), b, reduction=mode)
    check_lce(x, w, torch.tensor(5), b, outputs=NAMES, reduction=mode, z_loss=0.1)
    check_lce(x, w, probability_targets(37, dtype=dtype).requires_grad_(), b, reduction=mode)
    assert regfasts(x, w, torch.tensor(-100), b, reduction="sum") == 0
    assert regfasts(x, w, torch.tensor(-100), b).isnan()


# Entries that the gradient may skip


@pytest.mark.parametrize("mode", ["none", "mean", "sum"])
@pytest.mark.parametrize("eps", [0.0, 1e-4, 1e-2])
def test_filtered_gradients_are_within_their_bound(eps, mode):
    # Peaked rows: one class has most of the probability, a few share the rest, and thousands are below either eps.
    n, d, v = 50, 16, 3000
    w, b = spiky(v, d), torch.randn(v) * 0.1
    target = class_targets((n,), v, 0.2)
    x = w[target.clamp(min=0)] * torch.linspace(0.02, 0.6, n)[:, None] + 0.1 * torch.randn(n, d)
    probability = F.linear(x, w, b).softmax(1)
    assert (probability <= 1e-4).float().mean() > 0.5 and probability.max() > 0.9
    up = torch.randn(n) if mode == "none" else torch.tensor(-1.7)
    rows = (target != -100).sum() if mode == "mean" else 1
    g = (up.abs().double() / rows).expand(n) * (target != -100)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    exact_loss = torchs(doubles[0], doubles[1], target, doubles[2], reduction=mode)
    exact = torch.autograd.grad(exact_loss, doubles, up.double())
    bounds = [
        eps * g[:, None] * doubles[1].abs().sum(0),
        (eps * (g[:, None] * doubles[0].abs()).sum(0)).expand(v, d),
        (eps * g.sum()).expand(v),
    ]
    for budget in (None, 1):
        loss = regfasts(x, w, target, b, reduction=mode, filter_eps=eps, memory_budget=budget)
        assert_close(loss.detach().double(), exact_loss.detach(), rtol=1e-5, atol=1e-5)  # the loss is never filtered
        grads = torch.autograd.grad(loss, leaves, up)
        plain = torch.autograd.grad(regfasts(x, w, target, b, reduction=mode, memory_budget=budget), leaves, up)
        for ours, unfiltered, true, bound in zip(grads, plain, exact, bounds, strict=True):
            if eps == 0:
                assert torch.equal(ours, unfiltered)
            rounding = 1e-4 * true.abs().max()  # large logits, so exp() of their rounding errors
            assert ((ours.double() - true).abs() <= bound.detach() + rounding).all()


def test_filtered_gradients_of_some_and_of_others():
    # What is frozen stays so, and what is not is the same whether or not something else is frozen.
    x, w, b = operands(50, 8, 300)
    target = class_targets((50,), 300, 0.2)
    every = torch.autograd.grad(regfasts(x, w, target, b, filter_eps=1e-2), [x, w, b])
    for i in range(3):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate((x, w, b))]
        (alone,) = torch.autograd.grad(regfasts(leaves[0], leaves[1], target, leaves[2], filter_eps=1e-2), leaves[i])
        assert_close(alone, every[i])


# Anything together


@given(
    n=st.integers(0, 50),
    d=st.integers(1, 20),
    v=st.integers(1, 70),
    positions=st.lists(st.integers(1, 3), max_size=2),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    target_kind=st.sampled_from(["classes", "probabilities", "float32 probabilities"]),
    biased=st.booleans(),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    mode=st.sampled_from(REDUCTIONS),
    z_loss=st.sampled_from([0.0, 0.01, 1.0]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    scale=st.sampled_from([None, 0.5, 2.0]),
    names=st.permutations(FLOATING).flatmap(lambda p: st.integers(1, 4).map(lambda k: tuple(p[:k]))),
    budget=st.sampled_from([None, 1, 20_000]),
)
def test_any_combination(
    n,
    d,
    v,
    positions,
    layout,
    dtype,
    target_kind,
    biased,
    weighted,
    smoothing,
    ignored,
    mode,
    z_loss,
    softcap,
    scale,
    names,
    budget,
):
    torch.manual_seed(n + 13 * v + 7 * d)
    x, w, b = operands(n, d, v, dtype, positions)
    x = lay_out(x.detach(), layout).requires_grad_()
    if target_kind == "classes":
        target = class_targets((n, *positions), v, ignored)
    else:
        wide = torch.float32 if "float32" in target_kind and dtype in HALF else dtype
        target = probability_targets(n, v, *positions, dtype=wide)
        # Two positions whose strides do not merge: test_layouts_of_probabilities_with_two_positions.
        target = lay_out(target, layout if len(positions) < 2 else "contiguous").requires_grad_()
    check_lce(
        x,
        w,
        target,
        b if biased else None,
        torch.rand(v).to(dtype) if weighted else None,
        budget=budget,
        label_smoothing=smoothing,
        reduction=mode,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=scale,
        outputs=names if len(names) > 1 else names[0],
    )
