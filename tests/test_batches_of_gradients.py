"""Gradients that others than loss.backward() ask for: of a batch of losses, traced, compiled, again and to be derived
again. Each is what a loop over the losses gives, so no value of an upstream gradient may decide its way."""

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch.autograd.functional import jacobian
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from util import class_targets, probability_targets, spiky

import regfast

REDUCTIONS = ("none", "mean", "sum")
NAMES = ("loss", "lse", "entropy", "logprob", "argmax")
N, D, V = 6, 5, 7


def operands(dtype):
    torch.manual_seed(2)
    x, w, b = (spiky(*s, dtype=dtype, size=1.0) for s in ((N, D), (V, D), (V,)))
    return {"x": x, "w": w, "b": b, "z": spiky(N, V, dtype=dtype, size=1.0), "y": spiky(N, V, dtype=dtype, size=1.0)}


CLASSES = torch.tensor([3, 0, -100, 6, 2, 2])
COUNTS = torch.randint(4, (N, V), generator=torch.Generator().manual_seed(0))


def shares(*shape, dtype):
    return torch.linspace(0.2, 1.5, torch.Size(shape).numel()).view(shape).to(dtype)


# name -> (function of an options dictionary and the operands that are differentiated, their names)
OPS = {
    **{
        f"linear {a}": (lambda o, x, w, b, a=a: regfast.linear(x, w, b, activation=a), "xwb")
        for a in ("none", "relu", "gelu", "tanh")
    },
    "phm_linear": (
        lambda o, x, w, b: regfast.phm_linear(
            torch.cat([x, x[:, :1]], 1), w[:2, :2].expand(2, 2, 2), w[:6, :3].view(2, 3, 3), b[:6], activation="silu"
        ),
        "xwb",
    ),
    "softmax": (lambda o, z: regfast.softmax(z, -1), "z"),
    "log_softmax": (lambda o, z: regfast.log_softmax(z, 0), "z"),
    "logsumexp": (lambda o, z: regfast.logsumexp(z, 1), "z"),
}
LOSSES = {
    "mse_loss": (lambda o, z, y: regfast.mse_loss(z, y, **o), "zy"),
    "cross_entropy": (
        lambda o, z: regfast.cross_entropy(z, CLASSES, shares(V, dtype=z.dtype), label_smoothing=0.1, **o),
        "z",
    ),
    "cross_entropy, in place": (lambda o, z: regfast.cross_entropy(z * 2, CLASSES, inplace_backward=True, **o), "z"),
    "cross_entropy, probabilities": (lambda o, z, y: regfast.cross_entropy(z, y.softmax(1), z_loss=0.1, **o), "zy"),
    "cross_entropy, all outputs": (
        lambda o, z: regfast.cross_entropy(z, CLASSES, softcap=5.0, outputs=NAMES, **o),
        "z",
    ),
    "linear_cross_entropy": (
        lambda o, x, w, b: regfast.linear_cross_entropy(
            x, w, CLASSES, linear_bias=b, weight=shares(V, dtype=x.dtype), label_smoothing=0.1, memory_budget=1, **o
        ),
        "xwb",
    ),
    "linear_cross_entropy, argmax": (
        lambda o, x, w: regfast.linear_cross_entropy(x, w, CLASSES, outputs=("argmax", "loss"), **o),
        "xw",
    ),
    "linear_cross_entropy, probabilities": (
        lambda o, x, w, y: regfast.linear_cross_entropy(x, w, y.softmax(1), outputs=("loss", "lse"), **o),
        "xwy",
    ),
    "linear_mse_loss": (lambda o, x, w, b: regfast.linear_mse_loss(x, w, COUNTS, b, **o), "xwb"),
    "linear_nll, a learned gaussian": (
        lambda o, x, w, b: regfast.linear_nll(x, w, COUNTS, b, family="gaussian", sigma=b.exp(), **o),
        "xwb",
    ),
    "linear_nll, bernoulli": (
        lambda o, x, w: regfast.linear_nll(
            x,
            w,
            COUNTS.clamp(max=1),
            family="bernoulli",
            pos_weight=shares(V, dtype=x.dtype),
            sample_weight=shares(N, dtype=x.dtype),
            **o,
        ),
        "xw",
    ),
    "linear_nll, poisson": (lambda o, x, w, b: regfast.linear_nll(x, w, COUNTS, b, family="poisson", **o), "xwb"),
    "linear_nll, categorical": (
        lambda o, x, w: regfast.linear_nll(
            x, w, CLASSES, family="categorical", sample_weight=shares(N, dtype=x.dtype), **o
        ),
        "xw",
    ),
}
CASES = [(name, None) for name in OPS] + [(name, mode) for name in LOSSES for mode in REDUCTIONS]
cases = pytest.mark.parametrize(("name", "mode"), CASES)


def pairs_with_cases(names, *kinds):
    """Parametrizes by each case and some of the kinds, since to trace or compile a case takes long: each function meets
    each kind, a loss with another reduction; and so do the reductions, of one loss or another."""
    chosen = [
        (name, mode, *kind)
        for name, mode in CASES
        for j, kind in enumerate(kinds)
        if mode is None or (list(LOSSES).index(name) + REDUCTIONS.index(mode) + j) % len(REDUCTIONS) == 0
    ]
    return pytest.mark.parametrize(f"name, mode, {names}", chosen)


def bound(name, mode, dtype):
    """The differentiable outputs, a tuple, as a function of the differentiated operands; and these, leaves."""
    fn, names = (OPS | LOSSES)[name]
    options = {} if mode is None else {"reduction": mode}

    def call(*arguments):
        out = fn(options, *arguments)
        return tuple(o for o in ([out] if isinstance(out, torch.Tensor) else out) if o.is_floating_point())

    values = operands(dtype)
    return call, [values[n].clone().requires_grad_() for n in names]


def upstream(outputs, *batch):
    """Gradients of the outputs, of which the first in a batch are all one."""
    seeds = [torch.randn((*batch, *o.shape), dtype=torch.float64).to(o.dtype) for o in outputs]
    for seed in seeds if batch else ():
        seed[0] = 1
    return seeds


def close(ours, true, rounded=8):
    """Within some epsilons of the largest value: the order of sums may differ, and what is rounded on the way."""
    assert len(ours) == len(true)
    for a, b in zip(ours, true, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        error = (a.double() - b.double()).abs().max().item()
        assert error <= rounded * torch.finfo(b.dtype).eps * max(b.abs().max().item(), 0.1)


def gradients(fn, arguments, seeds):
    """The plain way: a new graph, and one backward through it that ends it."""
    return torch.autograd.grad(fn(*arguments), arguments, seeds, materialize_grads=True)


def each_by_itself(fn, arguments, batched_seeds):
    """The gradients of each loss of a batch by a backward of its own, stacked."""
    losses = [gradients(fn, arguments, [s[i] for s in batched_seeds]) for i in range(len(batched_seeds[0]))]
    return [torch.stack(each) for each in zip(*losses, strict=True)]


@cases
def test_a_batch_of_losses(name, mode, dtype):
    fn, arguments = bound(name, mode, dtype)
    seeds = upstream(fn(*arguments), 3)
    options = {"materialize_grads": True, "is_grads_batched": True}
    close(torch.autograd.grad(fn(*arguments), arguments, seeds, **options), each_by_itself(fn, arguments, seeds))


@cases
def test_a_batch_of_losses_by_vmap(name, mode, dtype):
    fn, arguments = bound(name, mode, dtype)
    out = fn(*arguments)
    seeds = upstream(out, 3)

    def backward(*seeds):
        return torch.autograd.grad(out, arguments, seeds, materialize_grads=True, retain_graph=True)

    close(torch.func.vmap(backward)(*seeds), each_by_itself(fn, arguments, seeds))


@cases
def test_vectorized_jacobians(name, mode, dtype):
    fn, arguments = bound(name, mode, dtype)
    for i, out in enumerate(fn(*arguments)):
        fast = jacobian(lambda *a, i=i: fn(*a)[i], tuple(arguments), vectorize=True)
        basis = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
        true = each_by_itself(lambda *a, i=i: (fn(*a)[i],), arguments, [basis])
        close(fast, [g.view(*out.shape, *a.shape) for g, a in zip(true, arguments, strict=True)])


@cases
def test_per_sample_gradients(name, mode, dtype):
    fn, arguments = bound(name, mode, dtype)
    seeds = upstream(fn(*arguments))
    batches = [torch.stack([a.detach(), a.detach() * 0.5]) for a in arguments]

    def weighted(*arguments):
        return sum((o.to(torch.float64) * s).sum() for o, s in zip(fn(*arguments), seeds, strict=True))

    every = tuple(range(len(arguments)))
    ours = torch.func.vmap(torch.func.grad(weighted, every))(*batches)
    true = [gradients(fn, [b.requires_grad_() for b in sample], seeds) for sample in zip(*batches, strict=True)]
    close(ours, [torch.stack(each) for each in zip(*true, strict=True)], rounded=16)


# Without the op whose backward writes over what another would read.
@pytest.mark.parametrize(("name", "mode"), [case for case in CASES if "in place" not in case[0]])
def test_backward_twice(name, mode, dtype):
    # Whatever was done to the first gradients, the second are the same; and so are those of a graph that is not kept.
    fn, arguments = bound(name, mode, dtype)
    for factor in (1.0, -0.75):
        out = fn(*arguments)
        seeds = [torch.full_like(o, factor) for o in out]
        first = torch.autograd.grad(out, arguments, seeds, retain_graph=True, materialize_grads=True)
        kept = [g.clone() for g in first]
        for g in first:
            g.fill_(1e4)
        second = torch.autograd.grad(out, arguments, seeds, retain_graph=True, materialize_grads=True)
        assert all(map(torch.equal, second, kept))
        last = torch.autograd.grad(out, arguments, seeds, materialize_grads=True)
        assert all(map(torch.equal, last, kept))
        assert all(map(torch.equal, gradients(fn, arguments, seeds), kept))


@cases
def test_gradients_that_are_differentiated_again(name, mode, dtype):
    fn, arguments = bound(name, mode, dtype)
    out = fn(*arguments)
    seeds = [s.requires_grad_() for s in upstream(out)]
    ours = torch.autograd.grad(out, arguments, seeds, create_graph=True, materialize_grads=True)
    close(ours, gradients(fn, arguments, [s.detach() for s in seeds]), rounded=16)
    # Gradients are linear in those upstream.
    total = sum((g.double() * (1 + i)).sum() for i, g in enumerate(ours))
    again = torch.autograd.grad(total, seeds, allow_unused=True, materialize_grads=True)
    assert abs(sum((a.double() * s.double()).sum() for a, s in zip(again, seeds, strict=True)) - total) <= 64 * (
        torch.finfo(dtype).eps * max(1, *(g.abs().sum().item() for g in ours))
    )


# Of one type with its accumulator, and of another.
@pairs_with_cases(
    "dtype, mode_of_tracing",
    *((dtype, how) for dtype in (torch.float32, torch.bfloat16) for how in ("real", "fake", "symbolic")),
)
def test_traced_gradients(name, mode, dtype, mode_of_tracing):
    # The graph computes the gradients of other values too, for other upstream gradients.
    fn, arguments = bound(name, mode, dtype)
    seeds = [torch.ones_like(o) for o in fn(*arguments)]
    others = [s * -0.75 for s in seeds]
    shifted = [(a.detach() * 0.5).requires_grad_() for a in arguments]

    def backward(arguments, seeds):
        return gradients(fn, arguments, seeds)

    # Classes and weights are constants of the graph.
    graph = make_fx(backward, tracing_mode=mode_of_tracing, _allow_non_fake_inputs=True)(arguments, seeds)
    assert "local_scalar" not in graph.code and "aten.item" not in graph.code
    close(graph(arguments, seeds), gradients(fn, arguments, seeds))
    close(graph(shifted, others), gradients(fn, shifted, others))


@pairs_with_cases("dtype, compiled_forward", (torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))
def test_compiled_autograd(name, mode, dtype, compiled_forward):
    torch._dynamo.reset()
    fn, arguments = bound(name, mode, dtype)
    forward = torch.compile(fn, backend="aot_eager", fullgraph=True) if compiled_forward else fn
    for factor in (1.0, -0.75):
        seeds = [torch.full_like(o, factor) for o in fn(*arguments)]
        true = gradients(fn, arguments, seeds)
        leaves = [a.detach().clone().requires_grad_() for a in arguments]
        with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            torch.autograd.backward(forward(*leaves), seeds)
        close([torch.zeros_like(a) if a.grad is None else a.grad for a in leaves], true)
    torch._dynamo.reset()


def test_a_compiled_backward_of_a_kept_graph():
    # It may not write over what the graph keeps.
    x, w = (t.requires_grad_() for t in (spiky(N, D), spiky(V, D)))
    loss = regfast.linear_cross_entropy(x, w, CLASSES)
    true = gradients(lambda x, w: (regfast.linear_cross_entropy(x, w, CLASSES),), [x, w], [torch.tensor(3.0)])
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward(torch.tensor(3.0), retain_graph=True)
        loss.backward(torch.tensor(3.0))
    close([x.grad / 2, w.grad / 2], true)


def test_batched_targets_of_probabilities(dtype):
    # A gradient of the target is of the size of the logits, which no forward saves.
    x, w, t = (spiky(N, D, dtype=dtype), spiky(V, D, dtype=dtype), probability_targets(N, V, dtype=dtype))
    arguments = [a.requires_grad_() for a in (x, w, t)]

    def fn(x, w, t):
        return (regfast.linear_cross_entropy(x, w, t),)

    seeds = upstream(fn(*arguments), 3)
    ours = torch.autograd.grad(fn(*arguments), arguments, seeds, is_grads_batched=True)
    close(ours, each_by_itself(fn, arguments, seeds))


def test_a_mode_sees_no_value_read():
    # A mode that wraps, counts or records operators is told of each; a value read in C++ would be hidden from it.
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, w = (t.requires_grad_() for t in (spiky(N, D), spiky(V, D)))
    target = class_targets((N,), V)
    with Record():
        regfast.linear_cross_entropy(x, w, target).backward()
    assert "regfast.linear_cross_entropy_forward_backward.default" in seen
    assert not any("aten.item" in name or "local_scalar" in name for name in seen)
