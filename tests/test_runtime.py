"""Threads, processes, memory, and how a graph is kept and run again."""

import gc
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from util import class_targets, evaluate, fresh_process, probability_targets, spiky

import regfast

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory and threads from Linux's /proc")
NAMES = ("loss", "lse", "entropy", "logprob")


def everything(x, w, b, target):
    """Every op once, large enough for several threads; a list of results."""
    z = regfast.linear(x, w, b, activation="gelu")
    return [
        z,
        regfast.softmax(z, -1),
        regfast.log_softmax(z, 0),
        regfast.logsumexp(z, 1),
        regfast.mse_loss(z, z.detach() * 2),
        *regfast.cross_entropy(z, target, outputs=NAMES, label_smoothing=0.1, z_loss=0.01),
    ]


def arguments(dtype=torch.float32):
    torch.manual_seed(4)
    x, w, b = (spiky(*s, dtype=dtype).requires_grad_() for s in ((200, 96), (700, 96), (700,)))
    return [x, w, b, class_targets((200,), 700, 0.2)]


def run(dtype=torch.float32, grads=None):
    """The results and gradients of everything(), from the same inputs each time."""
    return evaluate(everything, arguments(dtype), grads)


# Threads


def test_concurrent_calls(dtype):
    tensors = arguments(dtype)
    out, grad, grads = evaluate(everything, tensors, None)

    def same(_):
        again = evaluate(everything, tensors, grads)
        return all(torch.equal(a, b) for a, b in zip(out + grad, again[0] + again[1], strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, range(24)))


def test_backward_in_another_thread():
    x = spiky(50, 300).requires_grad_()
    loss = regfast.cross_entropy(x, class_targets((50,), 300, 0.2))
    (true,) = torch.autograd.grad(loss, x, retain_graph=True)
    with ThreadPoolExecutor(1) as pool:
        (grad,) = pool.submit(torch.autograd.grad, loss, x).result()
    assert torch.equal(grad, true)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_same_bits_on_every_run(threads, count, dtype):
    # test_threads.py compares numbers of threads, for each op and size.
    torch.set_num_threads(count)
    out, grad, grads = run(dtype)
    for _ in range(3):
        again = run(dtype, grads)
        assert all(torch.equal(a, b) for a, b in zip(out + grad, again[0] + again[1], strict=True))


THREADS = """
    import os, torch, regfast
    torch.set_num_threads({count})
    before = len(os.listdir("/proc/self/task"))
    x = torch.randn(512, 4096, requires_grad=True)
    w = torch.randn(64, 4096, requires_grad=True)
    t = torch.randint(4096, (512,))
    with torch.no_grad():
        regfast.linear(x, w), regfast.softmax(x), regfast.logsumexp(x), regfast.mse_loss(x, x)
        regfast.cross_entropy(x, t)
    torch.autograd.grad(regfast.cross_entropy(x, t), x)
    print(len(os.listdir("/proc/self/task")) - before)
"""


@linux
def test_set_num_threads_is_obeyed():
    assert int(fresh_process(THREADS.format(count=1))) == 0
    # torch may keep a pool of its own besides OpenMP's; ours starts at most the other two of three.
    assert 0 < int(fresh_process(THREADS.format(count=3))) <= 2


def test_one_thread_per_worker_process():
    out = fresh_process(
        "import torch, regfast; x = torch.randn(300, 500); print(regfast.softmax(x).sum().item())", OMP_NUM_THREADS="1"
    )
    assert abs(float(out) - 300) < 1e-2


# Processes


class Probabilities(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        x = torch.arange(300.0).view(20, 15) * (0.01 * (i + 1))
        return regfast.softmax(regfast.linear(x, torch.eye(15)), 0)


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin", reason="no fork on this platform"
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_data_loader_workers():
    run()  # the parent has used its thread pool, which a forked child does not have
    loader = DataLoader(Probabilities(), batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=60)
    got = torch.cat(list(loader))
    torch.testing.assert_close(got, torch.stack([Probabilities()[i] for i in range(12)]))


# Memory


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@linux
def test_ten_thousand_steps_without_growth():
    model = torch.nn.Sequential(regfast.Linear(20, 16, activation="relu"), regfast.Linear(16, 7))
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, target = spiky(8, 20), class_targets((8,), 7, 0.2)
    loss = regfast.CrossEntropyLoss(outputs=("loss", "lse", "argmax"))

    def steps(count):
        for _ in range(count):
            optimiser.zero_grad()
            got = loss(model(x), target)
            (got.loss + got.lse.mean() + regfast.mse_loss(regfast.softmax(model(x)), x[:, :7])).backward()
            optimiser.step()
        gc.collect()

    steps(1000)
    before = resident()
    steps(10_000)
    assert resident() - before < 4 * 2**20


def saved_bytes(call, *inputs):
    """Bytes that the graph of a call keeps beyond the memory of its inputs and outputs."""
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call(*inputs)
    for t in (*inputs, *(out if isinstance(out, tuple) else (out,))):
        saved.pop(t.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def test_no_probabilities_are_saved():
    n, c = 256, 1000
    x = spiky(n, c).requires_grad_()
    row = n * 16  # a few numbers per row
    for target in (class_targets((n,), c, 0.2), probability_targets(n, c)):
        for options in (
            {},
            {"label_smoothing": 0.1, "weight": torch.rand(c)},
            {"outputs": NAMES, "softcap": 9.0, "z_loss": 0.1},
        ):
            inputs = [x, target, *(v for v in options.values() if isinstance(v, torch.Tensor))]
            assert saved_bytes(lambda *_, t=target, o=options: regfast.cross_entropy(x, t, **o), *inputs) <= 2 * row
    assert saved_bytes(lambda x: regfast.softmax(x), x) == 0
    assert saved_bytes(lambda x: regfast.logsumexp(x), x) <= row
    y = spiky(n, c)
    assert saved_bytes(regfast.mse_loss, x, y) == 0


def test_linear_saves_only_what_the_derivative_needs():
    x, w, b = spiky(64, 32).requires_grad_(), spiky(48, 32).requires_grad_(), spiky(48).requires_grad_()
    for activation in ("none", "relu", "sigmoid", "tanh"):
        assert saved_bytes(lambda *t, a=activation: regfast.linear(*t, activation=a), x, w, b) == 0
    for activation in ("gelu", "gelu_tanh", "silu"):
        assert saved_bytes(lambda *t, a=activation: regfast.linear(*t, activation=a), x, w, b) == 64 * 48 * 4


def test_what_no_derivative_needs_is_not_kept():
    # As in torch: it may be changed or freed between forward and backward.
    x, w, b = spiky(64, 32), spiky(48, 32), spiky(48)
    for frozen in (x, w):
        leaves = [t.clone().requires_grad_(t is not frozen) for t in (x, w, b)]
        unneeded = [1, 2] if frozen is x else [0, 2]
        out = regfast.linear(*leaves)
        with torch.no_grad():
            for i in unneeded:
                leaves[i].zero_()
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        seed = spiky(64, 48)
        ours = torch.autograd.grad(out, wanted, seed)
        again = [t.clone().requires_grad_(t is not frozen) for t in (x, w, b)]
        true = torch.autograd.grad(F.linear(*again), [t for t in again if t.requires_grad], seed)
        torch.testing.assert_close(ours, true)
    for op in (regfast.softmax, regfast.log_softmax):
        hidden = x.clone().requires_grad_() * 1
        out = op(hidden)
        hidden.zero_()
        out.sum().backward()


def test_nothing_is_saved_without_a_gradient():
    x, target = spiky(64, 100), class_targets((64,), 100)
    assert saved_bytes(lambda x, t: regfast.cross_entropy(x, t), x, target) == 0
    with torch.no_grad():
        assert not regfast.cross_entropy(x.requires_grad_(), target).requires_grad


PEAK = """
    import torch, regfast
    def status(name):
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
    def step(n, c, inplace):
        leaf = torch.zeros(n, c, requires_grad=True)
        x = leaf.view(n, c)
        with torch.no_grad():
            leaf.normal_()
        t = torch.randint(c, (n,))
        open("/proc/self/clear_refs", "w").write("5")
        before = status("VmRSS")
        loss = regfast.cross_entropy(x, t, inplace_backward=inplace)
        (grad,) = torch.autograd.grad(loss, x)
        assert grad.shape == (n, c)
        return (status("VmHWM") - before) / (4 * n * c)
    step(8, 1000, {inplace})
    print(step(2048, 8192, {inplace}))
"""


@linux
@pytest.mark.parametrize("inplace, buffers", [(False, 1.0), (True, 0.0)], ids=["plain", "inplace"])
def test_peak_memory_of_training(inplace, buffers):
    # In N x C buffers: the gradient and nothing else, or nothing at all. Torch takes 2 or 3.
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this kernel does not reset the high-water mark")
    used = float(fresh_process(PEAK.format(inplace=inplace)))
    assert buffers - 0.1 <= used <= buffers + 0.15, f"{used:.2f} buffers of N x C"


# Graphs


def test_retained_graph_gives_the_same_gradient_twice():
    # A grad_output other than one: a backward that scales what it saved would give its square the second time.
    x, w, b, target = arguments()
    out = everything(x, w, b, target)
    seeds = [torch.randn_like(o) for o in out]
    first, second = (torch.autograd.grad(out, [x, w, b], seeds, retain_graph=True) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    torch.autograd.grad(out, [x, w, b], seeds)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, [x, w, b], seeds)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    x, w, b, target = arguments()

    def block(x, w, b):
        return regfast.linear(regfast.linear(x, w, b, activation="silu"), w.T, activation="tanh")

    results = []
    for run_block in (block, lambda *t: checkpoint(block, *t, use_reentrant=reentrant)):
        value = regfast.cross_entropy(run_block(x, w, b), target % 96)
        value.backward()
        results.append([t.grad for t in (x, w, b)])
        for t in (x, w, b):
            t.grad = None
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_checkpointing_the_loss():
    x, target = spiky(30, 40).requires_grad_(), class_targets((30,), 40, 0.2)
    value = checkpoint(lambda x: regfast.cross_entropy(x, target, label_smoothing=0.1), x, use_reentrant=False)
    (grad,) = torch.autograd.grad(value, x, torch.tensor(3.0))
    (true,) = torch.autograd.grad(regfast.cross_entropy(x, target, label_smoothing=0.1), x, torch.tensor(3.0))
    assert torch.equal(grad, true)


def test_changing_a_saved_input_is_noticed():
    x, w, target = spiky(6, 9).requires_grad_(), spiky(5, 9).requires_grad_(), class_targets((6,), 5)
    for call in (
        lambda h: regfast.linear(h, w),
        lambda h: regfast.cross_entropy(h[:, :5], target),
        lambda h: regfast.logsumexp(h),
        lambda h: regfast.mse_loss(h, x.detach()),
    ):
        hidden = x * 2
        out = call(hidden)
        hidden.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_saved_outputs_changed_in_place_are_noticed():
    x = spiky(6, 9).requires_grad_()
    for op in (regfast.softmax, regfast.log_softmax):
        out = op(x)
        out.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_gradients_accumulate():
    x, target = spiky(6, 9).requires_grad_(), class_targets((6,), 9)
    for _ in range(3):
        regfast.cross_entropy(x, target).backward()
    (true,) = torch.autograd.grad(F.cross_entropy(x, target), x)
    torch.testing.assert_close(x.grad, 3 * true)


def test_hooks_and_inference_mode():
    x, seen = spiky(6, 9).requires_grad_(), []
    out = regfast.softmax(x)
    out.register_hook(lambda g: seen.append(g) or g * 2)
    seed = torch.randn(6, 9)
    (grad,) = torch.autograd.grad(out, x, seed)
    (true,) = torch.autograd.grad(F.softmax(x, -1), x, seed * 2)
    torch.testing.assert_close(grad, true)
    with torch.inference_mode():
        inside = regfast.linear(x, x, activation="relu")
        assert inside.is_inference() and not inside.requires_grad
        torch.testing.assert_close(inside, F.relu(F.linear(x, x)))
    assert len(seen) == 1
