"""torch.library.opcheck on every registered op: schema, autograd registration, fake kernel, AOT dispatch."""

import itertools

import pytest
import torch
from torch.library import opcheck
from util import DTYPES, class_targets, lay_out, probability_targets, spiky

import regfast

ops = torch.ops.regfast
LOSS, LSE, ENTROPY, LOGPROB, ARGMAX = (1 << bit for bit in range(5))
ACTIVATIONS = regfast._C.ACTIVATIONS
gradients = pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
# Each activation with a dtype, and each dtype with an activation: what is checked does not depend on both at once.
activations = pytest.mark.parametrize(
    "activation, dtype", [(name, DTYPES[i % len(DTYPES)]) for i, name in enumerate(ACTIVATIONS)]
)


def cross_entropy_arguments(target, weight, mode, outputs, loss_dtype, softcap=None):
    """input to logit_scale, then outputs, inplace_backward and loss_dtype."""
    return target, weight, -100, mode, 0.1, 0.2, softcap, None, outputs, False, loss_dtype


@gradients
@activations
def test_linear(activation, requires_grad, dtype):
    w, b = spiky(5, 7, dtype=dtype).requires_grad_(requires_grad), spiky(5, dtype=dtype).requires_grad_(requires_grad)
    for x, bias in ((spiky(4, 7, dtype=dtype), b), (lay_out(spiky(2, 3, 7, dtype=dtype), "strided"), None)):
        opcheck(ops.linear.default, (x.requires_grad_(requires_grad), w, bias, activation))


@gradients
@activations
def test_phm_linear(activation, requires_grad, dtype):
    a, s, b = (spiky(*shape, dtype=dtype).requires_grad_(requires_grad) for shape in ((2, 2, 2), (2, 5, 3), (10,)))
    for x, bias in ((spiky(4, 6, dtype=dtype), b), (lay_out(spiky(2, 3, 6, dtype=dtype), "strided"), None)):
        opcheck(ops.phm_linear.default, (x.requires_grad_(requires_grad), a, s, bias, activation))


def test_forward_and_backward_ops_of_phm_linear(dtype):
    tests = ("test_schema", "test_faketensor")
    x, a, b, z = (spiky(*shape, dtype=dtype) for shape in ((4, 6), (2, 2, 2), (10,), (4, 10)))
    s = spiky(2, 5, 3, dtype=dtype)
    for weights in (s, s.transpose(0, 1).contiguous().transpose(0, 1)):
        for activation, keep, mask in (
            ("none", False, [True] * 4),
            ("gelu", True, [True] * 4),
            ("relu", False, [False, False, True, False]),
        ):
            opcheck(ops.phm_linear_forward.default, (x, a, weights, b, activation, keep), test_utils=tests)
            saved = None if activation == "none" else z
            arguments = (spiky(4, 10, dtype=dtype), x, a, weights, saved, activation, mask)
            opcheck(ops.phm_linear_backward.default, arguments, test_utils=tests)


@gradients
@pytest.mark.parametrize("log", [False, True])
def test_softmax(log, requires_grad, dtype):
    for dim in (0, 1, -1):
        opcheck(ops.softmax.default, (spiky(3, 4, 5, dtype=dtype).requires_grad_(requires_grad), dim, log))


@gradients
@pytest.mark.parametrize("keepdim", [False, True])
def test_logsumexp(keepdim, requires_grad, dtype):
    for dim in (0, 1, -1):
        opcheck(ops.logsumexp.default, (spiky(3, 4, 5, dtype=dtype).requires_grad_(requires_grad), dim, keepdim))


@gradients
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_mse_loss(mode, requires_grad, dtype):
    x, y = (spiky(4, 5, dtype=dtype).requires_grad_(requires_grad) for _ in range(2))
    opcheck(ops.mse_loss.default, (x, y, mode))


@gradients
@pytest.mark.parametrize(
    "mode, outputs", list(itertools.product([0, 1, 2], [LOSS, LSE | ENTROPY | LOGPROB | ARGMAX, LOSS | ARGMAX]))
)
def test_cross_entropy(mode, outputs, requires_grad):
    x = spiky(4, 6, 3).requires_grad_(requires_grad)
    probabilities = probability_targets(4, 6, 3).requires_grad_(requires_grad)
    for target, weight, loss_dtype, softcap in (
        (class_targets((4, 3), 6, 0.2), None, None, None),
        (class_targets((4, 3), 6, 0.2), torch.rand(6), torch.float64, 5.0),
        (probabilities, torch.rand(6), None, 5.0),
    ):
        opcheck(
            ops.cross_entropy.default, (x, *cross_entropy_arguments(target, weight, mode, outputs, loss_dtype, softcap))
        )


@gradients
@pytest.mark.parametrize("mode, outputs", [(0, LOSS), (1, LOSS), (1, LOSS | ARGMAX), (0, 31)])
def test_linear_cross_entropy(mode, outputs, requires_grad):
    x, w, b = (spiky(*shape).requires_grad_(requires_grad) for shape in ((20, 4), (6, 2, 4), (6, 2)))
    options = (-100, mode, 0.1, 0.2, None, 0.7, outputs, 1, 0.0, None)
    target = class_targets((20, 2), 6, 0.2)
    opcheck(ops.linear_cross_entropy.default, (x, w, target, b, torch.rand(6), *options))
    target = probability_targets(20, 6, 2).requires_grad_(requires_grad)
    opcheck(ops.linear_cross_entropy.default, (x, w, target, None, None, *options))


# family, the gaussian's variance, full, reduction
NLL_OPTIONS = [(0, 1.0, False, 1), (1, 0.5, True, 0), (1, 1.0, False, 2), (2, 1.0, False, 1), (3, 1.0, True, 1)]


def nll_arguments(family, dtype=torch.float32, requires_grad=False):
    """input to sample_weight; a gaussian's variance is learned."""
    x, w, b = (spiky(*shape, dtype=dtype).requires_grad_(requires_grad) for shape in ((2, 10, 4), (6, 4), (6,)))
    target, weights = torch.rand(2, 10, 6).to(dtype), torch.rand(2, 10).to(dtype)
    scale = (
        None if family in (0, 3) else torch.rand(6).to(dtype).add_(0.5).requires_grad_(requires_grad and family == 1)
    )
    return x, w, target, b, scale, weights


@gradients
@pytest.mark.parametrize("options", NLL_OPTIONS, ids=str)
def test_linear_nll(options, requires_grad):
    x, w, target, b, scale, weights = nll_arguments(options[0], requires_grad=requires_grad)
    opcheck(ops.linear_nll.default, (x, w, target, b, scale, weights, *options, None))
    opcheck(ops.linear_nll.default, (x, w, target, None, scale, None, *options, torch.float64))
    opcheck(ops.linear_nll.default, (x[0, 0], w, target[0, 0].long(), None, None, None, *options, None))


def test_forward_and_backward_ops():
    # What the autograd functions call: without gradients of their own, so the registration of autograd is not asked.
    tests = ("test_schema", "test_faketensor")
    x, w, b, z = spiky(4, 7), spiky(5, 7), spiky(5), spiky(4, 5)
    for activation, keep, mask in (
        ("none", False, [True] * 3),
        ("gelu", True, [True] * 3),
        ("relu", False, [False, True, False]),
    ):
        opcheck(ops.linear_forward.default, (x, w, b, activation, keep), test_utils=tests)
        saved = None if activation == "none" else z
        opcheck(ops.linear_backward.default, (spiky(4, 5), x, w, saved, activation, mask), test_utils=tests)
    for log in (False, True):
        opcheck(ops.softmax_forward.default, (x, 1, log), test_utils=tests)
        opcheck(ops.softmax_backward.default, (spiky(4, 7), ops.softmax_forward(x, 1, log), 1, log), test_utils=tests)
    opcheck(ops.logsumexp_forward.default, (x, 1, True), test_utils=tests)
    opcheck(ops.logsumexp_backward.default, (spiky(4, 1), x, ops.logsumexp_forward(x, 1, True), 1), test_utils=tests)
    for mode, mask in itertools.product([0, 1, 2], [[True, False], [True, True]]):
        opcheck(ops.mse_loss_forward.default, (z, z * 2, mode), test_utils=tests)
        seed = spiky(4, 5) if mode == 0 else torch.tensor(1.5)
        opcheck(ops.mse_loss_backward.default, (seed, z, z * 2, mode, mask), test_utils=tests)


@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
def test_forward_and_backward_ops_of_cross_entropy(probabilities):
    tests = ("test_schema", "test_faketensor")
    x, weight = spiky(4, 6), torch.rand(6)
    target = probability_targets(4, 6) if probabilities else class_targets((4,), 6, 0.2)
    options = (-100, 1, 0.1, 0.2, None, 0.5)
    outputs = LOSS | LSE | ENTROPY | LOGPROB | ARGMAX
    arguments = (x, target, weight, *options, outputs, None)
    opcheck(ops.cross_entropy_forward.default, arguments, test_utils=tests)
    *_, stats, weight_sum = ops.cross_entropy_forward(*arguments)
    seeds = (torch.tensor(0.7), spiky(4), spiky(4), spiky(4))
    saved = (x, target, weight, stats, weight_sum, *options)
    opcheck(ops.cross_entropy_backward.default, (*seeds, *saved, [True, probabilities]), test_utils=tests)
    opcheck(ops.cross_entropy_backward_.default, (*seeds, *saved, probabilities), test_utils=tests)


@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
def test_forward_and_backward_ops_of_linear_cross_entropy(probabilities, dtype):
    tests = ("test_schema", "test_faketensor")
    x, w, b, weight = (
        spiky(20, 4, dtype=dtype),
        spiky(6, 4, dtype=dtype),
        spiky(6, dtype=dtype),
        torch.rand(6).to(dtype),
    )
    target = probability_targets(20, 6, dtype=dtype) if probabilities else class_targets((20,), 6, 0.2)
    saved = (x, w, target, b, weight, -100, 1, 0.1, 0.2, None, 0.5)
    opcheck(ops.linear_cross_entropy_forward.default, (*saved, 31, 1, None), test_utils=tests)
    seeds = (torch.tensor(0.7).to(dtype), *(spiky(20, dtype=dtype) for _ in range(3)))
    for mask in ([True, True, True], [False, True, False]):
        forward_backward = (*saved, True, 1, 1e-4, None, mask)
        opcheck(ops.linear_cross_entropy_forward_backward.default, forward_backward, test_utils=tests)
        backward = (*seeds, *saved, 1, 0.0, [*mask, probabilities])
        opcheck(ops.linear_cross_entropy_backward.default, backward, test_utils=tests)


@pytest.mark.parametrize("options", NLL_OPTIONS, ids=str)
def test_forward_and_backward_ops_of_linear_nll(options, dtype):
    tests = ("test_schema", "test_faketensor")
    arguments = (*nll_arguments(options[0], dtype), *options)
    opcheck(ops.linear_nll_forward.default, (*arguments, None), test_utils=tests)
    seed = spiky(2, 10, 6, dtype=dtype) if options[-1] == 0 else torch.tensor(0.7).to(dtype)
    learned = options[0] == 1
    for mask in ([True, True, True, learned], [False, True, False, False], [False, False, False, learned]):
        opcheck(ops.linear_nll_backward.default, (seed, *arguments, mask), test_utils=tests)
        if options[-1] != 0:
            opcheck(ops.linear_nll_forward_backward.default, (*arguments, None, mask), test_utils=tests)


@pytest.mark.no_kernels("names")
def test_the_maths_of_every_name_is_there():
    assert tuple(regfast.reference.ACTIVATIONS) == ACTIVATIONS
    assert regfast.reference.FAMILIES == regfast._C.FAMILIES
