"""Infinities, NaN, the largest numbers and very many terms: what comes out is what torch has, or the limit where torch
has 0 * inf, and every sum is as exact as a sum of a few terms."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS
from torch import Tensor
from util import HALF, INF, NAN, spiky, with_all_kernels

import regfast
from regfast import reference

FAR = (200.0, 800.0, 6e4, 1e19, 3e38, INF)


# Activations


@with_all_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_their_slopes_at_both_ends(activation, dtype):
    # The limits, which torch's gelu and silu miss at infinity: -inf * 0 and inf * 0 are NaN there.
    ends = {"none": (1, 1), "relu": (0, 1), "sigmoid": (0, 0), "tanh": (0, 0)}.get(activation, (0, 1))
    for far, sign in itertools.product(FAR, (0, 1)):
        x = torch.tensor([[far if sign else -far]], dtype=dtype).requires_grad_()
        y = regfast.linear(x, torch.ones(1, 1, dtype=dtype), activation=activation)
        (slope,) = torch.autograd.grad(y, x, torch.full_like(y, 1.5))
        tail = dtype == torch.float64 and far == 200  # of exp, which float64 still has
        assert abs(slope.item() - 1.5 * ends[sign]) <= (1e-60 if tail else 0), (far, sign)
        if x.isfinite() and not tail:
            expected = {"none": x, "sigmoid": torch.full_like(x, sign), "tanh": x.sign()}.get(activation, F.relu(x))
            assert torch.equal(y, expected), (far, sign)


@with_all_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_passes_activations_in_both_directions(activation, dtype):
    x = torch.tensor([[NAN], [1.0]], dtype=dtype).requires_grad_()
    y = regfast.linear(x, torch.ones(1, 1, dtype=dtype), activation=activation)
    assert y.isnan().flatten().tolist() == [True, False]
    (slope,) = torch.autograd.grad(y, x, torch.full_like(y, 3), retain_graph=True)
    assert slope[0].item() == 3 if activation in ("none", "relu") else slope[0].isnan()
    (slope,) = torch.autograd.grad(y, x, torch.full_like(y, NAN))
    assert slope.isnan().all()


@with_all_kernels
def test_relu_chooses_what_it_passes(dtype):
    # As torch's threshold_backward: the gradient where the output is NaN, 0 where it is 0, whatever the gradient is.
    x = torch.tensor([NAN, 0.0, -0.0, -1.0, 1.0, INF, -INF], dtype=dtype)[:, None]
    for upstream in (2.0, INF, NAN):
        slopes = []
        for f in (lambda x: regfast.linear(x, torch.ones_like(x[:1]), activation="relu"), F.relu):
            leaf = x.clone().requires_grad_()
            slopes += torch.autograd.grad(f(leaf), leaf, torch.full_like(x, upstream))
        torch.testing.assert_close(*slopes, rtol=0, atol=0, equal_nan=True)


# Rows of logits


def poison(row: Tensor, kind: str, at: int) -> None:
    """Makes a row of logits hostile; `at` is the target's class."""
    other = (at + 1) % len(row)
    most = torch.finfo(row.dtype).max
    match kind:
        case "a masked class":
            row[other] = -INF
        case "a masked target":
            row[at] = -INF
        case "inf":
            row[other] = INF
        case "inf at the target":
            row[at] = INF
        case "nan":
            row[other] = NAN
        case "both infinities":
            row[other], row[at] = INF, -INF
        case "inf and nan":
            row[other], row[at] = INF, NAN
        case "nothing":
            row[:] = -INF
        case "all inf":
            row[:] = INF
        case "the largest number":
            row[other] = most
        case "the least number":
            row[other] = -most


KINDS = (
    "a masked class",
    "a masked target",
    "inf",
    "inf at the target",
    "nan",
    "both infinities",
    "inf and nan",
    "nothing",
    "all inf",
    "the largest number",
    "the least number",
)
VALUES = ("loss", "lse", "entropy", "logprob")


def pattern(t: Tensor) -> Tensor:
    """0 where finite, the infinity or NaN elsewhere."""
    return torch.where(t.isfinite(), 0, t.detach()).double()


def assert_same_pattern(ours: Tensor, theirs: Tensor, what: object) -> None:
    torch.testing.assert_close(pattern(ours), pattern(theirs), rtol=0, atol=0, equal_nan=True, msg=str(what))


def outputs_and_gradients(f, leaves):
    """By name: each output of f, and each leaf's gradient of each of them alone."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    values = f(*leaves)
    results = dict(zip((*VALUES, "argmax"), values, strict=True))
    for name, value in zip(VALUES, values, strict=False):
        grads = torch.autograd.grad(value.sum(), leaves, retain_graph=True, materialize_grads=True)
        results |= {(name, i): g for i, g in enumerate(grads)}
    return results


@with_all_kernels
@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("kind", KINDS)
def test_patterns_of_cross_entropy(kind, layout, probabilities, dtype, kernels):
    # Each width and each option, paired in another way for the next kind.
    every = ({}, {"label_smoothing": 0.1}, {"logit_scale": 0.5})
    for i, v in enumerate((5, 40, 2500)):
        options = every[(i + KINDS.index(kind)) % 3]
        target = torch.randint(v, (3,))
        x = spiky(3, v, dtype=dtype)
        for r in (1, 2):
            poison(x[r], kind, target[r])
        x = x.T.contiguous().T if layout == "columns" else x
        leaves = [x, torch.softmax(spiky(3, v), 1).to(dtype)] if probabilities else [x]
        mine, theirs = (
            outputs_and_gradients(
                lambda x, t=target, f=f, o=options: f(x, t, reduction="none", outputs=(*VALUES, "argmax"), **o), leaves
            )
            for f in (regfast.cross_entropy, reference.cross_entropy)
        )
        assert torch.equal(mine["argmax"], theirs["argmax"])
        for name in mine:
            # Near the largest number the one or the other rounding may reach infinity, as sums of the logits do that
            # the CUDA kernels keep in float32 for a smoothed loss.
            smoothed = name == "loss" and "label_smoothing" in options and kernels != "cpu"
            if kind not in ("the largest number", "the least number") or not (name[0] == "loss" or smoothed):
                assert_same_pattern(mine[name], theirs[name], (v, options, name))


@with_all_kernels
@pytest.mark.parametrize("kind", [k for k in KINDS if "number" not in k])
@pytest.mark.parametrize("where", ["input", "weight", "bias"])
def test_patterns_of_linear_cross_entropy(where, kind, dtype):
    for v, d in ((5, 3), (70, 33)):
        target = torch.randint(v, (4,))
        leaves = [spiky(4, d, dtype=dtype), spiky(v, d, dtype=dtype), spiky(v, dtype=dtype)]
        if where == "input":
            poison(leaves[0][1], kind, 0)
        elif where == "weight":
            poison(leaves[1][:, 0], kind, target[1])
        else:
            poison(leaves[2], kind, target[1])

        def run(f, x, w, b, target=target):
            return f(x, w, target, linear_bias=b, reduction="none", outputs=(*VALUES, "argmax"))

        mine, theirs = (
            outputs_and_gradients(lambda *leaves, f=f: run(f, *leaves), leaves)
            for f in (regfast.linear_cross_entropy, reference.linear_cross_entropy)
        )
        assert torch.equal(mine["argmax"], theirs["argmax"])
        for name in mine:
            assert_same_pattern(mine[name], theirs[name], (v, name))


@with_all_kernels
def test_the_gradient_of_lse_of_an_infinite_row():
    # exp(x - lse): 0 beside the infinite logit, NaN at it; NaN everywhere if there is one in the row.
    x = torch.tensor([[0.0, INF, 1.0], [NAN, INF, 1.0], [0.0, 2.0, -INF]]).requires_grad_()
    lse = regfast.cross_entropy(x, torch.zeros(3, dtype=torch.int64), outputs="lse", reduction="none")
    assert lse[0] == INF and lse[1].isnan()
    (dx,) = torch.autograd.grad(lse.sum(), x)
    expected = torch.softmax(x.detach()[2], 0)
    torch.testing.assert_close(
        dx, torch.stack([torch.tensor([0, NAN, 0]), torch.full((3,), NAN), expected]), equal_nan=True
    )


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_argmax_of_logits_beyond_a_half_types_range(dtype):
    # The logits are float32 inside: the largest is named, where a half type's product has several infinities.
    most = torch.finfo(dtype).max / 2
    w = torch.tensor([[0.0], [most], [-1.0], [most / 2]]).to(dtype)
    x = torch.tensor([[64.0], [-64.0]] if dtype == torch.float16 else [[1.0], [-1.0]], dtype=dtype)
    got = regfast.linear_cross_entropy(
        x, w.flip(0), torch.zeros(2, dtype=torch.int64), outputs="argmax", reduction="none"
    )
    assert got.tolist() == [2, 1]


# Sums of many terms

COUNTS = (1000, 65535, 300000)


def off_by(value: Tensor, exact: float) -> float:
    """Epsilons of the value's dtype."""
    return abs(value.double().item() - exact) / abs(exact) / torch.finfo(value.dtype).eps


@with_all_kernels
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_of_equal_terms(count, dtype, kernels):
    # Each addition of equal terms may err to the same side, so that a plain sum's error grows with their number.
    row = torch.tensor([[0.1, 0.7, -0.3, 0.2, 1.3]], dtype=dtype)
    target = torch.zeros(count, dtype=torch.int64)
    if count > 65535 and kernels.startswith("cuda_on_host"):
        pytest.skip("takes half a minute where the CPU plays the GPU")
    for v in (5, 50):  # a mean is the sum, divided
        x = row.repeat(1, v // 5).expand(count, v)
        one = F.cross_entropy(x[:1].double(), target[:1]).item()
        for mode, factor in (("mean", 1), ("sum", count))[v // 50 :]:
            assert off_by(regfast.cross_entropy(x, target, reduction=mode), factor * one) < 6
    tenth = torch.tensor(0.1, dtype=dtype)
    exact = tenth.double().item()
    x, w = torch.zeros(count, 2, dtype=dtype), torch.zeros(3, 2, dtype=dtype)
    for mode, factor in (("mean", 1), ("sum", count)):
        ones = tenth.expand(count), torch.zeros(count, dtype=dtype)
        assert off_by(regfast.mse_loss(*ones, reduction=mode), factor * exact**2) < 6
    for activation, slope in (("none", 1.0), ("silu", 0.5)):
        b = torch.zeros(3, dtype=dtype, requires_grad=True)
        y = regfast.linear(x, w, b, activation=activation)
        (db,) = torch.autograd.grad(y, b, tenth.expand(count, 3).contiguous())
        assert max(off_by(d, slope * count * exact) for d in db) < 6


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("budget", [None, 1 << 18])
def test_sums_of_equal_rows_over_chunks(count, budget, dtype):
    x = torch.tensor([[0.1, 0.7, -0.3]], dtype=dtype).expand(count, 3).contiguous()
    w, b = torch.eye(5, 3, dtype=dtype), torch.zeros(5, dtype=dtype, requires_grad=True)
    target = torch.zeros(count, dtype=torch.int64)
    loss = regfast.linear_cross_entropy(x, w, target, linear_bias=b, reduction="sum", memory_budget=budget)
    (db,) = torch.autograd.grad(loss, b)
    logits = F.linear(x[:1].double(), w.double()).requires_grad_()
    one = F.cross_entropy(logits, target[:1])
    (slope,) = torch.autograd.grad(one, logits)
    assert off_by(loss, count * one.item()) < 6
    assert max(off_by(d, count * s.item()) for d, s in zip(db, slope[0], strict=True)) < 12


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("outputs", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_of_equal_likelihoods(count, outputs, dtype):
    x, w = torch.zeros(count, 2, dtype=dtype), torch.zeros(outputs, 2, dtype=dtype)
    b = torch.zeros(outputs, dtype=dtype, requires_grad=True)
    y = torch.full((1, 1), 0.1, dtype=dtype)
    exact = y.double().item()
    y = y.expand(count, outputs).contiguous()
    loss = regfast.linear_nll(x, w, y, b, family="gaussian", full=False, reduction="sum")
    (db,) = torch.autograd.grad(loss, b)
    assert off_by(loss, count * outputs * exact**2 / 2) < 6
    assert max(off_by(d, -count * exact) for d in db) < 6
    weighted = regfast.linear_nll(
        x, w, torch.ones_like(y), b, family="gaussian", full=False, sample_weight=y[:, 0].contiguous()
    )
    assert off_by(weighted, 0.5) < 6


# Likelihoods at the edges of their domains


@pytest.mark.parametrize("outputs", [1, 20])
def test_poisson_targets_at_the_edge(outputs):
    # Stirling's term ends at 1, and with it its derivative; torch's is NaN at 0, where log(y) ends too.
    for y, slope in ((0.0, 0.0), (1.0, 0.0), (-1.0, 0.0), (1.5, math.log(1.5) + 1 / 3), (INF, NAN), (NAN, NAN)):
        target = torch.full((1, outputs), y, requires_grad=True)
        x, w = torch.ones(1, 1), torch.full((outputs, 1), 2.0, requires_grad=True)
        loss = regfast.linear_nll(x, w, target, family="poisson", full=True, reduction="none")
        (dy,) = torch.autograd.grad(loss.sum(), target)
        torch.testing.assert_close(dy, torch.full((1, outputs), slope - 2.0), equal_nan=True)
        alone = regfast.linear_nll(x, w, target.detach(), family="poisson", full=True, reduction="none")
        torch.testing.assert_close(alone, loss, equal_nan=True)


@pytest.mark.parametrize("outputs", [1, 20])
@pytest.mark.parametrize("differentiable", [False, True])
def test_gaussians_of_any_width(outputs, differentiable, dtype):
    # An infinite variance is one: no residual counts. A number is not bounded by the predictions' dtype.
    x, w = torch.ones(3, 1, dtype=dtype), torch.ones(outputs, 1, dtype=dtype, requires_grad=True)
    y = torch.zeros(3, outputs, dtype=dtype, requires_grad=differentiable)
    loss = regfast.linear_nll(x, w, y, family="gaussian", sigma=1e25, reduction="none")
    (dw,) = torch.autograd.grad(loss.sum(), w)
    expected = 25 * math.log(10) + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(loss, torch.full_like(loss, expected))
    assert (dw.double().abs() < 1e-45).all()
    sigma = torch.full((outputs,), INF, dtype=dtype, requires_grad=differentiable)
    loss = regfast.linear_nll(x, w, y, family="gaussian", sigma=sigma, reduction="none")
    (dw,) = torch.autograd.grad(loss.sum(), w)
    assert (loss == INF).all() and (dw == 0).all()


def test_a_large_gradient_of_the_entropy_beside_an_impossible_class(device):
    """p log p is zero there, whatever it is multiplied by."""
    for classes in (2, 200):
        x = torch.randn(3, classes, device=device)
        x[:, 1] = -INF
        x.requires_grad_()
        entropy = regfast.cross_entropy(x, torch.zeros(3, dtype=torch.long, device=device), outputs="entropy")
        (grad,) = torch.autograd.grad(entropy, x, torch.full((3,), 1e36, device=device))
        assert grad.isfinite().all() and not grad[:, 1].any()
