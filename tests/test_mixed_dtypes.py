"""Weights, probabilities and scales in other types than the logits', with autocast and without: torch's dtypes and
refusals, nothing rounded on the way to the sums, and our kernels where torch takes them."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from util import DTYPES, HALF, class_targets, probability_targets, spiky

import regfast
from regfast import reference

CLASSES = 9
# Numbers that a half type rounds to 0 or to infinity, as far as a type has them.
RANGE = torch.tensor([1e-8, 1e5, 1.0, 0.3, 1e-6, 7e4, 1 / 3, 2.0, 1e3], dtype=torch.float64)


def weights(dtype):
    return (RANGE.clamp(6e-8, 6e4) if dtype == torch.float16 else RANGE).to(dtype)


class Ops(TorchDispatchMode):
    """Collects the names of our ops that run; the composite's are torch's."""

    def __init__(self):
        super().__init__()
        self.ran = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "regfast":
            self.ran.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def outcome(fn, leaves, context):
    """A loss with the gradients of its leaves, or the type of what is raised."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    try:
        with context():
            loss = fn(*leaves)
    except Exception as error:
        return type(error)
    seed = torch.linspace(-0.001, 0.002, loss.numel(), dtype=torch.float64).view(loss.shape)  # for float16's range
    return [loss, *torch.autograd.grad(loss, leaves, seed.to(loss.dtype))]


def assert_near(got, exact, precision):
    """Up to a few roundings to a type, which may have no number as large as the exact one."""
    exact = exact.to(got.dtype).double()
    eps, size = torch.finfo(precision).eps, exact.where(exact.isfinite(), 0).abs().max().item()
    torch.testing.assert_close(got.double(), exact, rtol=64 * eps, atol=64 * eps * size)


def compare(ours, theirs, exact, leaves, context, lower=None):
    """Acceptance and dtypes are torch's; values are those of float64 for the very numbers that were given."""
    with Ops() as ops:
        got = outcome(ours, leaves, context)
    true = outcome(theirs, leaves, context)
    if isinstance(true, type):
        assert got is true, f"ours {got}, torch raises {true}"
        return False
    assert not isinstance(got, type), f"ours {got}, torch takes it"
    assert any(name.endswith(("forward", "forward_backward")) for name in ops.ran), "no kernel of ours ran"
    # Autocast rounds operands of products alone.
    rounded = [leaf.to(lower) if lower and leaf.dtype != torch.float64 else leaf for leaf in leaves]
    wanted = outcome(exact, [leaf.double() for leaf in rounded], contextlib.nullcontext)
    for a, b, c in zip(got, true, wanted, strict=True):
        assert a.dtype == b.dtype
        assert_near(a, c, lower if lower and a is not got[0] and a.dtype != torch.float64 else a.dtype)
    return True


contexts = pytest.mark.parametrize("half", [None, *HALF], ids=str)
given = pytest.mark.parametrize("logits", DTYPES, ids=str)
each_weight = pytest.mark.parametrize("weight", [None, *DTYPES], ids=str)
modes = pytest.mark.parametrize("mode", ["none", "mean", "sum"])


def autocast(half):
    return contextlib.nullcontext if half is None else lambda: torch.autocast("cpu", dtype=half)


def losses(c, target=None, **options):
    """Ours, torch's, and torch's with the same weights in float64; of logits and a target, which may be fixed."""
    fixed = () if target is None else (target,)
    wide = None if c is None else c.double()
    return [
        lambda x, *t: regfast.cross_entropy(x, *t, *fixed, c, **options),
        lambda x, *t: F.cross_entropy(x, *t, *fixed, c, **options),
        lambda x, *t: F.cross_entropy(x, *t, *fixed, wide, **options),
    ]


@contexts
@given
@each_weight
@modes
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(half, logits, weight, mode, smoothing):
    x = spiky(12, CLASSES, dtype=logits)
    c = None if weight is None else weights(weight)
    options = {"reduction": mode, "label_smoothing": smoothing}
    compare(*losses(c, class_targets((12,), CLASSES, 0.2), **options), [x], autocast(half))
    for dtype in DTYPES:
        t = probability_targets(12, CLASSES, dtype=dtype)
        assert compare(*losses(c, **options), [x, t], autocast(half))


def linear_losses(c, t, mode):
    wide = None if c is None else c.double()
    exact = t.double() if t.is_floating_point() else t
    return [
        lambda x, w, b: regfast.linear_cross_entropy(x, w, t, linear_bias=b, weight=c, reduction=mode),
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), t, c, reduction=mode),
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), exact, wide, reduction=mode),
    ]


@contexts
@given
@each_weight
@modes
def test_linear_cross_entropy(half, logits, weight, mode):
    leaves = [spiky(40, 7, dtype=logits), (spiky(CLASSES, 7, size=1) / 3).to(logits), spiky(CLASSES, size=1).to(logits)]
    c = None if weight is None else weights(weight)
    lower = half if logits != torch.float64 else None
    compare(*linear_losses(c, class_targets((40,), CLASSES, 0.2), mode), leaves, autocast(half), lower)
    for dtype in DTYPES:
        t = probability_targets(40, CLASSES, dtype=dtype)
        assert compare(*linear_losses(c, t, mode), leaves, autocast(half), lower)


@contexts
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_other_outputs_have_the_logits_type(half, op):
    # A wider target or weight makes the loss wider, and nothing else.
    for logits, target, weight in itertools.product(DTYPES, DTYPES, (None, torch.float32, torch.float64)):
        x, t = spiky(12, CLASSES, dtype=logits), probability_targets(12, CLASSES, dtype=target)
        c = None if weight is None else weights(weight)
        names = ("argmax", "lse", "logprob", "entropy", "loss")
        with autocast(half)():
            if op == "cross_entropy":
                out = regfast.cross_entropy(x, t, c, outputs=names)
                loss = F.cross_entropy(x, t, c)
            else:
                out = regfast.linear_cross_entropy(x, torch.eye(CLASSES, dtype=logits), t, weight=c, outputs=names)
                loss = F.cross_entropy(F.linear(x, torch.eye(CLASSES, dtype=logits)), t, c)
        row = torch.float32 if half and logits != torch.float64 else logits
        assert out.loss.dtype == out.logprob.dtype == loss.dtype
        assert out.lse.dtype == out.entropy.dtype == row and out.argmax.dtype == torch.int64
        exact = x.to(half).double() if half and logits != torch.float64 and op != "cross_entropy" else x.double()
        torch.testing.assert_close(out.lse.double(), exact.logsumexp(1), rtol=torch.finfo(row).eps, atol=1e-6)
        assert torch.equal(out.argmax, exact.argmax(1))


def likelihood(module, family, x, w, b, y, scale, sample_weight):
    if family == "squared":
        return module.linear_mse_loss(x, w, y, b, sample_weight=sample_weight)
    extra = {"gaussian": {"sigma": scale}, "bernoulli": {"pos_weight": scale}}.get(family, {})
    return module.linear_nll(x, w, y, b, family=family, sample_weight=sample_weight, **extra)


@contexts
@given
@pytest.mark.parametrize("family", ["squared", "gaussian", "bernoulli", "poisson"])
def test_linear_nll(half, logits, family):
    x, w, b = spiky(40, 7, dtype=logits, size=1), (spiky(3, 7, size=1) / 9).to(logits), spiky(3, size=1).to(logits)
    y = torch.rand(40, 3)
    lower = half if half and logits != torch.float64 else None
    for scale, sample, target in itertools.product((None, *DTYPES), (None, *DTYPES), DTYPES):
        s = None if scale is None else torch.tensor([0.3, 0.05, 70.0]).to(scale)
        c = None if sample is None else weights(sample).repeat(5)[:40]
        if scale is not None and family in ("squared", "poisson"):
            continue

        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        with autocast(half)(), Ops() as ops:
            loss = likelihood(regfast, family, *leaves, y.to(target), s, c)
        assert ops.ran & {"linear_nll_forward", "linear_nll_forward_backward"}
        promoted = torch.promote_types(torch.float32 if lower else logits, target)
        assert loss.dtype == promoted
        grads = torch.autograd.grad(loss, leaves)
        doubles = [t.to(lower or t.dtype).double().requires_grad_() for t in (x, w, b)]
        wide = [None if t is None else t.double() for t in (s, c)]
        exact = likelihood(reference, family, *doubles, y.to(target).double(), *wide)
        for a, e in zip((loss, *grads), (exact, *torch.autograd.grad(exact, doubles)), strict=True):
            assert_near(a, e, lower if lower and a is not loss else a.dtype)


def test_integers_are_no_weights_of_a_likelihood():
    x, w, y = spiky(6, 4), spiky(3, 4), spiky(6, 3)
    for name, family, size in (("sample_weight", "poisson", 6), ("pos_weight", "bernoulli", 3)):
        with pytest.raises(RuntimeError, match=rf"regfast\.linear_nll: {name}: expected a floating point type, got"):
            regfast.linear_nll(x, w, y, family=family, **{name: torch.ones(size).long()})


@contexts
def test_composites_round_nothing_either(half):
    # Second derivatives of the same calls: the composite's forward starts from the same numbers.
    for weight in (torch.float32, half or torch.float32):
        x, c, t = spiky(12, CLASSES).requires_grad_(), weights(weight), class_targets((12,), CLASSES)
        results = []
        for fn, logits, factor in ((regfast.cross_entropy, x, c), (F.cross_entropy, x.double(), c.double())):
            with autocast(half if fn is regfast.cross_entropy else None)():
                loss = fn(logits, t, factor)
            (first,) = torch.autograd.grad(loss, x, create_graph=True)
            results.append((loss.double(), first, torch.autograd.grad(first.square().sum(), x)[0]))
        for ours, true in zip(*results, strict=True):
            torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-6)
    if half is not None:
        x = x.detach().to(half)
        with autocast(half)():
            loss = torch.func.vmap(lambda x, t: regfast.cross_entropy(x, t, weights(torch.float32)))(x, t)
            once = regfast.cross_entropy(x, t, weights(torch.float32), reduction="none") / weights(torch.float32)[t]
        torch.testing.assert_close(loss.float(), once, rtol=0.02, atol=0.02)
