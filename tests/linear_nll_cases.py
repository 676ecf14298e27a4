"""Operands, oracles and the comparison that the tests of linear_nll share."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from util import check, spiky

import regfast
from regfast import reference

FAMILIES = regfast._C.FAMILIES
REDUCTIONS = ("none", "mean", "sum")
each_family = pytest.mark.parametrize("family", FAMILIES)
each_reduction = pytest.mark.parametrize("mode", REDUCTIONS)
# Leading dimensions, D, V: one pass over input with D up to a vector, at the tails of a block of rows; several blocks;
# D at the tails of vectors, all counts of outputs. Then the products: nine outputs, more, more than a cache block.
NARROW = [((n,), d, v) for n, (d, v) in itertools.product((1, 7, 8, 9, 31, 33), ((1, 1), (2, 8), (8, 3), (16, 2)))]
WIDE = [((31,), 17, 1), ((33,), 65, 2), ((70,), 33, 3), ((40,), 131, 4), ((5, 3), 40, 7), ((65,), 257, 8)]
PRODUCTS = [((1,), 1, 9), ((7, 2), 5, 17), ((70,), 33, 130), ((130,), 300, 40)]
SHAPES = NARROW + WIDE + PRODUCTS


def operands(lead, d, v, dtype=torch.float32):
    """Rows, weights that predict a few units with spikes, and a bias; all of them leaves."""
    x, b = spiky(*lead, d, dtype=dtype, size=2.0), spiky(v, dtype=dtype, size=1.0) / 2
    w = spiky(v, d, dtype=torch.float64, size=1.0) / max(1, 2 * d) ** 0.5
    return [t.detach().to(dtype).requires_grad_() for t in (x, w, b)]


def targets(family, *shape, dtype=torch.float32):
    """What the family can observe, some of it at the ends of its range."""
    if family == "bernoulli":
        return torch.where(torch.rand(shape) < 0.3, torch.rand(shape), torch.randint(2, shape)).to(dtype)
    if family == "poisson":
        return torch.poisson(spiky(*shape, size=2.0).exp().clamp(max=200)).to(dtype)
    return spiky(*shape, dtype=dtype)


def scales(family, v, dtype=torch.float32):
    """Values of the family's sigma or pos_weight: none, and tensors as they may come, learned where they can be."""
    if family == "gaussian":
        number, one, every = torch.tensor(0.7, dtype=dtype), torch.rand(v) + 0.5, torch.rand(v) + 0.5
        return [None, 1.7, number, one.to(dtype), every.to(dtype).requires_grad_(), number.clone().requires_grad_()]
    if family == "bernoulli":
        return [None, torch.tensor(2.5, dtype=dtype), (torch.rand(v) * 3).to(dtype)]
    return [None]


def ours(x, w, t, b=None, scale=None, weights=None, *, family, **options):
    """regfast's, or what stands in for it as `module`; scale is what the family has, weights are the samples'."""
    module = options.pop("module", regfast)
    if family == "squared":
        return module.linear_mse_loss(x, w, t, b, sample_weight=weights, **options)
    options |= {"gaussian": {"sigma": scale}, "bernoulli": {"pos_weight": scale}}.get(family, {})
    return module.linear_nll(x, w, t, b, family=family, sample_weight=weights, **options)


def references(*tensors, **options):
    return ours(*tensors, module=reference, **options)


def torchs(x, w, t, b=None, scale=None, weights=None, *, family, full=None, eps=1e-6, reduction="mean"):
    """F.linear and the loss of torch that the documentation names, in the dtype of input and target."""
    eta = F.linear(x, w, b)
    y = t if t.is_floating_point() else t.to(x.dtype)
    dtype = torch.promote_types(eta.dtype, y.dtype)
    eta, y, mode = eta.to(dtype), y.to(dtype), reduction if weights is None else "none"
    if family == "squared":
        loss = F.mse_loss(eta, y, reduction=mode)
    elif family == "gaussian":
        # Its bound of the variance, eps, has no derivative of zero below it: the gradient passes.
        sigma = scale if isinstance(scale, torch.Tensor) else torch.tensor(scale or 1.0, dtype=eta.dtype)
        variance = sigma.to(dtype).square().expand(eta.shape)
        loss = F.gaussian_nll_loss(eta, y, variance, full=full is not False, eps=eps, reduction=mode)
    elif family == "bernoulli":
        scale = None if scale is None else scale.to(dtype)
        loss = F.binary_cross_entropy_with_logits(eta, y, pos_weight=scale, reduction=mode)
    else:
        loss = F.poisson_nll_loss(eta, y, full=bool(full), reduction=mode)
    if weights is None:
        return loss
    each = weights.to(dtype).unsqueeze(-1).expand(loss.shape)
    if reduction == "none":
        return loss * each
    return (loss * each).sum() / (each.sum() if reduction == "mean" else 1)


def check_nll(x, w, t, b=None, scale=None, weights=None, *, theirs=torchs, what="", **options):
    """Ours against torch in the same dtype, or against `theirs`; the oracle is torch in float64."""
    checks = {name: options.pop(name, None) for name in ("grads", "terms", "pool", "magnitude")}
    # util.check makes leaves of tensors alone, and integers stay what they are.
    number = scale if isinstance(scale, float) else None

    def bound(fn):
        return lambda x, w, t, b, s, weights: fn(x, w, t, b, s if number is None else number, weights, **options)

    check(
        bound(ours),
        bound(theirs),
        x,
        w,
        t,
        b,
        None if number else scale,
        weights,
        exact=bound(torchs),
        what=what or str(options),
        **checks,
    )
