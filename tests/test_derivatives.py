"""Every derivative is right: gradcheck, gradgradcheck, forward mode and torch.func, per op, in float64."""

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, CLASSES, FLOATING, bound, leaf, scalar
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from util import INF, class_targets, spiky

import regfast
from regfast import reference

cases = pytest.mark.parametrize("name", CASES)


def close(ours, true):
    torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-11)


@cases
def test_gradcheck(name):
    fn, arguments = bound(name)
    assert torch.autograd.gradcheck(fn, arguments, check_batched_grad=True)


@cases
def test_gradgradcheck(name):
    fn, arguments = bound(name)
    assert torch.autograd.gradgradcheck(fn, arguments, atol=1e-4)


@cases
def test_double_backward_equals_the_references(name):
    # Third derivatives too: create_graph twice.
    results = []
    for module in (regfast, reference):
        torch.manual_seed(5)
        fn, arguments = bound(name, module)
        value, level = scalar(fn)(*arguments), []
        for _ in range(3):
            grads = torch.autograd.grad(value, arguments, create_graph=True, materialize_grads=True)
            level.extend(grads)
            if not any(g.requires_grad for g in grads):
                break
            value = sum((g * torch.linspace(0.5, 2, g.numel(), dtype=g.dtype).view(g.shape)).sum() for g in grads)
        results.append(level)
    close(*results)


@cases
def test_forward_mode(name):
    torch.manual_seed(6)
    fn, arguments = bound(name)
    plain, _ = bound(name, reference)
    tangents = [torch.randn_like(a) for a in arguments]
    close(jvp(fn, tuple(arguments), tuple(tangents)), jvp(plain, tuple(arguments), tuple(tangents)))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a.detach(), t) for a, t in zip(arguments, tangents, strict=True)]
        for ours, true in zip(*(r if isinstance(r, tuple) else (r,) for r in (fn(*duals), plain(*duals))), strict=True):
            close(forward_ad.unpack_dual(ours).tangent, forward_ad.unpack_dual(true).tangent)


@cases
def test_forward_mode_by_finite_differences(name):
    fn, arguments = bound(name)
    assert torch.autograd.gradcheck(fn, arguments, check_forward_ad=True, check_backward_ad=False)


@cases
def test_func_grad_vjp_and_jacobians(name):
    torch.manual_seed(7)
    fn, arguments = bound(name)
    plain, _ = bound(name, reference)
    every = tuple(range(len(arguments)))
    arguments = [a.detach() for a in arguments]
    close(grad(scalar(fn), every)(*arguments), grad(scalar(plain), every)(*arguments))
    close(jacrev(fn, every)(*arguments), jacrev(plain, every)(*arguments))
    close(jacfwd(fn, every)(*arguments), jacfwd(plain, every)(*arguments))
    out, pull = vjp(fn, *arguments)
    true, push = vjp(plain, *arguments)
    close(out, true)
    seeds = torch.ones_like(out) * 3 if isinstance(out, torch.Tensor) else tuple(torch.ones_like(o) * 3 for o in out)
    close(pull(seeds), push(seeds))


@pytest.mark.parametrize(
    "name", ["linear gelu", "log_softmax", "mse_loss mean", "cross_entropy mean", "cross_entropy everything"]
)
def test_hessian(name):
    fn, arguments = bound(name)
    plain, _ = bound(name, reference)
    arguments = [a.detach() for a in arguments]
    close(hessian(scalar(fn))(*arguments), hessian(scalar(plain))(*arguments))


@cases
def test_vmap(name):
    torch.manual_seed(8)
    fn, arguments = bound(name)
    batches = [torch.stack([a.detach(), a.detach() * 0.5, a.detach() - 0.1]) for a in arguments]
    ours = vmap(fn)(*batches)
    each = [fn(*sample) for sample in zip(*batches, strict=True)]
    true = torch.stack(each) if isinstance(ours, torch.Tensor) else tuple(map(torch.stack, zip(*each, strict=True)))
    close(ours, true)
    # Per-sample gradients.
    ours = vmap(grad(scalar(fn)))(*batches)
    close(ours, torch.stack([grad(scalar(fn))(*sample) for sample in zip(*batches, strict=True)]))


def test_vmap_over_targets_and_weights():
    x, w = spiky(5, 7, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    targets = class_targets((3, 5), 7, 0.2)
    ours = vmap(lambda t: regfast.cross_entropy(x, t, w, label_smoothing=0.1, z_loss=0.1))(targets)
    close(ours, torch.stack([regfast.cross_entropy(x, t, w, label_smoothing=0.1, z_loss=0.1) for t in targets]))
    weights = torch.rand(3, 4, 7, dtype=torch.float64)
    close(vmap(lambda w: regfast.linear(x, w))(weights), torch.stack([F.linear(x, w) for w in weights]))


def test_per_sample_gradients_of_a_model():
    model = torch.nn.Sequential(regfast.Linear(6, 8, activation="tanh"), regfast.Linear(8, 3)).double()
    parameters = dict(model.named_parameters())
    data, target = spiky(5, 6, dtype=torch.float64), class_targets((5,), 3)

    def loss(parameters, x, t):
        return regfast.cross_entropy(functional_call(model, parameters, (x[None],)), t[None])

    per_sample = vmap(grad(loss), (None, 0, 0))(parameters, data, target)
    for i in range(5):
        alone = torch.autograd.grad(
            regfast.cross_entropy(model(data[i : i + 1]), target[i : i + 1]), list(model.parameters())
        )
        for name, true in zip(parameters, alone, strict=True):
            close(per_sample[name][i], true)


def test_gradient_penalty():
    # create_graph in the middle of a model, float32: WGAN-GP's pattern.
    results = []
    for linear, loss in ((regfast.linear, regfast.cross_entropy), (F.linear, F.cross_entropy)):
        torch.manual_seed(3)
        x, w = torch.randn(8, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
        value = loss(torch.tanh(linear(x, w)), torch.arange(8) % 4)
        (gx,) = torch.autograd.grad(value, x, create_graph=True)
        results.append(torch.autograd.grad(value + (gx.norm(dim=1) - 1).square().sum(), [x, w]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("wanted", ["xwb", "x", "w", "b", "xb"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6)], ids=str)
@pytest.mark.parametrize("layer", ["linear", "phm_linear"])
def test_second_derivatives_of_part_of_a_layer(layer, shape, dtype, wanted):
    # What is frozen has no part in the graph of a pre-activation, nor what is computed of it.
    for activation in regfast._C.ACTIVATIONS:
        results = []
        for module, kind in ((regfast, dtype), (reference, torch.float64)):
            torch.manual_seed(4)
            weights = (torch.randn(4, 6),) if layer == "linear" else (torch.randn(2, 2, 2), torch.randn(2, 2, 3))
            operands = [t.to(dtype).to(kind) for t in (torch.randn(shape), *weights, torch.randn(4))]
            names = ["x", *["w"] * len(weights), "b"]
            leaves = [t.requires_grad_() for t, name in zip(operands, names, strict=True) if name in wanted]
            y = getattr(module, layer)(*operands, activation=activation)
            up = torch.linspace(0.5, 1.5, y.numel()).view(y.shape).to(dtype).to(kind).requires_grad_()
            first = torch.autograd.grad(y, leaves, up, create_graph=True)
            value = sum(g.square().sum() for g in first)
            results.append([*first, *torch.autograd.grad(value, [up, *leaves], materialize_grads=True)])
        for ours, true in zip(*results, strict=True):
            assert ours.dtype == dtype
            bound = (100 if dtype == torch.float32 else 16) * torch.finfo(dtype).eps * true.abs().max().clamp(min=1)
            assert (ours.double() - true).abs().max() <= bound, (activation, ours, true)


def test_second_derivatives_with_masked_classes():
    # A class of logit -inf: second derivatives are those without it, and 0 for it; never NaN.
    x = spiky(4, 6, dtype=torch.float64, size=1)
    masked = torch.cat([x, torch.full((4, 1), -INF, dtype=torch.float64)], 1)
    for name in FLOATING:
        results = []
        for logits in (x, masked):
            logits = logits.clone().requires_grad_()
            value = regfast.cross_entropy(logits, CLASSES, outputs=name, z_loss=0.3 if name == "loss" else 0.0)
            (first,) = torch.autograd.grad(
                (value * torch.linspace(1, 2, value.numel()).view(value.shape)).sum(), logits, create_graph=True
            )
            mixed = first[:, :6] * torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
            (second,) = torch.autograd.grad(mixed.sum(), logits)
            results.append((first, second))
        for plain, wide in zip(*results, strict=True):
            close(wide[:, :6], plain)
            assert not wide[:, 6].any()


def test_second_derivative_through_the_grad_output():
    # The backward is differentiated in its grad_output alone when the input needs no second gradient.
    for fn in (regfast.softmax, regfast.log_softmax, lambda x: regfast.cross_entropy(x, CLASSES, reduction="none")):
        x = leaf(4, 6)
        out = fn(x)
        seed = torch.ones_like(out, requires_grad=True)
        (first,) = torch.autograd.grad(out, x, seed, create_graph=True)
        (again,) = torch.autograd.grad(first.square().sum(), seed)
        jacobian = torch.autograd.functional.jacobian(fn, x.detach()).reshape(out.numel(), -1)
        close(again.flatten(), 2 * jacobian @ (jacobian.T @ torch.ones(out.numel(), dtype=torch.float64)))
