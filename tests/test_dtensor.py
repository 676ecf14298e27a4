"""DTensors on two processes of gloo: tensor parallel layers, sharded rows, values and gradients."""

import subprocess
import sys

import pytest
import torch
from util import ROOT, fresh_process

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch has no distributed")

WORKER = '''
import sys, tempfile, torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
import regfast

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))


def compare(what, fn, tensors, placements, true=None, placed=None):
    """Value and gradients of DTensors against those of whole tensors."""
    whole = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
    parts = [
        distribute_tensor(t.detach(), mesh, [p]).requires_grad_(t.requires_grad)
        for t, p in zip(tensors, placements, strict=True)
    ]
    expected, got = (true or fn)(*whole), fn(*parts)
    assert isinstance(got, DTensor), what
    if placed is not None:
        assert got.placements == (placed,), (what, got.placements)
    torch.testing.assert_close(got.full_tensor(), expected, msg=lambda m: f"{what}: {m}")
    torch.manual_seed(1)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    # Of a whole tensor each process has the gradient.
    got.redistribute(mesh, [Replicate()]).backward(distribute_tensor(grad, mesh, [Replicate()]))
    for i, (a, b) in enumerate(zip(whole, parts, strict=True)):
        if a.requires_grad:
            torch.testing.assert_close(b.grad.full_tensor(), a.grad, msg=lambda m, i=i: f"{what}, input {i}: {m}")


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


torch.manual_seed(0)
S0, S1, R = Shard(0), Shard(1), Replicate()
for activation in ("none", "relu", "gelu"):
    for placements in ([S0, R, R], [R, S0, S0], [S1, S1, R], [R, R, R], [S0, S0, S0]):
        for bias in (True, False):
            tensors = [leaf(6, 8), leaf(4, 8), *([leaf(4)] if bias else [])]
            compare(
                f"linear {activation} {placements} {bias}",
                lambda x, w, b=None: regfast.linear(x, w, b, activation=activation),
                tensors, placements[: len(tensors)],
            )
    compare("linear 3d", lambda x, w, b: regfast.linear(x, w, b, activation=activation),
            [leaf(2, 6, 8), leaf(4, 8), leaf(4)], [S1, R, R], placed=S1)
x = leaf(6, 8)
compare("frozen weight", lambda x, w: regfast.linear(x, w), [x, torch.randn(4, 8)], [R, S0])
compare("frozen input", lambda x, w: regfast.linear(x, w), [torch.randn(6, 8), leaf(4, 8)], [S0, R])

for rows in (6, 5):
    for placement in (S0, S1, R):
        kept = placement if placement != S1 else None
        for fn in (regfast.softmax, regfast.log_softmax):
            compare(fn.__name__, lambda x: fn(x, -1), [leaf(rows, 4)], [placement], placed=kept)
            compare(fn.__name__, lambda x: fn(x, 0), [leaf(rows, 4)], [placement])
        for keepdim in (False, True):
            compare("logsumexp", lambda x: regfast.logsumexp(x, 1, keepdim), [leaf(rows, 4)], [placement], placed=kept)
            compare("logsumexp", lambda x: regfast.logsumexp(x, 0, keepdim), [leaf(rows, 4)], [placement])
        for reduction in ("none", "mean", "sum"):
            for other in (placement, R):
                compare("mse_loss " + reduction, lambda x, y: regfast.mse_loss(x, y, reduction=reduction),
                        [leaf(rows, 4), leaf(rows, 4)], [placement, other])

classes = torch.tensor([1, 0, -100, 3, 2, -100])
shares = torch.randn(6, 4).softmax(1).requires_grad_()
for placement in (S0, R):
    for reduction in ("none", "mean", "sum"):
        for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.2}):
            for weight in (None, torch.rand(4) + 0.5):
                extra = [] if weight is None else [weight]
                call = lambda x, t, w=None: regfast.cross_entropy(x, t, w, reduction=reduction, **options)
                for target in (classes, shares):
                    compare(f"cross_entropy {placement} {reduction} {options} {weight is None}", call,
                            [leaf(6, 4), target, *extra], [placement, placement, R][: 2 + len(extra)],
                            placed=placement if reduction == "none" else Partial() if placement == S0 and
                            reduction == "sum" else R)
    compare("positions", lambda x, t: regfast.cross_entropy(x, t),
            [leaf(4, 5, 3), torch.randint(5, (4, 3))], [placement, placement])
    for name in ("lse", "entropy", "logprob"):
        compare(name, lambda x, t: regfast.cross_entropy(x, t, outputs=name), [leaf(6, 4), classes],
                [placement, placement])


def model(make):
    torch.manual_seed(3)
    return nn.Sequential(make(8, 16), nn.ReLU(), make(16, 4))


data = torch.randn(6, 8)
plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
ours = parallelize_module(model(regfast.Linear), mesh, plan)
theirs = model(nn.Linear)
for module in (ours, theirs):
    module(data).square().sum().backward()
torch.testing.assert_close(ours(data), theirs(data))
for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
    torch.testing.assert_close(a.grad.full_tensor(), b.grad)

# A layer with an activation, whose linear is parallel.
layer = regfast.Linear(8, 4, activation="gelu")
true = layer(data)
parallelize_module(layer, mesh, {"linear": ColwiseParallel(output_layouts=Replicate())})
torch.testing.assert_close(layer(data), true)
dist.barrier()
dist.destroy_process_group()
print("done")
'''


def test_two_processes(tmp_path):
    arguments = [sys.executable, "-c", WORKER]
    ranks = [
        subprocess.Popen(
            [*arguments, str(rank), str(tmp_path / "store")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert all(process.returncode == 0 for process in ranks), "\n".join(outputs)
    assert all("done" in output for output in outputs)


@pytest.mark.parametrize("first", ["regfast", "torch.distributed.tensor"])
def test_rules_come_with_the_import_of_dtensors_alone(first):
    fresh_process(f"""
        import sys, torch
        import {first}
        import regfast
        assert ("torch.distributed.tensor" in sys.modules) == ({first!r} != "regfast")
        from torch.distributed.tensor import DTensor
        rules = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
        assert torch.ops.regfast.linear_forward.default in rules
    """)
