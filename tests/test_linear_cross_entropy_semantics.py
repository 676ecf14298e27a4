"""linear_cross_entropy: errors, empty inputs, graphs."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from linear_cross_entropy_cases import (
    BUDGETS,
    FLOATING,
    NAMES,
    REDUCTIONS,
    each_target,
    needs_torchs,
    operands,
    regfasts,
    targets,
    torchs,
)
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from util import assert_same_error, class_targets, fresh_process

import regfast

pytestmark = pytest.mark.kernels("linear_cross_entropy")

# Errors

X, W, T = torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4, dtype=torch.int64)
P = torch.full((4, 5), 0.2)
K = torch.ones(5, 2, 3)  # K-dimensional weights
ERRORS = {
    "class above": ("target", (X, W, T + 5), {}),
    "class below": ("target", (X, W, T - 1), {}),
    "class with smoothing": ("target", (X, W, T + 7), {"label_smoothing": 0.1, "reduction": "none"}),
    "class with weight": ("target", (X, W, T + 5), {"weight": torch.ones(5)}),
    "class of one sample": ("target", (X[0], W, torch.tensor(9)), {}),
    "class with more dimensions": ("target", (X, K, torch.full((4, 2), 7)), {}),
    "class with another ignore_index": ("target", (X, W, T - 100), {"ignore_index": 2}),
    "batch": ("target", (X, W, T[:3]), {}),
    "target of two dimensions": ("target", (X, W, T.view(2, 2)), {}),
    "target shape": ("target", (X, K, torch.zeros(4, 3, dtype=torch.int64)), {}),
    "bool": ("target", (X, W, T.bool()), {}),
    "float classes": ("target", (X, W, T.float()), {}),
    "integer probabilities": ("target", (X, W, torch.zeros(4, 5, dtype=torch.int64)), {}),
    "probabilities of other classes": ("target", (X, W, torch.rand(4, 6)), {}),
    "input of three dimensions beside other rows": ("target", (X[None], W, T), {}),
    "input without dimensions": ("input", (torch.tensor(1.0), W, T), {}),
    "weights of one dimension": ("linear_weight", (X, W[0], T), {}),
    "features": ("linear_weight", (X, torch.ones(5, 4), T), {}),
    "one sample of a K-dimensional loss": ("input", (X[0], K, T[:2]), {}),
    "bias shape": ("linear_bias", (X, W, T), {"linear_bias": torch.ones(4)}),
    "bias of K dimensions": (
        "linear_bias",
        (X, K, torch.zeros(4, 2, dtype=torch.int64)),
        {"linear_bias": torch.ones(5)},
    ),
    "weights dtype": ("linear_weight", (X, W.double(), T), {}),
    "bias dtype": ("linear_bias", (X, W, T), {"linear_bias": torch.ones(5).double()}),
    "weight too short": ("weight", (X, W, T), {"weight": torch.ones(4)}),
    "weight of two dimensions": ("weight", (X, W, T), {"weight": torch.ones(5, 1)}),
    "weight dtype": ("weight", (X, W, T), {"weight": torch.ones(5).double()}),
    "weight dtype for bf16": ("weight", (X.bfloat16(), W.bfloat16(), T), {"weight": torch.ones(5)}),
    "weight with gradient": (
        "weight",
        (X.clone().requires_grad_(), W, T),
        {"weight": torch.ones(5, requires_grad=True)},
    ),
    "reduction": ("reduction", (X, W, T), {"reduction": "median"}),
    "label_smoothing": ("label_smoothing", (X, W, T), {"label_smoothing": 1.5}),
    "ignore_index for probabilities": ("ignore_index", (X, W, P), {"ignore_index": 0}),
    "-100 for probabilities": ("ignore_index", (X, W, P), {"ignore_index": -100}),
    "no tensor for weights": ("linear_weight", (X, None, T), {}),
}


@needs_torchs
@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.no_kernels("errors")
def test_errors_are_torchs_and_say_more(case):
    argument, arguments, options = ERRORS[case]
    if case == "no tensor for weights":
        with pytest.raises(TypeError, match=r"regfast\.linear_cross_entropy: linear_weight: expected .*, got NoneType"):
            regfast.linear_cross_entropy(*arguments)
        return
    assert_same_error(
        lambda: regfast.linear_cross_entropy(*arguments, **options),
        lambda: F.linear_cross_entropy(*arguments, **options),
        "linear_cross_entropy",
        f": {argument}: expected",
    )


@pytest.mark.parametrize(
    "option",
    [
        {"outputs": "prob"},
        {"outputs": ()},
        {"outputs": ("loss", "loss")},
        {"memory_budget": 0},
        {"memory_budget": -5},
        {"softcap": 0.0},
        {"softcap": -1.0},
        {"filter_eps": -1e-9},
    ],
    ids=str,
)
@pytest.mark.no_kernels("errors")
def test_errors_of_further_options(option):
    (name,) = option
    for leaf in (X, X.clone().requires_grad_()):
        with pytest.raises(ValueError, match=rf"regfast\.linear_cross_entropy: {name}: expected .*, got "):
            regfast.linear_cross_entropy(leaf, W, T, **option)


def test_an_error_leaves_the_next_call_alone():
    # The bad class is the last of many chunks.
    x, w, b = operands(2000, 1, 3)
    target = class_targets((2000,), 3)
    target[-1] = 3
    with pytest.raises(IndexError, match=r"classes from 0 to 2, got 3$"):
        regfasts(x, w, target, b, memory_budget=1)
    assert all(t.grad is None for t in (x, w, b))
    target[-1] = 2
    assert_close(regfasts(x, w, target, b), torchs(x, w, target, b))


# Without elements


@pytest.mark.parametrize("n, d, v", [(0, 3, 5), (4, 0, 5), (0, 0, 5), (4, 3, 1)], ids=str)
@pytest.mark.parametrize("positions", [(), (2,), (0,)], ids=str)
def test_no_rows_no_features_one_class(n, d, v, positions):
    x, w, b = operands(n, d, v, positions=positions)
    for mode, target in itertools.product(
        REDUCTIONS, (torch.zeros(n, *positions, dtype=torch.int64), torch.full((n, v, *positions), 1.0 / v))
    ):
        ours, theirs = (fn(x, w, target, b, reduction=mode) for fn in (regfasts, torchs))
        assert_close(ours, theirs, equal_nan=True)
        seed = torch.full_like(ours, 1.5)
        assert_close(*(torch.autograd.grad(loss, [x, w, b], seed) for loss in (ours, theirs)), equal_nan=True)


# Graphs


@pytest.mark.parametrize(
    "names, mode", [("loss", "mean"), ("loss", "sum"), ("loss", "none"), (FLOATING, "mean")], ids=str
)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_second_backward_through_a_retained_graph(names, mode, half):
    # The first backward gives its gradients away. The user may write on them; the second must not see it.
    x, w, b = operands(40, 7, 21, torch.bfloat16 if half else torch.float32)
    target = targets(True, 40, 21, dtype=x.dtype)
    for scale, budget in itertools.product((1.0, -2.5), BUDGETS):
        out = regfasts(x, w, target, b, outputs=names, reduction=mode, memory_budget=budget)
        out = [out] if isinstance(out, torch.Tensor) else list(out)
        seeds = [torch.full_like(o, scale) for o in out]
        first = torch.autograd.grad(out, [x, w, b, target], seeds, retain_graph=True)
        kept = [g.clone() for g in first]
        for g in first:
            g.fill_(1e6)
        second = torch.autograd.grad(out, [x, w, b, target], seeds, retain_graph=True)
        third = torch.autograd.grad(out, [x, w, b, target], [2 * s for s in seeds])
        tolerance = {"rtol": 2**-7, "atol": 1e-4} if half else {"rtol": 1e-5, "atol": 1e-6}
        assert_close(second, tuple(kept), **tolerance)
        assert_close(third, tuple(2 * g for g in kept), **tolerance)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(out, [x, w, b, target], seeds)


def test_gradients_accumulate_in_leaves_and_only_there():
    # .grad of the first step is ours to keep, so the second step's sum must not be written into what a graph still has.
    x, w, b = operands(40, 7, 21)
    target = class_targets((40,), 21, 0.3)
    loss = regfasts(x, w, target, b)
    loss.backward(retain_graph=True)
    once = [t.grad.clone() for t in (x, w, b)]
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close([t.grad for t in (x, w, b)], [3 * g for g in once])


@each_target
def test_inputs_are_not_changed(probabilities, dtype):
    for mode, names in itertools.product(REDUCTIONS, ("loss", NAMES)):
        x, w, b = operands(40, 7, 21, dtype)
        c = torch.rand(21).to(dtype)
        every = [x, w, b, c, target := targets(probabilities, 40, 21, dtype=dtype)]
        before = [t.detach().clone() for t in every]
        out = regfasts(x, w, target, b, c, reduction=mode, outputs=names, memory_budget=1, filter_eps=1e-3)
        out = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        torch.autograd.backward(out, [torch.full_like(o, 0.3) for o in out])
        assert all(t._version == 0 and torch.equal(t.detach(), old) for t, old in zip(every, before, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    x, w, b = operands(40, 7, 21)
    target = class_targets((40,), 21, 0.3)
    for mode in ("mean", "none"):
        fn = lambda *t, mode=mode: regfasts(t[0].tanh(), t[1], target, t[2], reduction=mode, memory_budget=1)  # noqa: E731
        values = [fn(x, w, b), checkpoint(fn, x, w, b, use_reentrant=reentrant)]
        results = [torch.autograd.grad(v.sum(), [x, w, b]) for v in values] if not reentrant else []
        if reentrant:  # which works with .backward() alone
            for value in values:
                value.sum().backward()
                results.append([t.grad for t in (x, w, b)])
                x.grad = w.grad = b.grad = None
        assert_close(*results)


@pytest.mark.parametrize("gemm", ["own", "aten"])
@pytest.mark.no_kernels("another process")
def test_a_bias_of_positions_whoever_multiplies(gemm):
    printed = fresh_process(
        """
        import torch, regfast
        torch.manual_seed(0)
        for positions in ((), (3,), (2, 2)):
            x, w, b = torch.randn(70, 33), torch.randn(40, *positions, 33), torch.randn(40, *positions)
            t = torch.randint(40, (70, *positions))
            for budget in (None, 1):
                value = regfast.linear_cross_entropy(x, w, t, linear_bias=b, memory_budget=budget)
                true = regfast.reference.linear_cross_entropy(x, w, t, linear_bias=b)
                print((value - true).abs().item() < 1e-5)
        """,
        REGFAST_GEMM=gemm,
    )
    assert printed.split() == ["True"] * 6
