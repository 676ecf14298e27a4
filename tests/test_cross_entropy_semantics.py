"""cross_entropy: errors, ignored rows, infinities and NaN, empty inputs, legacy arguments, backward in place."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from util import (
    HALF,
    INF,
    LAYOUTS,
    NAN,
    assert_same_error,
    check,
    class_targets,
    lay_out,
    probability_targets,
    spiky,
    with_all_kernels,
)

import regfast

pytestmark = pytest.mark.kernels("cross_entropy")

REDUCTIONS = ("none", "mean", "sum")
NAMES = ("loss", "lse", "entropy", "logprob", "argmax")


def both(*arguments, **options):
    return regfast.cross_entropy(*arguments, **options), F.cross_entropy(*arguments, **options)


# Errors

X, T = torch.ones(4, 5), torch.zeros(4, dtype=torch.int64)
ERRORS = {
    "class above": ("target", (X, T + 5), {}),
    "class below": ("target", (X, T - 1), {}),
    "class with smoothing": ("target", (X, T + 7), {"label_smoothing": 0.1, "reduction": "none"}),
    "class with weight": ("target", (X, T + 5, torch.ones(5)), {}),
    "class of one sample": ("target", (X[0], torch.tensor(9)), {}),
    "class with more dimensions": ("target", (torch.ones(2, 5, 3), torch.full((2, 3), 7)), {}),
    "class of an image": ("target", (torch.ones(2, 5, 3, 3), torch.full((2, 3, 3), 7)), {}),
    "class with another ignore_index": ("target", (X, T - 100), {"ignore_index": 2}),
    "batch": ("target", (X, T[:3]), {}),
    "target of two dimensions": ("target", (X, T.view(2, 2)), {}),
    "target shape": ("target", (torch.ones(2, 5, 3), torch.zeros(2, 4, dtype=torch.int64)), {}),
    "target image": ("target", (torch.ones(2, 5, 3, 3), torch.zeros(2, 4, 3, dtype=torch.int64)), {}),
    "targets for one sample": ("target", (X[0], T[:2]), {}),
    "bool": ("target", (X, T.bool()), {}),
    "float classes": ("target", (X, T.float()), {}),
    "integer probabilities": ("target", (X, torch.zeros(4, 5, dtype=torch.int64)), {}),
    "probabilities of other classes": ("target", (X, torch.rand(4, 6)), {}),
    "no dimensions": ("input", (torch.tensor(1.0), torch.tensor(0)), {}),
    "weight too short": ("weight", (X, T, torch.ones(4)), {}),
    "weight of two dimensions": ("weight", (X, T, torch.ones(5, 1)), {}),
    "weight for probabilities": ("weight", (X, torch.rand(4, 5), torch.ones(4)), {}),
    "weight dtype": ("weight", (X, T, torch.ones(5).double()), {}),
    "weight dtype for bf16": ("weight", (X.bfloat16(), T, torch.ones(5)), {}),
    "weight dtype with smoothing": ("weight", (X, T, torch.ones(5).double()), {"label_smoothing": 0.1}),
    "weight with gradient": ("weight", (X.clone().requires_grad_(), T, torch.ones(5, requires_grad=True)), {}),
    "reduction": ("reduction", (X, T), {"reduction": "median"}),
    "no reduction": ("reduction", (X, T), {"reduction": None}),
    "label_smoothing": ("label_smoothing", (X, T), {"label_smoothing": 1.5}),
    "ignore_index for probabilities": ("ignore_index", (X, torch.rand(4, 5)), {"ignore_index": 0}),
    "integer input": ("input", (X.long(), T), {}),
    "complex input": ("input", (X.cfloat(), T), {}),
    "bool input": ("input", (X.bool(), T), {}),
    "no classes": ("target", (torch.ones(3, 0), T[:3]), {}),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.no_kernels("errors")
def test_errors_are_torchs_and_say_more(case):
    argument, arguments, options = ERRORS[case]
    assert_same_error(
        lambda: regfast.cross_entropy(*arguments, **options),
        lambda: F.cross_entropy(*arguments, **options),
        "cross_entropy",
        argument,
    )


@pytest.mark.no_kernels("errors")
def test_errors_for_what_is_no_tensor():
    for arguments in ((X, [0, 1, 2, 3]), (None, T), (X, T, [1.0] * 5)):
        with pytest.raises(TypeError):
            regfast.cross_entropy(*arguments)


@pytest.mark.parametrize("outputs", ["prob", (), ("loss", "prob"), ("loss", "loss")], ids=str)
@pytest.mark.no_kernels("errors")
def test_errors_for_outputs(outputs):
    with pytest.raises(ValueError, match=r"regfast\.cross_entropy.*outputs.*expected.*got"):
        regfast.cross_entropy(X, T, outputs=outputs)


def test_an_error_leaves_the_next_call_alone():
    with pytest.raises(IndexError):
        regfast.cross_entropy(X, T + 5)
    ours, theirs = both(X, T)
    torch.testing.assert_close(ours, theirs)


# Ignored rows


@with_all_kernels
def test_all_ignored(dtype):
    # torch's policy: the mean of nothing is NaN, its gradient too; none and sum are 0 with gradient 0.
    x = spiky(6, 9, dtype=dtype).requires_grad_()
    target = torch.full((6,), -100)
    for smoothing in (0.0, 0.1):
        assert regfast.cross_entropy(x, target, label_smoothing=smoothing).isnan()
        for mode in ("none", "sum"):
            loss = regfast.cross_entropy(x, target, reduction=mode, label_smoothing=smoothing)
            assert not loss.any()
            (grad,) = torch.autograd.grad(loss.sum() * 3, x)
            assert not grad.any()


@with_all_kernels
def test_ignored_rows_get_gradient_zero_and_read_no_weight():
    # The ignored class would index the weights out of bounds; its row must be written, not left as it was allocated.
    x, weight = spiky(40, 2051).requires_grad_(), torch.rand(2051)
    for ignore_index in (-100, -(10**12), 10**12, 7):
        target = class_targets((40,), 2051, 0.5, ignore_index)
        for mode in REDUCTIONS:
            options = {"ignore_index": ignore_index, "reduction": mode}
            (grad,) = torch.autograd.grad(regfast.cross_entropy(x, target, weight, **options).sum(), x)
            assert not grad[target == ignore_index].any()
            check(
                lambda x, t, w, o=options: regfast.cross_entropy(x, t, w, **o),
                lambda x, t, w, o=options: F.cross_entropy(x, t, w, **o),
                x,
                target,
                weight,
            )


@with_all_kernels
def test_weighted_mean_divides_by_the_weights_of_the_valid_rows():
    # Not by all rows. Written out, so that nothing compares a loss with itself.
    x, target = spiky(5, 4, dtype=torch.float64), torch.tensor([0, -100, 3, 1, -100])
    weight = torch.tensor([0.5, 2.0, 7.0, 0.25], dtype=torch.float64)
    log_p = x.log_softmax(1)
    true = -(0.5 * log_p[0, 0] + 0.25 * log_p[2, 3] + 2 * log_p[3, 1]) / 2.75
    torch.testing.assert_close(regfast.cross_entropy(x, target, weight), true)


@with_all_kernels
def test_weights_of_zero():
    x, target = spiky(6, 9).requires_grad_(), class_targets((6,), 9)
    assert regfast.cross_entropy(x, target, torch.zeros(9)).isnan()
    assert regfast.cross_entropy(x, target, torch.zeros(9), reduction="sum") == 0
    # Zero at the classes of all rows and not at others, which a smoothed loss adds up.
    weight = torch.ones(9).index_fill_(0, target, 0)
    for smoothing in (0.0, 0.1, 1.0):
        assert F.cross_entropy(x, target, weight, label_smoothing=smoothing).isnan()
        assert regfast.cross_entropy(x, target, weight, label_smoothing=smoothing).isnan()
        w = spiky(9, 9)
        assert regfast.linear_cross_entropy(x, w, target, weight=weight, label_smoothing=smoothing).isnan()
    assert regfast.cross_entropy(x, target, weight, z_loss=0.1).isnan()


@with_all_kernels
def test_a_bad_ignored_row_stays_alone():
    # An ignored row of NaN or infinities reaches neither the loss nor the gradient of another row.
    x, target = spiky(6, 40), class_targets((6,), 40)
    for bad in (NAN, INF, -INF):
        x[2], target[2] = bad, -100
        leaf = x.clone().requires_grad_()
        for mode in REDUCTIONS:
            ours, theirs = both(leaf, target, reduction=mode, label_smoothing=0.1)
            torch.testing.assert_close(ours, theirs)
            (grad,) = torch.autograd.grad(ours.sum(), leaf)
            assert grad[torch.arange(6) != 2].isfinite().all()


# Infinities and NaN


@with_all_kernels
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
def test_infinite_logits(options, dtype):
    x = spiky(7, 40, dtype=dtype)
    x[0, 3] = -INF  # a masked class
    x[1] = -INF
    x[2, 5] = INF
    x[3, 7] = NAN
    x[4, :39] = -INF  # one class left
    x[5, 0] = -INF  # the target is masked: loss inf
    target = torch.tensor([0, 0, 0, 0, 39, 0, 1])
    for logits in (x, x[:, :, None]):
        rows = target if logits.dim() == 2 else target[:, None]
        check(
            lambda x, rows=rows: regfast.cross_entropy(x, rows, reduction="none", **options),
            lambda x, rows=rows: F.cross_entropy(x, rows, reduction="none", **options),
            logits.clone().requires_grad_(),
        )


@with_all_kernels
def test_infinite_logits_of_probability_targets():
    # 0 * -inf is NaN in torch's sum over the classes, so it is here.
    x = spiky(3, 40)
    x[0, 3], x[1, 39] = -INF, -INF
    target = probability_targets(3, 40)
    target[0, 3] = 0.0
    ours, theirs = both(x, target, reduction="none")
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@with_all_kernels
@pytest.mark.parametrize("upstream", [INF, -INF, NAN, 0.0], ids=str)
@pytest.mark.parametrize("option", ["plain", "weight", "ignored", "smooth", "probabilities"])
def test_upstream_gradients_that_are_not_finite(option, upstream):
    # Of a loss that was divided by 0: a mean of no rows, normalizer=0. Infinite, or NaN, where torch's is.
    options = {"smooth": {"label_smoothing": 0.1}, "ignored": {"ignore_index": 1}}.get(option, {})
    for classes in (3, 9, 40, 1100):
        if option == "weight":
            options["weight"] = torch.rand(classes) + 0.5
        x = spiky(5, classes).clamp(-9, 9).requires_grad_()  # no probability is 0, which would be times infinity
        target = probability_targets(5, classes) if option == "probabilities" else torch.tensor([0, 1, 2, 1, 0])
        for reduction in REDUCTIONS:
            ours, theirs = both(x, target, reduction=reduction, **options)
            up = torch.full_like(ours, upstream)
            for retain in (True, False):
                wanted = torch.autograd.grad(theirs, x, up, retain_graph=retain)
                found = torch.autograd.grad(ours, x, up, retain_graph=retain)
                torch.testing.assert_close(found, wanted, equal_nan=True)


@with_all_kernels
def test_huge_logits():
    for size in (1e4, 1e30, 3e38):
        x = torch.tensor([[size, -size, 0.0], [-size, -size, -size], [size, size, size]])
        for target in (torch.tensor([0, 1, 2]), torch.tensor([1, 1, 1])):
            ours, theirs = both(x, target, reduction="none")
            torch.testing.assert_close(ours, theirs)


@with_all_kernels
def test_float16_mean_of_large_losses():
    # The sum is beyond 65504 while the mean is not (PyTorch #61523).
    x = torch.zeros(4096, 10, dtype=torch.float16)
    x[:, 1] = 60.0
    x.requires_grad_()
    loss = regfast.cross_entropy(x, torch.zeros(4096, dtype=torch.int64))
    assert loss == 60
    (grad,) = torch.autograd.grad(loss, x, torch.tensor(4096.0, dtype=torch.float16))
    torch.testing.assert_close(grad[:, 0], torch.full((4096,), -1.0, dtype=torch.float16))


def test_mean_of_many_rows():
    # A float32 running sum of 2**21 losses loses digits (PyTorch #55657); partial sums do not.
    x = torch.zeros(2**21, 2)
    target = torch.arange(2**21) % 2
    x[:, 0] = torch.linspace(-1, 1, 2**21)
    exact = F.cross_entropy(x.double(), target)
    assert abs(regfast.cross_entropy(x, target).double() - exact) < 1e-6


# Shapes without elements


@with_all_kernels
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0), (2, 5, 0, 3), (0, 0)], ids=str)
@pytest.mark.composite("no classes")
def test_no_rows(shape):
    x = torch.empty(shape, requires_grad=True)
    for target in (torch.zeros(shape[0], *shape[2:], dtype=torch.int64), torch.zeros(shape)):
        for mode in REDUCTIONS:
            ours, theirs = both(x, target, reduction=mode)
            torch.testing.assert_close(ours, theirs, equal_nan=True)
            assert torch.autograd.grad(ours.sum(), x)[0].shape == shape


@with_all_kernels
@pytest.mark.composite("no classes")
def test_no_classes():
    for target in (torch.full((3,), -100), torch.zeros(3, 0)):
        ours, theirs = both(torch.empty(3, 0), target, reduction="none")
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("flags", [(False, None), (None, False), (True, True), (False, True)], ids=str)
def test_legacy_arguments(flags):
    average, reduce = flags
    x, target = spiky(4, 5), class_targets((4,), 5)
    with pytest.warns(UserWarning, match="size_average and reduce"):
        ours = regfast.cross_entropy(x, target, None, average, -100, reduce)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(ours, F.cross_entropy(x, target, None, average, -100, reduce))


# What is changed, and what is not


@with_all_kernels
def test_inputs_are_not_changed(dtype):
    for target in (class_targets((30,), 40, 0.2), probability_targets(30, 40, dtype=dtype)):
        x, weight = spiky(30, 40, dtype=dtype).requires_grad_(), torch.rand(40).to(dtype)
        before = [t.detach().clone() for t in (x, target, weight)]
        grad_output = torch.randn(30).to(dtype)
        kept = grad_output.clone()
        loss = regfast.cross_entropy(x, target, weight, reduction="none", label_smoothing=0.1)
        loss.backward(grad_output)
        assert all(torch.equal(a, b) for a, b in zip(before, (x, target, weight), strict=True))
        assert torch.equal(kept, grad_output) and x._version == 0 and x.grad.data_ptr() != x.data_ptr()


@with_all_kernels
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded"])
@pytest.mark.parametrize("mode", REDUCTIONS)
def test_backward_in_place(layout, mode, dtype):
    for shape in ((12, 41), (3, 10, 7)):
        values = spiky(*shape, dtype=dtype)
        rows = (shape[0], *shape[2:])
        for target in (class_targets(rows, shape[1], 0.2), probability_targets(*shape, dtype=dtype)):
            leaf = values.clone().requires_grad_()
            x = lay_out(torch.empty_like(values), layout).copy_(leaf)
            assert not x.is_leaf
            kept = x.detach().clone()
            loss = regfast.cross_entropy(x, target, reduction=mode, label_smoothing=0.1, inplace_backward=True)
            assert torch.equal(x, kept), "forward changed its input"
            version, grad_output = x._version, torch.randn_like(loss)
            (grad,) = torch.autograd.grad(loss, x, grad_output)
            assert x._version > version
            assert grad.data_ptr() == x.data_ptr() and torch.equal(grad, x)
            plain = values.clone().requires_grad_()
            (true,) = torch.autograd.grad(
                regfast.cross_entropy(plain, target, reduction=mode, label_smoothing=0.1), plain, grad_output
            )
            # Other strides may take another path through the kernels.
            torch.testing.assert_close(grad, true)


@with_all_kernels
def test_backward_in_place_through_a_model():
    w = torch.randn(9, 5, requires_grad=True)
    data, target = spiky(20, 5), class_targets((20,), 9)
    grads = [
        torch.autograd.grad(regfast.cross_entropy(data @ w.T, target, inplace_backward=flag), w)[0]
        for flag in (True, False)
    ]
    torch.testing.assert_close(*grads)


def test_backward_in_place_trips_the_version_counter():
    # The clobbered logits were used by somebody else and nobody said so.
    leaf = spiky(6, 9).requires_grad_()
    logits = leaf * 2
    other = logits.square().sum()  # needs the logits in its backward
    loss = regfast.cross_entropy(logits, class_targets((6,), 9), inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_in_place_refuses_leaves_and_overlap():
    target = class_targets((6,), 9)
    with pytest.raises(RuntimeError, match=r"regfast\.cross_entropy.*inplace_backward.*expected.*got"):
        regfast.cross_entropy(spiky(6, 9).requires_grad_(), target, inplace_backward=True)
    expanded = (spiky(1, 9).requires_grad_() * 2).expand(6, 9)
    with pytest.raises(RuntimeError, match=r"regfast\.cross_entropy.*inplace_backward.*expected.*got"):
        regfast.cross_entropy(expanded, target, inplace_backward=True)
    # Without a gradient nothing is written, so a leaf is welcome.
    x = spiky(6, 9)
    torch.testing.assert_close(regfast.cross_entropy(x, target, inplace_backward=True), F.cross_entropy(x, target))
    assert x._version == 0


@with_all_kernels
@pytest.mark.parametrize("half", HALF, ids=str)
def test_backward_in_place_is_as_exact_as_out_of_place(half):
    # The in-place gradient of bf16 was rounded twice elsewhere.
    values, target = spiky(20, 500, dtype=half), class_targets((20,), 500, 0.2)
    out = values.clone().requires_grad_()
    (true,) = torch.autograd.grad(regfast.cross_entropy(out, target, reduction="sum"), out)
    x = values.clone().requires_grad_() * 1
    (grad,) = torch.autograd.grad(regfast.cross_entropy(x, target, reduction="sum", inplace_backward=True), x)
    assert torch.equal(grad, true)


@with_all_kernels
def test_all_outputs_in_place():
    x = spiky(6, 9).requires_grad_()
    target = class_targets((6,), 9, 0.3)
    grads = []
    for flag in (False, True):
        got = regfast.cross_entropy(x * 1, target, outputs=NAMES, inplace_backward=flag, z_loss=0.1)
        grads.append(torch.autograd.grad(got.loss * 3 + (got.lse * got.entropy + got.logprob).sum(), x)[0])
    torch.testing.assert_close(*grads)
