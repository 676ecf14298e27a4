"""Operands, oracles and the comparison that the tests of linear_cross_entropy share."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import float32, float64
from util import DTYPES, HALF, LAYOUTS, check, class_targets, lay_out, probability_targets, spiky

import regfast
from regfast import reference

REDUCTIONS = ("none", "mean", "sum")
NAMES = ("loss", "lse", "entropy", "logprob", "argmax")
FLOATING = NAMES[:-1]
# One chunk, and chunks of as few rows as there can be.
BUDGETS = (None, 1)
needs_torchs = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no such op")
each_reduction = pytest.mark.parametrize("mode", REDUCTIONS)
each_target = pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])


def operands(n, d, v, dtype=float32, positions=()):
    """Rows, weights that make logits of a few units with spikes, and a bias; all of them leaves."""
    x = spiky(*((n, d) if n is not None else (d,)), dtype=dtype)
    w = spiky(v, *positions, d, dtype=float64, size=2.0) / max(1, d) ** 0.5
    b = spiky(v, *positions, dtype=dtype, size=1.0)
    return [t.to(dtype).requires_grad_() for t in (x, w, b)]


def targets(probabilities, n, v, positions=(), *, dtype=float32, ignored=0.3):
    """Probabilities, a leaf of the given dtype, or classes of which some are ignored."""
    if probabilities:
        return probability_targets(n, v, *positions, dtype=dtype).requires_grad_()
    return class_targets((n, *positions), v, ignored)


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


def references(x, w, t, b=None, c=None, **options):
    return reference.linear_cross_entropy(x, w, t, linear_bias=b, weight=c, **options)


def check_lce(x, w, target, b=None, c=None, *, budget=None, theirs=torchs, what="", **options):
    """Ours at a budget against torch in the same dtype, or against `theirs`; the oracle is torch in float64."""
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


def check_at_budgets(*tensors, **options):
    for budget in BUDGETS:
        check_lce(*tensors, budget=budget, **options)


def modes_and_budgets(*modes):
    return itertools.product(modes or REDUCTIONS, BUDGETS)


def combination(n, d, v, position):
    """Draws anything together, of sizes up to these, for combined()."""
    some_names = st.permutations(FLOATING).flatmap(lambda p: st.integers(1, 4).map(lambda k: tuple(p[:k])))
    options = {
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "reduction": st.sampled_from(REDUCTIONS),
        "z_loss": st.sampled_from([0.0, 0.01, 1.0]),
        "softcap": st.sampled_from([None, 2.0, 30.0]),
        "logit_scale": st.sampled_from([None, 0.5, 2.0]),
        "outputs": some_names.map(lambda names: names if len(names) > 1 else names[0]),
        "budget": st.sampled_from([None, 1, 20_000]),
    }
    return st.fixed_dictionaries(
        {
            "n": st.integers(0, n),
            "d": st.integers(1, d),
            "v": st.integers(1, v),
            "positions": st.lists(st.integers(1, position), max_size=2),
            "layout": st.sampled_from(LAYOUTS),
            "dtype": st.sampled_from(DTYPES),
            "target_kind": st.sampled_from(["classes", "probabilities", "float32 probabilities"]),
            "biased": st.booleans(),
            "weighted": st.booleans(),
            "ignored": st.sampled_from([0.0, 0.5, 1.0]),
            "options": st.fixed_dictionaries(options),
        }
    )


def combined(n, d, v, positions, layout, dtype, target_kind, biased, weighted, ignored, options):
    """check_lce's tensors and options."""
    torch.manual_seed(n + 13 * v + 7 * d)
    x, w, b = operands(n, d, v, dtype, positions)
    x = lay_out(x.detach(), layout).requires_grad_()
    if target_kind == "classes":
        target = class_targets((n, *positions), v, ignored)
    else:
        wide = float32 if "float32" in target_kind and dtype in HALF else dtype
        target = lay_out(probability_targets(n, v, *positions, dtype=wide), layout).requires_grad_()
    return (x, w, target, b if biased else None, torch.rand(v).to(dtype) if weighted else None), options
