"""Values and gradients of every op at every tail of a vector: run by test_isa.py, once per instruction set."""

import pytest
import torch
import torch.nn.functional as F
from linear_nll_cases import FAMILIES, check_nll, operands, scales, targets
from test_linear import ACTIVATIONS, check_linear
from test_phm_linear import check_phm
from util import check, class_targets, lay_out, probability_targets, spiky

import regfast
from regfast import reference

pytestmark = pytest.mark.kernels("linear", "softmax", "logsumexp", "cross_entropy", "mse_loss", "phm_linear")

# One to two vectors of 16 with every tail, then sizes around a cache block and around the blocks of the product.
TAILS = [*range(1, 35), 63, 65, 130]
BLOCKS = [2047, 2048, 2051, 4100]
# Where float32 sums need care; in float64 the oracle, which is PyTorch itself, errs more there than we may.
WIDE = [12000, 32003]


def sizes(dtype):
    return TAILS + BLOCKS + (WIDE if dtype != torch.float64 else [])


def test_linear(dtype, pool):
    tails = [(t, 19, 35 - min(t, 34)) for t in TAILS]
    for n, k, v in [(1, 40, 7), (2, 9, 1), *tails, (40, 1030, 50), (7, 33, 2070), (150, 40, 34)]:
        x, w = spiky(n, k, dtype=dtype).requires_grad_(), spiky(v, k, dtype=dtype).requires_grad_()
        b = spiky(v, dtype=dtype).requires_grad_()
        check_linear(x, w, b, "relu", what=f"{n} {k} {v}", pool=pool)


def test_phm_linear(dtype, pool):
    # Parts with every tail; few rows as dot products, many packed; n with and without whole tiles of parts.
    tails = [(1 + t % 3, t, 35 - min(t, 34), 2 + t % 3) for t in TAILS]
    for rows, length, height, n in [*tails, (40, 33, 17, 4), (20, 7, 5, 8), (9, 260, 50, 4)]:
        x = spiky(rows, n * length, dtype=dtype).requires_grad_()
        a = (spiky(n, n, n) / n).to(dtype).requires_grad_()
        s, b = spiky(n, height, length, dtype=dtype).requires_grad_(), spiky(n * height, dtype=dtype).requires_grad_()
        check_phm(x, a, s, b, "relu", what=f"{rows} {length} {height} {n}", pool=pool)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype, pool):
    points = torch.cat([torch.linspace(-12, 12, 20001), torch.tensor([0.0, -0.0, 90.0, -90.0, 1e4, -1e4])])
    for width in (1, 3, 17, 33):
        for part in points.split(2000):  # a magnitude for each part of the line
            w = torch.linspace(0.5, 1, width)[:, None].to(dtype)
            check_linear(part[:, None].to(dtype).requires_grad_(), w, None, activation, what=str(width), pool=pool)


@pytest.mark.parametrize("op", ["softmax", "log_softmax", "logsumexp"])
def test_softmax(op, dtype, pool):
    ours, theirs = getattr(regfast, op), getattr(torch, op)
    for c in sizes(dtype):
        for shape, dim in (((9, c), 1), ((2, c, 3), 1), ((c, 20), 0)):
            x = spiky(*shape, dtype=dtype, size=8).requires_grad_()
            check(lambda x, d=dim: ours(x, d), lambda x, d=dim: theirs(x, d), x, what=str(shape), terms=1, pool=pool)


OPTIONS = [{}, {"label_smoothing": 0.1}, {"softcap": 5.0, "z_loss": 0.1, "logit_scale": 0.7}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
def test_cross_entropy(options, probabilities, dtype, pool):
    for c in sizes(dtype):
        for shape in ((9, c), (2, c, 5)):
            x = spiky(*shape, dtype=dtype).requires_grad_()
            target = class_targets((shape[0], *shape[2:]), c, 0.2)
            if probabilities:
                target = probability_targets(*shape, dtype=dtype).requires_grad_()
            check(
                lambda x, t, w: regfast.cross_entropy(x, t, w, reduction="none", **options),
                lambda x, t, w: reference.cross_entropy(x, t, w, reduction="none", **options),
                x,
                target,
                torch.rand(c).to(dtype) if "label_smoothing" in options else None,
                what=f"{shape} {options}",
                terms=1,
                pool=pool,
            )


def test_outputs(dtype, pool):
    names = ("lse", "entropy", "logprob", "argmax")
    for c in sizes(dtype):
        check(
            lambda x, t: regfast.cross_entropy(x, t, outputs=names),
            lambda x, t: reference.cross_entropy(x, t, outputs=names),
            spiky(9, c, dtype=dtype).requires_grad_(),
            class_targets((9,), c, 0.2),
            what=str(c),
            terms=1,
            pool=pool,
        )


def test_mse(dtype, pool):
    for n in sizes(dtype):
        x, y = spiky(3, n, dtype=dtype).requires_grad_(), lay_out(spiky(3, n, dtype=dtype), "strided").requires_grad_()
        for mode in ("none", "mean", "sum"):
            ours, theirs = (lambda x, y, f=f, m=mode: f(x, y, reduction=m) for f in (regfast.mse_loss, F.mse_loss))
            check(ours, theirs, x, y, what=f"{n} {mode}", pool=pool)


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_nll(family, dtype, pool):
    # Rows, features and outputs at the tails: one pass of each kind, and the products.
    for n, d, v in [(t, t % 9 + 1, t % 8 + 1) for t in TAILS] + [(33, t, t % 8 + 1) for t in TAILS]:
        for lead, outputs in (((n,), v), ((9,), n)):
            x, w, b = operands(lead, d, outputs, dtype)
            t, weights = targets(family, *lead, outputs, dtype=dtype), torch.rand(lead).to(dtype)
            for mode in ("none", "mean"):
                options = {"family": family, "reduction": mode, "what": f"{lead} {d} {outputs} {mode}"}
                terms = 8.0 if mode == "none" else 1.0  # slopes of both signs cancel
                check_nll(x, w, t, b, scales(family, outputs, dtype)[-1], weights, pool=pool, terms=terms, **options)
