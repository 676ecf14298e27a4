"""What cross_entropy has beyond torch: z_loss, softcap, logit_scale, outputs, loss_dtype, inplace_backward."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from util import (
    INF,
    LAYOUTS,
    assert_as_good,
    check,
    class_targets,
    lay_out,
    probability_targets,
    spiky,
    with_all_kernels,
)

import regfast
from regfast import reference

pytestmark = pytest.mark.kernels("cross_entropy")

NAMES = ("loss", "lse", "entropy", "logprob", "argmax")
FLOATING = NAMES[:-1]


def check_extra(x, target, weight=None, *, grads=None, **options):
    """torch has no such operator: plain torch operators in the same dtype stand for it."""
    rows = x.numel() // max(1, x.shape[1 if x.dim() > 1 else 0])
    only_mean = options.get("reduction", "mean") == "mean" and set(options.get("outputs", ("loss",))) == {"loss"}
    check(
        lambda x, t, w: regfast.cross_entropy(x, t, w, **options),
        lambda x, t, w: reference.cross_entropy(x, t, w, **options),
        x,
        target,
        weight,
        grads=grads,
        terms=1 / rows if only_mean and rows else 1.0,  # p (1 + 2 z_loss lse) - 1 cancels
        what=str(options),
    )


def by_hand(x, target, weight, smoothing, z_loss, softcap, scale, ignore_index=-100):
    """The definition written out for class targets and two dimensions, independently of reference.py."""
    z = x.double() * (1.0 if scale is None else scale)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    n, c = z.shape
    w = torch.ones(c, dtype=torch.float64) if weight is None else weight.double()
    log_p = z - z.exp().sum(1, keepdim=True).log()
    lse = z.exp().sum(1).log()
    loss, logprob = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for i, t in enumerate(target.tolist()):
        if t != ignore_index:
            nll = -w[t] * log_p[i, t]
            loss[i] = (1 - smoothing) * nll - smoothing / c * (w * log_p[i]).sum() + z_loss * lse[i] ** 2
            logprob[i] = log_p[i, t]
    valid = target[target != ignore_index]
    denominator = w[valid].sum()
    entropy = -(log_p.exp() * log_p).sum(1)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / denominator}, lse, entropy, logprob, z.argmax(1)


@with_all_kernels
@pytest.mark.parametrize("z_loss, softcap, scale", list(itertools.product([0.0, 0.3], [None, 5.0], [None, 0.7])))
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    "module",
    [regfast, pytest.param(reference, marks=pytest.mark.no_kernels("the reference"))],
    ids=["regfast", "reference"],
)
def test_the_definition(module, z_loss, softcap, scale, weighted, mode):
    x, target = spiky(14, 23, dtype=torch.float64, size=2), class_targets((14,), 23, 0.3)
    weight = torch.rand(23, dtype=torch.float64) if weighted else None
    losses, *others = by_hand(x, target, weight, 0.2, z_loss, softcap, scale)
    got = module.cross_entropy(
        x,
        target,
        weight,
        label_smoothing=0.2,
        reduction=mode,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=scale,
        outputs=NAMES,
    )
    for name, ours, true in zip(NAMES, got, [losses[mode], *others], strict=True):
        torch.testing.assert_close(ours, true, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("shape", [(1, 1), (9, 10), (5, 17), (3, 2051), (2, 6, 7), (3, 33, 2, 2)], ids=str)
@pytest.mark.parametrize(
    "option", [{"z_loss": 0.1}, {"softcap": 4.0}, {"logit_scale": 0.3}, {"logit_scale": -1.5}], ids=str
)
def test_values_and_gradients(shape, option, dtype):
    x = spiky(*shape, dtype=dtype).requires_grad_()
    rows = (shape[0], *shape[2:])
    for mode in ("none", "mean", "sum"):
        check_extra(x, class_targets(rows, shape[1], 0.2), reduction=mode, **option)
        check_extra(x, probability_targets(*shape, dtype=dtype).requires_grad_(), reduction=mode, **option)


@with_all_kernels
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
def test_one_output(name, probabilities, dtype):
    for shape in ((7, 19), (4, 10, 5)):
        rows = (shape[0], *shape[2:])
        x = spiky(*shape, dtype=dtype).requires_grad_()
        if probabilities:
            target = probability_targets(*shape, dtype=dtype).requires_grad_()
        else:
            target = class_targets(rows, shape[1], 0.2)
        for options in ({}, {"softcap": 6.0, "logit_scale": 0.8, "z_loss": 0.1, "label_smoothing": 0.1}):
            check_extra(x, target, outputs=name, **options)
        got = regfast.cross_entropy(x, target, outputs=(name,))
        assert isinstance(got, torch.Tensor)
        assert got.shape == (() if name == "loss" else rows)
        assert got.dtype == (torch.int64 if name == "argmax" else dtype)
        assert got.requires_grad == (name != "argmax")


@with_all_kernels
@pytest.mark.parametrize(
    "names", [NAMES, NAMES[::-1], ("argmax", "loss"), ("entropy", "logprob"), ("lse", "loss")], ids=str
)
def test_several_outputs_together(names, dtype):
    x = spiky(11, 29, dtype=dtype).requires_grad_()
    target = class_targets((11,), 29, 0.2)
    for mode in ("none", "mean"):
        check_extra(x, target, torch.rand(29).to(dtype), outputs=names, reduction=mode, z_loss=0.1, label_smoothing=0.1)
    check_extra(x, probability_targets(11, 29, dtype=dtype).requires_grad_(), outputs=names)
    got = regfast.cross_entropy(x, target, outputs=names)
    assert isinstance(got, tuple) and type(got).__name__ == "CrossEntropyOutput" and got._fields == names
    assert all(got[i] is getattr(got, name) for i, name in enumerate(names))


@with_all_kernels
@pytest.mark.parametrize("used", [c for r in (1, 2, 3) for c in itertools.combinations(FLOATING, r)], ids="+".join)
def test_gradient_of_some_outputs_only(used):
    # An unused output brings no grad_output at all: its part of the backward must vanish, not be undefined.
    x, target = spiky(8, 21).requires_grad_(), class_targets((8,), 21, 0.2)

    def total(fn):
        got = dict(zip(FLOATING, fn(x, target, outputs=FLOATING, reduction="none"), strict=True))
        return sum((got[name] * (1 + i)).square().sum() for i, name in enumerate(used))

    ours, true = (torch.autograd.grad(total(fn), x)[0] for fn in (regfast.cross_entropy, reference.cross_entropy))
    torch.testing.assert_close(ours, true)


@with_all_kernels
def test_ignored_rows_have_every_output_but_logprob():
    x, target = spiky(6, 9).requires_grad_(), torch.full((6,), -100)
    got = regfast.cross_entropy(x, target, outputs=NAMES, reduction="sum", z_loss=1.0)
    assert got.loss == 0 and torch.equal(got.logprob, torch.zeros(6))
    torch.testing.assert_close(got.lse, torch.logsumexp(x, 1))
    assert torch.equal(got.argmax, x.argmax(1)) and (got.entropy > 0).all()
    (gradient,) = torch.autograd.grad(got.lse.sum(), x)
    torch.testing.assert_close(gradient, x.softmax(1))


@with_all_kernels
def test_one_sample_without_batch():
    x = spiky(17).requires_grad_()
    for target in (torch.tensor(3), probability_targets(17)):
        check_extra(x, target, outputs=NAMES, z_loss=0.1)
        assert all(value.shape == () for value in regfast.cross_entropy(x, target, outputs=NAMES))


@with_all_kernels
def test_argmax_is_the_first_maximum(dtype):
    x = torch.zeros(5, 300, dtype=dtype)
    x[1, [40, 41, 299]] = 1
    x[2, 299] = 1
    x[3, [7, 250]] = INF
    x[4] = -INF
    target = torch.zeros(5, dtype=torch.int64)
    assert regfast.cross_entropy(x, target, outputs="argmax").tolist() == [0, 40, 299, 7, 0]
    spread = x.T[None].contiguous()  # classes strided
    assert regfast.cross_entropy(spread, target[None], outputs="argmax").tolist() == [[0, 40, 299, 7, 0]]


@with_all_kernels
def test_entropy_of_masked_classes(dtype):
    # A class of logit -inf has p = 0 and counts 0: the same value and gradient as without it.
    x = spiky(6, 20, dtype=dtype)
    masked = torch.cat([x[:, :7], torch.full((6, 3), -INF, dtype=dtype), x[:, 7:]], 1).requires_grad_()
    plain = x.clone().requires_grad_()
    target = torch.arange(6)
    grads = []
    for leaf in (masked, plain):
        value = regfast.cross_entropy(leaf, target, outputs=("entropy", "lse", "logprob"))
        grads.append(torch.autograd.grad([*value], leaf, [torch.arange(1, 7).to(dtype)] * 3)[0])
        assert value.entropy.isfinite().all()
    expected = torch.cat([grads[1][:, :7], torch.zeros(6, 3, dtype=dtype), grads[1][:, 7:]], 1)
    torch.testing.assert_close(grads[0], expected)


@with_all_kernels
def test_entropy_of_certain_and_uniform_rows():
    x = torch.stack([torch.zeros(50), torch.eye(50)[4] * 1000, torch.full((50,), -1e4)])
    entropy = regfast.cross_entropy(x, torch.zeros(3, dtype=torch.int64), outputs="entropy")
    true = torch.tensor(50.0).log()
    torch.testing.assert_close(entropy, torch.stack([true, torch.tensor(0.0), true]))


@with_all_kernels
def test_softcap_bounds_infinite_logits():
    x = torch.tensor([[INF, 0.0, -INF, 1.0]] * 2).requires_grad_()
    check_extra(x, torch.tensor([0, 2]), softcap=5.0, outputs=FLOATING)


@with_all_kernels
@pytest.mark.parametrize("loss_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_loss_dtype(loss_dtype, dtype):
    x, target = spiky(30, 40, dtype=dtype).requires_grad_(), class_targets((30,), 40, 0.2)
    for mode in ("none", "mean"):
        check_extra(x, target, outputs=NAMES, loss_dtype=loss_dtype, reduction=mode)
    got = regfast.cross_entropy(x, target, outputs=NAMES, loss_dtype=loss_dtype)
    assert [value.dtype for value in got] == [loss_dtype] * 4 + [torch.int64]
    assert torch.autograd.grad(got.loss, x)[0].dtype == dtype


@with_all_kernels
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_float32_loss_of_half_logits_is_not_rounded_to_half(half):
    x, target = spiky(30, 40, dtype=half), class_targets((30,), 40)
    ours = regfast.cross_entropy(x, target, reduction="none", loss_dtype=torch.float32)
    wide = F.cross_entropy(x.float(), target, reduction="none")
    assert_as_good(ours, wide, F.cross_entropy(x.double(), target, reduction="none"))


@with_all_kernels
@given(
    n=st.integers(0, 12),
    c=st.integers(1, 60),
    rest=st.lists(st.integers(0, 4), max_size=2),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    probabilities=st.booleans(),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    mode=st.sampled_from(["none", "mean", "sum"]),
    z_loss=st.sampled_from([0.0, 0.01, 1.0]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    scale=st.sampled_from([None, 0.5, 2.0]),
    names=st.permutations(FLOATING).flatmap(lambda p: st.integers(1, 4).map(lambda k: tuple(p[:k]))),
    loss_dtype=st.sampled_from([None, torch.float32]),
)
def test_any_combination(
    n,
    c,
    rest,
    layout,
    dtype,
    probabilities,
    weighted,
    smoothing,
    ignored,
    mode,
    z_loss,
    softcap,
    scale,
    names,
    loss_dtype,
):
    torch.manual_seed(n + 13 * c)
    x = lay_out(spiky(n, c, *rest, dtype=dtype), layout).requires_grad_()
    if probabilities:
        target = probability_targets(n, c, *rest, dtype=dtype).requires_grad_()
    else:
        target = class_targets((n, *rest), c, ignored)
    check_extra(
        x,
        target,
        torch.rand(c).to(dtype) if weighted else None,
        label_smoothing=smoothing,
        reduction=mode,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=scale,
        outputs=names,
        loss_dtype=loss_dtype,
    )
