"""linear_cross_entropy: values and gradients against float64 for all that torch has, at one chunk and at many."""

import itertools

import pytest
import torch
from hypothesis import given
from linear_cross_entropy_cases import (
    BUDGETS,
    FLOATING,
    NAMES,
    REDUCTIONS,
    check_at_budgets,
    check_lce,
    combination,
    combined,
    each_reduction,
    each_target,
    modes_and_budgets,
    operands,
    references,
    regfasts,
    targets,
    torchs,
)
from torch.testing import assert_close
from util import (
    HALF,
    INF,
    LAYOUTS,
    MULTIPLIES_PAIRS,
    Pool,
    class_targets,
    evaluate,
    lay_out,
    probability_targets,
    spiky,
    virtual,
)

pytestmark = pytest.mark.kernels("linear_cross_entropy")


# N, D, V: one class; one row; tails of vectors; more rows than classes; a vocabulary that is no multiple of anything.
SHAPES = [(1, 1, 1), (5, 3, 1), (1, 17, 33), (9, 7, 2), (37, 30, 129), (130, 5, 10), (40, 64, 2051)]


@each_reduction
@each_target
def test_values_and_gradients(mode, probabilities, dtype, pool):
    for n, d, v in SHAPES:
        x, w, b = operands(n, d, v, dtype)
        target = targets(probabilities, n, v, dtype=dtype, ignored=0)
        # The bias's gradient is a sum of softmax - y over rows, which cancels.
        terms = 1 / n if mode == "mean" else 1
        check_at_budgets(x, w, target, b, pool=pool, what=f"{n} {d} {v}", reduction=mode, terms=terms)


@each_reduction
@each_target
@pytest.mark.parametrize("half", HALF, ids=str)
def test_half_types_are_computed_in_float32_and_rounded_once(half, mode, probabilities):
    # F.linear rounds its logits; this one is as good as float32 operators whose results alone are rounded. Where pairs
    # of bfloat16 are multiplied, the logits' gradient is rounded too, which the gradients show.
    pairs = half is torch.bfloat16 and MULTIPLIES_PAIRS
    theirs = torchs if pairs else references
    pool = Pool(half)
    for (n, d, v), budget in itertools.product([(37, 30, 129), (70, 9, 515)], BUDGETS):
        x, w, b = operands(n, d, v, half)
        target = targets(probabilities, n, v, dtype=half)
        ours = lambda *t, budget=budget: regfasts(*t, memory_budget=budget, reduction=mode)  # noqa: E731
        out, grads, seeds = evaluate(ours, [x, w, target, b], None)
        true_out, true_grads, _ = evaluate(
            lambda *t: torchs(*t, reduction=mode), [x, w, target, b], seeds, dtype=torch.float64
        )
        for i, (got, true) in enumerate(zip((*out, *grads), (*true_out, *true_grads), strict=True)):
            error = (got.double() - true).abs().max() / true.abs().max() / torch.finfo(half).eps
            allowed = 1.0 if pairs and i >= len(out) else 0.51
            assert error <= allowed, f"{tuple(got.shape)} at {budget}: {error:.3g} epsilons"
        check_lce(x, w, target, b, budget=budget, theirs=theirs, pool=pool, reduction=mode)
    pool.check()


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
@each_reduction
def test_options_together(weighted, smoothing, ignored, mode, dtype):
    v = 33
    c = torch.rand(v).to(dtype) if weighted else None
    options = {"label_smoothing": smoothing, "reduction": mode}
    for positions, budget in [((), None), ((), 1), ((3,), 1)]:
        x, w, b = operands(40, 12, v, dtype, positions)
        target = class_targets((40, *positions), v, ignored, 4)
        check_lce(x, w, target, b, c, budget=budget, ignore_index=4, **options)
        if ignored:
            check_lce(x, w, targets(False, 40, v, positions), None, c, budget=budget, **options)
        else:
            check_lce(x, w, targets(True, 40, v, positions, dtype=dtype), b, c, budget=budget, **options)


@pytest.mark.parametrize("positions", [(1,), (7,), (2, 3), (3, 2, 2)], ids=str)
@each_reduction
def test_more_dimensions(positions, mode, dtype):
    for v, probabilities in itertools.product((1, 19), (False, True)):
        x, w, b = operands(35, 8, v, dtype, positions)
        check_at_budgets(x, w, targets(probabilities, 35, v, positions, dtype=dtype), b, reduction=mode)


@pytest.mark.parametrize("half", HALF, ids=str)
def test_half_input_with_float32_probabilities(half):
    # The loss is float32, and so is the gradient of the probabilities; those of input and weights are of the half type.
    x, w, b = operands(40, 12, 33, half)
    target = targets(True, 40, 33)
    for mode in REDUCTIONS:
        assert regfasts(x, w, target, reduction=mode).dtype == torch.float32
        check_at_budgets(x, w, target, b, reduction=mode, label_smoothing=0.1)
        check_at_budgets(x, w, target.detach(), b, theirs=references, reduction=mode)


@each_reduction
def test_one_sample_without_batch(mode, dtype):
    x, w, b = operands(None, 13, 37, dtype)
    check_lce(x, w, torch.tensor(5), b, reduction=mode)
    check_lce(x, w, torch.tensor(5), b, outputs=NAMES, reduction=mode, z_loss=0.1)
    check_lce(x, w, probability_targets(37, dtype=dtype).requires_grad_(), b, reduction=mode)
    assert regfasts(x, w, torch.tensor(-100), b, reduction="sum") == 0
    assert regfasts(x, w, torch.tensor(-100), b).isnan()


def test_uint8_targets():
    x, w, b = operands(40, 7, 200)
    target = torch.randint(200, (40,), dtype=torch.uint8)
    check_lce(x, w, target, b)
    check_lce(x, w, target, b, budget=1, label_smoothing=0.1, ignore_index=int(target[0]))
    # -100 is no byte: class 156 is not ignored.
    assert regfasts(x, w, torch.full((40,), 156, dtype=torch.uint8)).item() > 0


def test_one_tensor_in_several_places():
    # An autoencoder whose rows are its classes: the gradient is the sum of both places'.
    x = spiky(30, 8, dtype=torch.float64).requires_grad_()
    target = class_targets((30,), 30)
    for mode, budget in modes_and_budgets("mean", "none"):
        seed = torch.randn(30 if mode == "none" else (), dtype=torch.float64)
        ours, true = (
            torch.autograd.grad(fn(x, x, target, reduction=mode, **o), x, seed)[0]
            for fn, o in ((regfasts, {"memory_budget": budget}), (torchs, {}))
        )
        assert_close(ours, true)


# Numbers at the edge


@each_target
def test_masked_classes(probabilities, dtype):
    # A bias of -inf takes a class out: probability 0, no gradient, and no NaN. That of a target makes an infinite loss.
    x, w, b = operands(40, 7, 21, dtype)
    with torch.no_grad():
        b[[3, 20]] = -INF
    target = targets(probabilities, 40, 21, dtype=dtype)
    if not probabilities:
        target[(target == 3) | (target == 20)] = 5
        check_at_budgets(x, w, target, b, outputs=FLOATING, reduction="none")
        target[0] = 3
    for mode in REDUCTIONS:
        check_at_budgets(x, w, target, b, reduction=mode)


def test_huge_logits():
    for size in (1e4, 1e30, 3e38):
        w = torch.tensor([[size, -size, size], [-size, -size, size], [0.0, -size, size]])
        for target in (torch.tensor([0, 1, 2]), torch.tensor([1, 1, 1])):
            ours, theirs = (f(torch.eye(3), w, target, reduction="none") for f in (regfasts, torchs))
            assert_close(ours, theirs)


def test_float16_mean_of_large_losses():
    # The sum is beyond 65504 while the mean is not, and so is the mean's gradient.
    x = torch.ones(4096, 1, dtype=torch.float16, requires_grad=True)
    w = torch.tensor([[0.0], [60.0]], dtype=torch.float16, requires_grad=True)
    for budget in BUDGETS:
        loss = regfasts(x, w, torch.zeros(4096, dtype=torch.int64), memory_budget=budget)
        assert loss == 60
        dx, dw = torch.autograd.grad(loss, [x, w], torch.tensor(4096.0, dtype=torch.float16))
        assert (dx == 60).all() and dw.flatten().tolist() == [-4096, 4096]


def test_offsets_beyond_2_31_elements():
    # Rows, then features, that lie far apart.
    far = 2**30 + 8
    for shape, strides in (((3, 20), (far, 1)), ((20, 3), (1, far))):
        x = virtual(2 * far + 24, torch.bfloat16).as_strided(shape, strides)
        _, w, b = operands(*shape, 30, torch.bfloat16)
        x.copy_(spiky(*shape)).requires_grad_()
        target = class_targets(shape[:1], 30)
        check_at_budgets(x, w, target, b)
        target[1] = -100  # so that the others are gathered
        check_at_budgets(x, w, target, b, reduction="none")


# Layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    n, d, v = 36, 10, 41
    for ignored, mode in itertools.product((0.0, 0.3), ("none", "mean")):
        tensors = [t.detach() for t in operands(n, d, v, dtype)]
        target = class_targets((n,), v, ignored)
        for odd in range(3):
            x, w, b = ((lay_out(t, layout) if i == odd else t).requires_grad_() for i, t in enumerate(tensors))
            # Where all classes have one row of weights, dX is nothing but rounding errors.
            check_at_budgets(x, w, target, b, reduction=mode, terms=1.0, what=f"{layout} {odd} {mode} {ignored}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_with_more_dimensions(layout):
    x, w, b = (lay_out(t.detach(), layout).requires_grad_() for t in operands(36, 10, 9, positions=(2, 3)))
    for mode in REDUCTIONS:
        check_at_budgets(x, w, targets(False, 36, 9, (2, 3)), b, reduction=mode)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_targets_and_class_weights(layout, dtype):
    x, w, b = operands(36, 10, 41, dtype)
    c = lay_out(torch.rand(41).to(dtype), layout)
    check_at_budgets(x, w, lay_out(probability_targets(36, 41, dtype=dtype), layout).requires_grad_(), b, c)
    # NaN, which fills the gaps, has no integer: the gaps of class targets are out of range.
    spaced = torch.stack([targets(False, 36, 41), torch.full((36,), 10**9)], 1)[:, 0]
    check_at_budgets(x, w, spaced, b, c)
    check_at_budgets(x, w, torch.tensor([7]).expand(36), b, c)
    x, w, b = operands(36, 10, 41, dtype, (3,))
    check_lce(x, w, targets(False, 3, 41, (36,)).T, b, c, budget=1)
    for positions, grad in itertools.product(((3,), (2, 3)), (False, True)):  # two strided ones do not merge
        x, w, b = operands(36, 10, 41, dtype, positions)
        target = lay_out(probability_targets(36, 41, *positions, dtype=dtype), layout).requires_grad_(grad)
        check_at_budgets(x, w, target, b, c, reduction="none")
        check_lce(x, w, target, b, c, budget=1)


# Anything together


@given(combination(50, 20, 70, 3))
def test_any_combination(drawn):
    tensors, options = combined(**drawn)
    check_lce(*tensors, **options)
