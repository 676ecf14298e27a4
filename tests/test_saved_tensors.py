"""What the graph of each op keeps: all of it saved tensors, seen by hooks, checked for changes and freed with them."""

import copy
import gc
import os
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import allow_mutation_on_saved_tensors, save_on_cpu, saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from util import class_targets, measures_memory, probability_targets, spiky

import regfast

N, D, V = 96, 64, 128
NAMES = ("loss", "lse", "entropy", "logprob")
MODES = ("none", "mean", "sum")
ACTIVATIONS = regfast._C.ACTIVATIONS
FROM_PREACTIVATION = ("gelu", "gelu_tanh", "silu")  # for second derivatives of these, the bias is saved too


def counts():
    return torch.randint(4, (N, V)).float()


def shares(count):
    return torch.rand(count) + 0.1


# Operands by name; those in lower case are differentiated.
MAKE = {
    "x": lambda: spiky(N, D, size=1.0),
    "w": lambda: spiky(V, D, size=1.0) / 8,
    "b": lambda: spiky(V, size=1.0),
    "z": lambda: spiky(N, V, size=1.0),
    "y": lambda: spiky(N, V, size=1.0),
    "p": lambda: probability_targets(N, V),
    "a": lambda: spiky(2, 2, 2),
    "s": lambda: spiky(2, V // 2, D // 2) / 8,
    "v": lambda: shares(V),
    "T": lambda: class_targets((N,), V, 0.2),
    "C": counts,
    "B": lambda: counts().clamp(max=1),
    "K": lambda: shares(V),  # of classes
    "R": lambda: shares(N),  # of rows
}
# name -> (function of operands and options, operands, what of them is not saved)
OPS = {
    **{
        f"linear {name}": (
            lambda x, w, b, name=name: regfast.linear(x, w, b, activation=name),
            "xwb",
            "" if name in FROM_PREACTIVATION else "b",
        )
        for name in ACTIVATIONS
    },
    **{
        f"phm_linear {name}": (
            lambda x, a, s, b, name=name: regfast.phm_linear(x, a, s, b, activation=name),
            "xasb",
            "" if name in FROM_PREACTIVATION else "b",
        )
        for name in ("none", "relu", "gelu")
    },
    "softmax": (lambda z: regfast.softmax(z, 1), "z", "z"),
    "log_softmax": (lambda z: regfast.log_softmax(z, 0), "z", "z"),
    "logsumexp": (lambda z: regfast.logsumexp(z, 1), "z", ""),
}
LOSSES = {
    "mse_loss": (lambda z, y, **o: regfast.mse_loss(z, y, **o), "zy", ""),
    "cross_entropy": (lambda z, T, K, **o: regfast.cross_entropy(z, T, K, label_smoothing=0.1, **o), "zTK", ""),
    "cross_entropy, probabilities": (lambda z, p, K, **o: regfast.cross_entropy(z, p, K, **o), "zpK", ""),
    "cross_entropy, all outputs": (
        lambda z, T, **o: sum(r.sum() for r in regfast.cross_entropy(z, T, outputs=NAMES, **o)),
        "zT",
        "",
    ),
    "linear_cross_entropy": (
        lambda x, w, b, T, K, **o: regfast.linear_cross_entropy(x, w, T, linear_bias=b, weight=K, **o),
        "xwbTK",
        "",
    ),
    "linear_cross_entropy, probabilities": (
        lambda x, w, p, **o: regfast.linear_cross_entropy(x, w, p, **o),
        "xwp",
        "",
    ),
    "linear_mse_loss": (
        lambda x, w, b, C, R, **o: regfast.linear_mse_loss(x, w, C, b, sample_weight=R, **o),
        "xwbCR",
        "",
    ),
    "linear_nll, a learned gaussian": (
        lambda x, w, b, C, v, **o: regfast.linear_nll(x, w, C, b, family="gaussian", sigma=v, **o),
        "xwbCv",
        "",
    ),
    "linear_nll, bernoulli": (
        lambda x, w, B, K, **o: regfast.linear_nll(x, w, B, family="bernoulli", pos_weight=K, **o),
        "xwBK",
        "",
    ),
    "linear_nll, poisson": (lambda x, w, b, C, **o: regfast.linear_nll(x, w, C, b, family="poisson", **o), "xwbC", ""),
}
CASES = {name: (fn, names, free, {}) for name, (fn, names, free) in OPS.items()} | {
    f"{name}, {mode}": (fn, names, free, {"reduction": mode})
    for name, (fn, names, free) in LOSSES.items()
    for mode in MODES
}
cases = pytest.mark.parametrize("name", CASES)
REDUCED_LINEAR = [name for name in CASES if name.startswith(("linear_", "cross_entropy")) and "none" not in name]


def build(name):
    """The call and its operands, of which the differentiated ones are leaves."""
    fn, names, _, options = CASES[name]
    tensors = [MAKE[n]() for n in names]
    for n, t in zip(names, tensors, strict=True):
        t.requires_grad_(n.islower())
    return lambda *t: fn(*t, **options), tensors


def leaves(tensors):
    return [t for t in tensors if t.requires_grad]


def gradients(call, tensors, factor=-0.75):
    out = call(*tensors)
    return torch.autograd.grad(out, leaves(tensors), torch.full_like(out, factor))


def close(ours, true):
    # Relative to the largest: where a gradient is computed decides the order of its sums.
    for a, b in zip(ours, true, strict=True):
        assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, b.abs().max().item()))


def allocated(fn):
    """What fn returns, the bytes that it leaves allocated, and the most that were allocated at once."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        result = fn()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    kept = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        kept += event.nbytes()
        peak = max(peak, kept)
    return result, kept, peak


# Hooks


@cases
def test_hooks_see_all_that_a_graph_keeps(name):
    # Packed into nothing, what is saved leaves nothing behind but the result.
    call, tensors = build(name)

    def forward():
        with saved_tensors_hooks(lambda t: None, lambda _: None):
            return call(*tensors)

    out, kept, _ = allocated(forward)
    assert kept - out.nbytes <= 2048


@cases
def test_packed_and_unpacked_elsewhere(name):
    call, tensors = build(name)
    true = gradients(call, tensors)
    with save_on_cpu():
        close(gradients(call, tensors), true)
    # Copies, as from another device or a file; what was packed is not written on.
    packed = []

    def pack(t):
        packed.append((t, t.clone()))
        return len(packed) - 1

    with saved_tensors_hooks(pack, lambda i: packed[i][1].clone()):
        close(gradients(call, tensors), true)
    with saved_tensors_hooks(pack, lambda i: packed[i][0]):
        close(gradients(call, tensors), true)
    assert packed and all(torch.equal(t, before) for t, before in packed)


@cases
def test_mutation_of_saved_tensors_where_it_is_allowed(name):
    call, tensors = build(name)
    true = gradients(call, tensors)
    with allow_mutation_on_saved_tensors():
        inputs = [t.clone() for t in tensors]
        out = call(*inputs)
        for t in inputs:
            t.detach().zero_()
        grads = torch.autograd.grad(out, leaves(tensors), torch.full_like(out, -0.75))
    close(grads, true)


# Checkpoints


@pytest.mark.parametrize("reentrant", [False, True])
@cases
def test_checkpointed(name, reentrant):
    call, tensors = build(name)
    true = gradients(call, tensors)
    out = checkpoint(call, *tensors, use_reentrant=reentrant)
    out.backward(torch.full_like(out, -0.75))
    close([t.grad for t in leaves(tensors)], list(true))


@pytest.mark.parametrize("name", REDUCED_LINEAR)
def test_a_checkpoint_needs_no_more_memory(name):
    call, tensors = build(name)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    gradients(call, tensors)

    def step(run):
        out = run(*tensors)
        return torch.autograd.grad(out, leaves(tensors), torch.full_like(out, -0.75))

    (_, _, plain), (_, _, ours) = (
        allocated(lambda run=run: step(run)) for run in (call, lambda *t: checkpoint(call, *t, **options))
    )
    assert ours <= plain + 1024
    out, kept, _ = allocated(lambda: checkpoint(call, *tensors, **options))
    assert kept - out.nbytes <= 2048


# Graphs that end


@cases
def test_what_is_saved_goes_with_backward(name):
    # The graph itself lives on as long as its result.
    call, tensors = build(name)

    def step():
        out = call(*tensors)
        return out, torch.autograd.grad(out, leaves(tensors), torch.ones_like(out))

    (out, grads), kept, _ = allocated(step)
    assert kept - out.nbytes - sum(g.untyped_storage().nbytes() for g in grads) <= 2048


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@measures_memory
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_thousand_graphs_without_growth(backward):
    # A cycle of a graph and what it keeps would free nothing of it.
    runs = [build(name) for name in CASES]

    def graphs(count):
        for call, tensors in runs:
            for _ in range(count):
                out = call(*tensors)
                if backward:
                    torch.autograd.grad(out, leaves(tensors), torch.ones_like(out))

    graphs(20)
    gc.disable()
    try:
        before = resident()
        graphs(1000 // len(runs))
        assert resident() - before < 8 * 2**20
    finally:
        gc.enable()


# Changes between forward and backward


@cases
def test_a_saved_input_that_changes_is_noticed(name):
    _, names, free, _ = CASES[name]
    call, tensors = build(name)
    true = gradients(call, tensors)
    for i, operand in enumerate(names):
        inputs = [t * 1 for t in tensors]
        out = call(*inputs)
        inputs[i].detach().mul_(1)  # by a tensor of the same memory
        run = lambda out=out: torch.autograd.grad(out, leaves(tensors), torch.full_like(out, -0.75))  # noqa: E731
        if operand in free:
            close(run(), true)
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                run()


@pytest.mark.parametrize("name", ["softmax", "log_softmax", *(f"linear {a}" for a in ("relu", "sigmoid", "tanh"))])
def test_a_saved_output_that_changes_is_noticed(name):
    call, tensors = build(name)
    out = call(*tensors)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# Nodes


@cases
def test_hooks_of_nodes(name):
    call, tensors = build(name)
    true = gradients(call, tensors)
    out, seen = call(*tensors), []
    out.grad_fn.register_prehook(lambda grads: tuple(g * 3 for g in grads))
    out.grad_fn.register_hook(lambda results, grads: seen.append((len(results), len(grads))))
    out.register_hook(lambda g: g * 2)
    grads = torch.autograd.grad(out, leaves(tensors), torch.full_like(out, -0.75))
    close(grads, [6 * g for g in true])
    assert seen == [(len(out.grad_fn.next_functions), 1)]


@cases
def test_copies_of_results(name):
    call, tensors = build(name)
    out = call(*tensors)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(out)
    assert torch.equal(copy.deepcopy(out.detach()), out)
