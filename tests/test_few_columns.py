"""Few classes, features and outputs, for which kernels have a lane to a row: options x dtypes x layouts x numbers of
rows beside a tile's and a block's."""

import pytest
import torch
import torch.nn.functional as F
from test_linear import check_linear
from torch.testing import assert_close
from util import INF, NAN, check, class_targets, lay_out, probability_targets, spiky

import regfast
from regfast import reference

pytestmark = pytest.mark.kernels("cross_entropy", "softmax", "logsumexp", "linear")

# One class; transposed number by number and by squares; beside a vector's lanes and the last of the few.
CLASSES = (1, 2, 4, 5, 7, 16, 17, 24, 25, 32, 48, 49, 64, 65)
# Batch and further dimensions: rows of one tile of 64 and beside it, planes smaller than a vector, of no whole number
# of tiles, and of whole pages.
SHAPES = ((5,), (63,), (64,), (131,), (5, 3), (2, 7, 11), (2, 64, 16))
HOW = ("contiguous", "strided", "transposed", "channels last")
OPTIONS = (
    {},
    {"reduction": "none", "weight": True, "label_smoothing": 0.2},
    {"reduction": "sum", "z_loss": 0.01, "softcap": 9.0, "logit_scale": 0.5, "outputs": reference.OUTPUTS},
    {"weight": True, "outputs": ("logprob", "argmax")},
    {"outputs": ("lse", "entropy")},
)


def arrange(x, how):
    if how == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return lay_out(x, how)


def logits(shape, classes, how, dtype):
    x = spiky(shape[0], classes, *shape[1:], dtype=dtype)
    return arrange(x, how).requires_grad_()


@pytest.mark.parametrize("probabilities", (False, True), ids=("classes", "probabilities"))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("how", HOW)
def test_cross_entropy(how, options, probabilities, dtype, pool):
    # With each options every number of classes and every shape, but a third of their pairs: each pair, of every layout
    # and dtype, meets others of the five.
    part = OPTIONS.index(options)
    options = dict(options)
    weighted = options.pop("weight", False)
    for i, classes in enumerate(CLASSES):
        for shape in SHAPES[(part + i) % 3 :: 3]:
            x = logits(shape, classes, how, dtype)
            if probabilities:
                target = arrange(probability_targets(*x.shape, dtype=dtype), how).requires_grad_()
            else:
                target = class_targets(shape, classes, 0.2)
            check(
                lambda x, t, w: regfast.cross_entropy(x, t, w, **options),
                lambda x, t, w: reference.cross_entropy(x, t, w, **options),
                x,
                target,
                torch.rand(classes).to(dtype) + 0.1 if weighted else None,
                what=f"{classes} {shape}",
                terms=2,
                pool=pool,
            )


@pytest.mark.parametrize("op", ("softmax", "log_softmax", "logsumexp"))
@pytest.mark.parametrize("how", HOW)
def test_softmax(op, how, dtype, pool):
    ours, theirs = getattr(regfast, op), getattr(torch, op)
    for classes in CLASSES:
        for shape in SHAPES:
            x = logits(shape, classes, how, dtype)
            check(lambda x: ours(x, 1), lambda x: theirs(x, 1), x, what=f"{classes} {shape}", terms=1, pool=pool)


@pytest.mark.parametrize("classes", (1, 3, 8, 21))
def test_rows_with_infinities_and_nan(classes, dtype):
    x = spiky(131, classes, dtype=dtype)
    for row, value in enumerate((INF, -INF, NAN, INF, -INF)):
        x[7 * row + 3, row % classes] = value
    x[70] = -INF
    x[90] = INF
    target = class_targets((131,), classes, 0.2)
    names = ("loss", "lse", "entropy", "logprob", "argmax")

    def outputs(of, x):
        return of.cross_entropy(x, target, reduction="none", outputs=names)

    for ours, true in zip(outputs(regfast, x), outputs(reference, x), strict=True):
        assert_close(ours, true, equal_nan=True)
    grads = []
    for of in (regfast, reference):
        leaf = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(of.cross_entropy(leaf, target, reduction="sum"), leaf)[0])
    counted = target != -100
    assert_close(*(g[counted] for g in grads), equal_nan=True)
    assert not grads[0][~counted].any()


def test_a_log_probability_beside_a_mean_of_nothing():
    """Its gradient does not know of the loss, whose denominator is zero."""
    x = spiky(70, 3).requires_grad_()
    target, none = class_targets((70,), 3), torch.zeros(3)
    (grad,) = torch.autograd.grad(regfast.cross_entropy(x, target, none, outputs=("logprob",)).sum(), x)
    assert_close(grad, F.one_hot(target, 3) - x.detach().softmax(1))


# Features and outputs: in pairs, in squares, in dot products of long rows, summed over rows where they lie.
LAYERS = (
    (1, 1),
    (2, 1),
    (3, 2),
    (4, 5),
    (8, 1),
    (8, 8),
    (13, 4),
    (16, 1),
    (17, 16),
    (20, 1),
    (31, 7),
    (32, 32),
    (33, 3),
)
ROWS = (1, 15, 16, 65, 130, 2049)


@pytest.mark.parametrize("activation", ("none", "relu", "gelu"))
@pytest.mark.parametrize("how", ("contiguous", "strided", "transposed", "padded", "expanded"))
def test_linear(how, activation, dtype, pool):
    for features, outputs in LAYERS:
        for rows in ROWS:
            x = lay_out(spiky(rows, features, dtype=dtype), how).requires_grad_()
            w = lay_out(spiky(outputs, features, dtype=dtype), how).requires_grad_()
            b = spiky(outputs, dtype=dtype).requires_grad_()
            check_linear(x, w, b, activation, what=f"{rows} {features} {outputs}", pool=pool)


# An input whose elements lie apart, or down its columns, beside a weight that is stored by rows: features beside the
# last of the few sides (32); outputs beside one, and beside the last skinny number (32); rows beside the last few (8).
@pytest.mark.parametrize("how", ("strided", "transposed"))
def test_linear_of_an_input_that_is_gathered(how, dtype, pool):
    for features in (31, 32, 33, 300):
        for outputs in (1, 2, 32, 33):
            for rows in (1, 2, 8, 9, 130):
                x = lay_out(spiky(rows, features, dtype=dtype), how).requires_grad_()
                w = spiky(outputs, features, dtype=dtype).requires_grad_()
                b = spiky(outputs, dtype=dtype).requires_grad_()
                check_linear(x, w, b, what=f"{rows} {features} {outputs}", pool=pool)


def test_linear_of_further_dimensions(dtype, pool):
    for shape in ((3, 33, 2), (2, 5, 7, 3), (4, 20, 9)):
        for x in (spiky(*shape, dtype=dtype), spiky(*shape[::-1], dtype=dtype).permute(*range(len(shape) - 1, -1, -1))):
            w, b = spiky(2, shape[-1], dtype=dtype).requires_grad_(), spiky(2, dtype=dtype).requires_grad_()
            check_linear(x.requires_grad_(), w, b, "none", what=str(shape), pool=pool)


@pytest.mark.parametrize("classes", (2, 5, 40, 48))
def test_no_digits_of_confident_rows_are_lost(classes, dtype):
    """Where one class has almost all of the probability, its loss is what is left to the others, many and small."""
    x = torch.zeros(70, classes, dtype=dtype)
    x[:, classes // 2] = torch.linspace(3, 30, 70, dtype=torch.float64).to(dtype)
    target = torch.full((70,), classes // 2)
    true = torch.log1p((classes - 1) * torch.exp(-x[:, classes // 2].double()))  # of which torch keeps an absolute eps
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for loss in (
        regfast.cross_entropy(x, target, reduction="none", loss_dtype=torch.float64),
        -regfast.log_softmax(x.double() if dtype == torch.float64 else x.float(), 1)[:, classes // 2],
    ):
        assert ((loss - true).abs() <= 8 * eps * true).all()
