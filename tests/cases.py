"""One small differentiable call per op and option, in float64: the derivative and compile tests run them all."""

import torch
from util import class_targets, probability_targets

import regfast

ACTIVATIONS = regfast._C.ACTIVATIONS
FLOATING = ("loss", "lse", "entropy", "logprob")


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def distribution(*shape):
    return probability_targets(*shape, dtype=torch.float64).requires_grad_()


torch.manual_seed(0)
CLASSES = class_targets((4,), 6, 0.3)
CLASSES[0] = 2  # not all ignored
WEIGHT = torch.rand(6, dtype=torch.float64) + 0.1
PIXELS = class_targets((2, 3), 5, 0.2)
SHARES = torch.rand(4, dtype=torch.float64) + 0.1
COUNTS = torch.randint(4, (4, 5)).double()
ONES = torch.rand(4, 5, dtype=torch.float64)

# name -> (function of regfast or reference, arguments that are differentiated)
CASES = {
    **{
        f"linear {name}": (
            lambda m, x, w, b, name=name: m.linear(x, w, b, activation=name),
            lambda: [leaf(4, 3), leaf(5, 3), leaf(5)],
        )
        for name in ACTIVATIONS
    },
    "linear plain": (lambda m, x, w: m.linear(x, w), lambda: [leaf(2, 3, 4), leaf(5, 4)]),
    "linear vector": (lambda m, x, w, b: m.linear(x, w, b, activation="tanh"), lambda: [leaf(4), leaf(3, 4), leaf(3)]),
    **{
        f"phm_linear {name}": (
            lambda m, x, a, s, b, name=name: m.phm_linear(x, a, s, b, activation=name),
            lambda: [leaf(4, 6), leaf(2, 2, 2), leaf(2, 4, 3), leaf(8)],
        )
        for name in ("none", "relu", "gelu")
    },
    "phm_linear plain": (
        lambda m, x, a, s: m.phm_linear(x, a, s),
        lambda: [leaf(2, 3, 6), leaf(3, 3, 3), leaf(3, 1, 2)],
    ),
    "phm_linear vector": (
        lambda m, x, a, s, b: m.phm_linear(x, a, s, b, activation="tanh"),
        lambda: [leaf(4), leaf(2, 2, 2), leaf(2, 1, 2), leaf(2)],
    ),
    "phm_linear of one summand": (
        lambda m, x, a, s, b: m.phm_linear(x, a, s, b),
        lambda: [leaf(3, 4), leaf(1, 1, 1), leaf(1, 3, 4), leaf(3)],
    ),
    "softmax": (lambda m, x: m.softmax(x, -1), lambda: [leaf(3, 5)]),
    "softmax strided": (lambda m, x: m.softmax(x, 1), lambda: [leaf(2, 4, 3)]),
    "log_softmax": (lambda m, x: m.log_softmax(x, -1), lambda: [leaf(3, 5)]),
    "log_softmax strided": (lambda m, x: m.log_softmax(x, 1), lambda: [leaf(2, 4, 3)]),
    "logsumexp": (lambda m, x: m.logsumexp(x, 1), lambda: [leaf(3, 5)]),
    "logsumexp kept": (lambda m, x: m.logsumexp(x, 0, keepdim=True), lambda: [leaf(3, 5)]),
    "logsumexp tuple": (lambda m, x: m.logsumexp(x, (0, 2)), lambda: [leaf(3, 2, 4)]),
    **{
        f"mse_loss {r}": (lambda m, x, y, r=r: m.mse_loss(x, y, reduction=r), lambda: [leaf(4, 5), leaf(4, 5)])
        for r in ("none", "mean", "sum")
    },
    "mse_loss weighted": (lambda m, x, y, w: m.mse_loss(x, y, weight=w), lambda: [leaf(4, 5), leaf(4, 5), leaf(4, 5)]),
    **{
        f"cross_entropy {r}": (lambda m, x, r=r: m.cross_entropy(x, CLASSES, WEIGHT, reduction=r), lambda: [leaf(4, 6)])
        for r in ("none", "mean", "sum")
    },
    "cross_entropy smoothed": (lambda m, x: m.cross_entropy(x, CLASSES, label_smoothing=0.2), lambda: [leaf(4, 6)]),
    "cross_entropy pixels": (lambda m, x: m.cross_entropy(x, PIXELS, label_smoothing=0.1), lambda: [leaf(2, 5, 3)]),
    "cross_entropy probabilities": (
        lambda m, x, t: m.cross_entropy(x, t, WEIGHT, label_smoothing=0.2, reduction="none"),
        lambda: [leaf(4, 6), distribution(4, 6)],
    ),
    "cross_entropy probabilities and weight": (
        lambda m, x, t, w: m.cross_entropy(x, t, w),
        lambda: [leaf(4, 6), distribution(4, 6), leaf(6)],
    ),
    "cross_entropy everything": (
        lambda m, x: m.cross_entropy(
            x, CLASSES, WEIGHT, label_smoothing=0.1, z_loss=0.2, softcap=3.0, logit_scale=0.7, outputs=FLOATING
        ),
        lambda: [leaf(4, 6)],
    ),
    **{
        f"linear_cross_entropy {r}": (
            lambda m, x, w, b, r=r: m.linear_cross_entropy(x, w, CLASSES, linear_bias=b, weight=WEIGHT, reduction=r),
            lambda: [leaf(4, 3), leaf(6, 3), leaf(6)],
        )
        for r in ("none", "mean", "sum")
    },
    "linear_cross_entropy pixels": (
        lambda m, x, w, b: m.linear_cross_entropy(x, w, PIXELS, linear_bias=b, label_smoothing=0.1, z_loss=0.2),
        lambda: [leaf(2, 4), leaf(5, 3, 4), leaf(5, 3)],
    ),
    "linear_cross_entropy probabilities": (
        lambda m, x, w, b, t: m.linear_cross_entropy(x, w, t, linear_bias=b, label_smoothing=0.2, weight=WEIGHT),
        lambda: [leaf(4, 3), leaf(6, 3), leaf(6), distribution(4, 6)],
    ),
    "linear_cross_entropy one sample": (
        lambda m, x, w: m.linear_cross_entropy(x, w, torch.tensor(2), softcap=3.0),
        lambda: [leaf(3), leaf(5, 3)],
    ),
    "linear_cross_entropy everything": (
        lambda m, x, w, b: m.linear_cross_entropy(
            x, w, CLASSES, linear_bias=b, weight=WEIGHT, z_loss=0.2, softcap=3.0, logit_scale=0.7, outputs=FLOATING
        ),
        lambda: [leaf(4, 3), leaf(6, 3), leaf(6)],
    ),
    **{
        f"linear_mse_loss {r}": (
            lambda m, x, w, y, b, r=r: m.linear_mse_loss(x, w, y, b, reduction=r),
            lambda: [leaf(4, 3), leaf(5, 3), leaf(4, 5), leaf(5)],
        )
        for r in ("none", "mean", "sum")
    },
    "linear_nll gaussian": (
        lambda m, x, w, b: m.linear_nll(x, w, COUNTS, b, family="gaussian", sigma=0.7),
        lambda: [leaf(4, 3), leaf(5, 3), leaf(5)],
    ),
    **{
        f"linear_nll gaussian, learned, {r}": (
            lambda m, x, w, b, s, r=r: m.linear_nll(
                x, w, COUNTS, b, family="gaussian", sigma=s.exp(), sample_weight=SHARES, reduction=r
            ),
            lambda: [leaf(4, 3), leaf(5, 3), leaf(5), leaf(5)],
        )
        for r in ("none", "mean")
    },
    "linear_nll gaussian, one learned, no bias": (
        lambda m, x, w, s: m.linear_nll(x, w, COUNTS.view(2, 2, 5), family="gaussian", sigma=s.exp(), reduction="sum"),
        lambda: [leaf(2, 2, 3), leaf(5, 3), leaf()],
    ),
    "linear_nll bernoulli": (
        lambda m, x, w, b: m.linear_nll(x, w, ONES, b, family="bernoulli", pos_weight=WEIGHT[:5], sample_weight=SHARES),
        lambda: [leaf(4, 3), leaf(5, 3), leaf(5)],
    ),
    "linear_nll bernoulli, observed": (
        lambda m, x, w, y, p, s: m.linear_nll(
            x, w, y.sigmoid(), family="bernoulli", pos_weight=p.exp(), sample_weight=s.exp(), reduction="none"
        ),
        lambda: [leaf(4, 3), leaf(5, 3), leaf(4, 5), leaf(5), leaf(4)],
    ),
    "linear_nll poisson": (
        lambda m, x, w, b: m.linear_nll(x, w, COUNTS, b, family="poisson", full=True, sample_weight=SHARES),
        lambda: [leaf(4, 3), leaf(5, 3), leaf(5)],
    ),
    "linear_nll poisson, one sample": (
        lambda m, x, w: m.linear_nll(x, w, COUNTS[1], family="poisson", reduction="none"),
        lambda: [leaf(3), leaf(5, 3)],
    ),
    "linear_nll categorical": (
        lambda m, x, w, b: m.linear_nll(x, w, CLASSES, b, family="categorical", sample_weight=SHARES),
        lambda: [leaf(4, 3), leaf(6, 3), leaf(6)],
    ),
    "cross_entropy everything, probabilities": (
        lambda m, x, t: m.cross_entropy(x, t, WEIGHT, z_loss=0.2, softcap=3.0, logit_scale=0.7, outputs=FLOATING),
        lambda: [leaf(2, 6, 2), distribution(2, 6, 2)],
    ),
}


def bound(name, module=regfast):
    """The function of its differentiated arguments, with a flat tuple or a tensor as its result."""
    fn, make = CASES[name]

    def call(*arguments):
        result = fn(module, *arguments)
        return result if isinstance(result, torch.Tensor) else tuple(result)

    return call, make()


def scalar(fn):
    """A weighted sum of all outputs, so that no grad_output is all ones."""

    def call(*arguments):
        result = fn(*arguments)
        parts = (result,) if isinstance(result, torch.Tensor) else result
        return sum(
            (p * torch.arange(1.0, 1 + p.numel()).to(p).view(p.shape)).sum() * (1 + i) for i, p in enumerate(parts)
        )

    return call
