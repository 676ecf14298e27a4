"""Tensors that no strides describe: ours take and refuse what torch's own operators do, with the same results."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from util import class_targets, probability_targets, spiky

import regfast

MAKE = {
    "coo": lambda t: t.to_sparse(),
    "csr": lambda t: t.to_sparse_csr(),
    "csc": lambda t: t.to_sparse_csc(),
    "bsr": lambda t: t.to_sparse_bsr((1, 1)),
    "mkldnn": lambda t: t.to_mkldnn(),
    "jagged": lambda t: torch.nested.nested_tensor(list(t.split(2)), layout=torch.jagged),
    "nested": lambda t: torch.nested.nested_tensor(list(t.split(2)), layout=torch.strided),
    "masked": lambda t: torch.masked.masked_tensor(t, t > t.double().mean()),
}
X, W, B, Y = spiky(6, 4), spiky(4, 4), spiky(4), spiky(6, 4)
RAGGED = [spiky(3, 4), spiky(5, 4)]
T, P, C = class_targets((6,), 4), probability_targets(6, 4), torch.rand(4) + 0.1
# Ours, torch's, and their tensors, each of which comes in each layout.
CALLS = {
    "linear": (regfast.linear, F.linear, (X, W, B)),
    "linear without bias": (regfast.linear, F.linear, (X, W)),
    "linear relu": (
        lambda *t: regfast.linear(*t, activation="relu"),
        lambda *t: F.relu(F.linear(*t)),
        (X, W, B),
    ),
    "softmax": (lambda x: regfast.softmax(x, -1), lambda x: torch.softmax(x, -1), (X,)),
    "log_softmax": (lambda x: regfast.log_softmax(x, -1), lambda x: torch.log_softmax(x, -1), (X,)),
    "softmax of a dtype": (
        lambda x: regfast.softmax(x, -1, torch.float64),
        lambda x: torch.softmax(x, -1, torch.float64),
        (X,),
    ),
    "logsumexp": (lambda x: regfast.logsumexp(x, -1), lambda x: torch.logsumexp(x, -1), (X,)),
    "logsumexp of all": (lambda x: regfast.logsumexp(x, (0, 1)), lambda x: torch.logsumexp(x, (0, 1)), (X,)),
    "cross_entropy": (regfast.cross_entropy, F.cross_entropy, (X, T, C)),
    "cross_entropy of probabilities": (regfast.cross_entropy, F.cross_entropy, (X, P, C)),
    "mse_loss": (regfast.mse_loss, F.mse_loss, (X, Y)),
    "mse_loss weighted": (
        lambda x, y, c: regfast.mse_loss(x, y, weight=c),
        lambda x, y, c: F.mse_loss(x, y, weight=c),
        (X, Y, Y.abs()),
    ),
    "linear_cross_entropy": (
        lambda x, w, t, b, c: regfast.linear_cross_entropy(x, w, t, linear_bias=b, weight=c),
        lambda x, w, t, b, c: F.cross_entropy(F.linear(x, w, b), t, c),
        (X, W, T, B, C),
    ),
    "linear_mse_loss": (
        lambda x, w, y, b: regfast.linear_mse_loss(x, w, y, b),
        lambda x, w, y, b: F.mse_loss(F.linear(x, w, b), y),
        (X, W, Y, B),
    ),
    "linear_nll": (
        lambda x, w, y, b, c: regfast.linear_nll(x, w, y, b, family="bernoulli", pos_weight=c),
        lambda x, w, y, b, c: F.binary_cross_entropy_with_logits(F.linear(x, w, b), y, pos_weight=c),
        (X, W, P, B, C),
    ),
    "phm_linear": (
        regfast.phm_linear,
        lambda x, a, s, b: F.linear(x, torch.einsum("mup,mvr->uvpr", a, s).reshape(4, 4), b),
        (X, spiky(2, 2, 2), spiky(2, 2, 2), B),
    ),
}


# Class weights have no gradient.
FROZEN = {"cross_entropy": 2, "cross_entropy of probabilities": 2, "linear_cross_entropy": 4}
# What has no namesake of one call is written in other operators, which may take more than the parts it is compared to.
FUSED = ("linear_cross_entropy", "linear_mse_loss", "linear_nll", "phm_linear")


def plain(t):
    """A tensor's numbers, in a strided one."""
    if type(t).__name__ == "MaskedTensor":
        return torch.where(t.get_mask(), t.get_data(), 0)
    if t.is_nested:
        return torch.cat([part.flatten() for part in t.unbind()])
    return t.to_dense() if t.layout != torch.strided else t


def outcome(fn, tensors, mode, frozen=None):
    """A call's result, or what it raises; and the gradients, or what computing them raises."""
    leaves = list(tensors)
    if mode == "grad":
        floating = [t.is_floating_point() and place != frozen for place, t in enumerate(tensors)]
        leaves = [t.detach().clone().requires_grad_() if leaf else t for t, leaf in zip(tensors, floating, strict=True)]
    try:
        with {"grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]():
            out = fn(*leaves)
    except Exception as error:
        return error, None
    if mode != "grad":
        return out, None
    try:
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return out, torch.autograd.grad(plain(out).square().sum(), wanted, allow_unused=True)
    except Exception as error:
        return out, error


def assert_alike(got, true, what):
    if isinstance(true, Exception):
        assert type(got) is type(true), what
        return
    assert not isinstance(got, Exception), what
    if true is not None:
        assert got.layout == true.layout and got.dtype == true.dtype and got.is_nested == true.is_nested, what
        assert type(got) is type(true), what
        torch.testing.assert_close(plain(got), plain(true))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", MAKE)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
def test_as_torch_takes_or_refuses_them(name, layout, mode):
    ours, theirs, tensors = CALLS[name]
    if mode == "inference" and layout in ("jagged", "masked"):
        pytest.skip("without autograd's keys a subclass is asked before any op of ours, and these know torch's alone")
    for place in range(len(tensors)):
        try:
            odd = MAKE[layout](tensors[place])
            given = [odd if i == place else t for i, t in enumerate(tensors)]
            outcome(lambda *t: t[0].sum(), given, mode)
        except Exception:
            continue  # torch has no such tensor
        got, grads = outcome(ours, given, mode, FROZEN.get(name))
        true, true_grads = outcome(theirs, given, mode, FROZEN.get(name))
        if isinstance(true, Exception) and (name in FUSED or (mode == "inference" and layout == "nested")):
            assert name in FUSED or isinstance(got, Exception)
            continue
        what = f"argument {place}: ours {got!r}, torch {true!r}, gradients {grads!r} and {true_grads!r}"
        assert_alike(got, true, what)
        if not isinstance(true_grads, tuple):
            continue  # torch takes it, and has no derivative
        for a, b in zip(grads, true_grads, strict=True):
            assert_alike(a, b, what)


def test_what_is_taken():
    # The test above says nothing where torch refuses; here are the calls that people make.
    module = regfast.Linear(4, 3)
    for layout in ("coo", "csr"):
        x = torch.relu(X)
        module.zero_grad()
        F.cross_entropy(module(MAKE[layout](x)), class_targets((6,), 3)).backward()
        assert module.weight.grad.shape == (3, 4)
        torch.testing.assert_close(module(MAKE[layout](x)), module(x))
    for layout in (torch.jagged, torch.strided):
        x = torch.nested.nested_tensor(RAGGED, layout=layout, requires_grad=True)
        for ours, plain_one in ((module, F.linear), (lambda x: regfast.softmax(x, -1), None)):
            got = ours(x)
            assert got.is_nested and got.layout == layout
            for part, rows in zip(got.unbind(), RAGGED, strict=True):
                wanted = rows.softmax(-1) if plain_one is None else F.linear(rows, module.weight, module.bias)
                torch.testing.assert_close(part, wanted)
    masked = torch.masked.masked_tensor(X, X > 0)
    got, true = regfast.softmax(masked, -1), F.softmax(masked, -1)
    assert type(got) is type(true)
    torch.testing.assert_close(plain(got), plain(true))


class Scaled(torch.Tensor):
    """A subclass that knows torch's operators alone: a weight that stands for its elements times two."""

    @staticmethod
    def __new__(cls, elements):
        return torch.Tensor._make_wrapper_subclass(cls, elements.shape, dtype=elements.dtype)

    def __init__(self, elements):
        self.elements = elements

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.namespace == "aten", func
        unwrapped = [a.elements * 2 if isinstance(a, Scaled) else a for a in args]
        return func(*unwrapped, **(kwargs or {}))


@pytest.mark.parametrize("name", ["linear", "linear relu", "softmax", "logsumexp", "cross_entropy", "mse_loss"])
def test_subclasses_get_torchs_operators(name):
    ours, theirs, tensors = CALLS[name]
    for place, t in enumerate(tensors):
        if t.is_floating_point():
            odd = [Scaled(a) if i == place else a for i, a in enumerate(tensors)]
            doubled = [a * 2 if i == place else a for i, a in enumerate(tensors)]
            torch.testing.assert_close(ours(*odd), theirs(*doubled))
