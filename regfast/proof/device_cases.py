"""What only a device can show, of each op: graphs, streams, waiting, other devices."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import regfast

from .. import _C
from .cases import FLOATING, Case, Sizes, Skip
from .compare import assert_same_bits, classes_of, spiky
from .large_cases import large_cases, need_memory
from .machine import Machine

Outputs = list[Tensor]


def _nll(x: Tensor, w: Tensor, z: Tensor, b: Tensor) -> Outputs:
    weight = x.detach()[:, 0].square()
    return [
        regfast.linear_mse_loss(x, w, z.detach(), b),
        regfast.linear_nll(x, w, z.detach(), b, family="gaussian", sigma=b.square() + 1, sample_weight=weight),
        regfast.linear_nll(x, w, z.detach().sigmoid(), b, family="bernoulli", reduction="none"),
    ]


# What a step of each op computes, of x, w and b, the logits z that they make, and classes.
STEPS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Outputs]] = {
    "linear": lambda x, w, b, z, t: [regfast.linear(x, w, b, activation="gelu")],
    "softmax": lambda x, w, b, z, t: [regfast.softmax(z, -1), regfast.softmax(z, 0)],
    "log_softmax": lambda x, w, b, z, t: [regfast.log_softmax(z, -1), regfast.log_softmax(z, 0)],
    "logsumexp": lambda x, w, b, z, t: [regfast.logsumexp(z, 1), regfast.logsumexp(z, 0)],
    "cross_entropy": lambda x, w, b, z, t: [
        regfast.cross_entropy(z, t),
        *regfast.cross_entropy(z, t, outputs=FLOATING, label_smoothing=0.1, z_loss=0.01),
    ],
    "linear_cross_entropy": lambda x, w, b, z, t: [
        regfast.linear_cross_entropy(x, w, t, linear_bias=b, memory_budget=1),
        *regfast.linear_cross_entropy(x, w, t, linear_bias=b, memory_budget=1, outputs=FLOATING, reduction="none"),
    ],
    "linear_nll": lambda x, w, b, z, t: _nll(x, w, z, b),
    "phm_linear": lambda x, w, b, z, t: [
        regfast.phm_linear(x, b[:64].view(4, 4, 4), w[:16].view(4, 16, 24), b[:64], activation="silu")
    ],
    "mse_loss": lambda x, w, b, z, t: [regfast.mse_loss(z, z.detach() * 2)],
}


def arguments(place: torch.device) -> list[Tensor]:
    torch.manual_seed(4)
    x, w, b = (spiky(*s, dtype=torch.bfloat16, device=place).requires_grad_() for s in ((200, 96), (1700, 96), (1700,)))
    return [x, w, b, classes_of((200,), 1700, place)]


def step(op: str, tensors: list[Tensor]) -> Outputs:
    """All results and gradients; sums of losses, so that no gradient needs a number from the device."""
    x, w, b, target = tensors
    out = STEPS[op](x, w, b, F.linear(x, w, b), target)
    loss = torch.stack([o.float().square().sum() for o in out]).sum()
    grads = torch.autograd.grad(loss, tensors[:3], allow_unused=True)
    return [*out, *(grad for grad in grads if grad is not None)]


def device_cases(sizes: Sizes, machine: Machine) -> Iterator[Case]:
    for op in _C.CUDA_OPS:
        yield Case(op, f"the same bits of {sizes.repeats} steps", partial(check_same_bits, machine, op, sizes.repeats))
        if not machine.has_streams or not sizes.alone:
            continue
        yield Case(op, "no waiting for the device", partial(check_no_synchronisation, machine, op))
        yield Case(op, "captured in a graph", partial(check_graph_capture, machine, op))
        yield Case(op, "on a stream that is still busy", partial(check_streams, machine, op))
        yield Case(op, "on another device than the current one", partial(check_devices, machine, op))
    yield Case("cross_entropy", "backward again", partial(check_backward_again, machine))
    if sizes.alone:
        yield Case("cross_entropy", "classes out of range", partial(check_class_out_of_range, machine))
        yield from large_cases(machine)
        yield Case("linear_cross_entropy", "memory as planned", partial(check_memory_of_chunks, machine))


def check_same_bits(machine: Machine, op: str, repeats: int) -> None:
    first = step(op, arguments(machine.place))
    for _ in range(repeats):
        assert_same_bits(first, step(op, arguments(machine.place)), "another step")


def check_no_synchronisation(machine: Machine, op: str) -> None:
    tensors = arguments(machine.place)
    step(op, tensors)
    machine.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(op, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_graph_capture(machine: Machine, op: str) -> None:
    tensors = arguments(machine.place)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warms up what must not be set up while capturing
        for _ in range(3):
            step(op, tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(op, tensors)
    with torch.no_grad():
        tensors[0].copy_(spiky(*tensors[0].shape, dtype=tensors[0].dtype, device=machine.place))
        tensors[3].copy_(classes_of((200,), 1700, machine.place))
    graph.replay()
    machine.synchronize()
    assert_same_bits(captured, step(op, tensors), "the graph replayed")


def check_streams(machine: Machine, op: str) -> None:
    """Work is queued on the stream that is current: what a stream has still to write is not read before."""
    tensors, expected = arguments(machine.place), step(op, arguments(machine.place))
    machine.synchronize()
    late = [torch.full_like(t, -100) if t.dtype == torch.int64 else torch.zeros_like(t) for t in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(20_000_000)
        for to, t in zip(late, tensors, strict=True):
            to.copy_(t)
    late = [t.requires_grad_(t.is_floating_point()) for t in late]
    with torch.cuda.stream(stream):
        got = step(op, late)
    stream.synchronize()
    assert_same_bits(expected, got, "another stream")


def check_devices(machine: Machine, op: str) -> None:
    if torch.cuda.device_count() < 2:
        raise Skip("one device")
    other = Machine((machine.index + 1) % torch.cuda.device_count())
    other.use(list(_C.CUDA_OPS), {})
    expected = step(op, arguments(machine.place))
    tensors = [t.detach().to(other.place).requires_grad_(t.requires_grad) for t in arguments(machine.place)]
    got = step(op, tensors)  # while the machine's own device is the current one
    assert torch.cuda.current_device() == machine.index, "another device is the current one afterwards"
    for a, b in zip(expected, got, strict=True):
        assert b.device == other.place, f"a result on {b.device}"
        torch.testing.assert_close(a, b.to(a.device))


def check_backward_again(machine: Machine) -> None:
    """The gradient that forward wrote is given away once; other upstream gradients replace it."""
    x = spiky(65, 3001, dtype=torch.bfloat16, device=machine.place).requires_grad_()
    target = classes_of((65,), 3001, machine.place)
    loss = regfast.cross_entropy(x, target)
    exact = x.detach().float().requires_grad_()
    (true,) = torch.autograd.grad(F.cross_entropy(exact, target), exact)
    for factor in (1.0, 0.25, 1.0, 3.0):
        (grad,) = torch.autograd.grad(loss, x, loss.new_full((), factor), retain_graph=True)
        torch.testing.assert_close(grad.float(), true * factor, rtol=2**-7, atol=1e-7)
        grad.fill_(float("nan"))  # whoever got it may do as they like


def check_memory_of_chunks(machine: Machine) -> None:
    """A call takes what the plan says, besides the gradients, and less than the logits would."""
    n, d, v = 4096, 512, 50257
    need_memory(machine, 4 * n * v * 2)
    x, w = (
        spiky(*s, dtype=torch.bfloat16, device=machine.place).mul(d**-0.25).requires_grad_() for s in ((n, d), (v, d))
    )
    target, budget = classes_of((n,), v, machine.place), 64 << 20
    plan = regfast.linear_cross_entropy_plan(n, d, v, x.dtype, machine.place, memory_budget=budget)
    peak = 0
    for _ in range(2):  # the first call allocates the libraries' workspaces
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = regfast.linear_cross_entropy(x, w, target, memory_budget=budget)
        machine.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del loss
    grads = 4 * (n + v) * d
    assert plan.chunks > 4 and peak <= grads + plan.peak_bytes + (32 << 20), (peak, grads, plan)


# Ends without tearing down what the assertion has left unusable.
_BAD_CLASS = """
import os, sys, torch, regfast
x = torch.randn(4, {classes}, device="cuda:{index}", requires_grad=True)
target = torch.tensor([0, {bad}, 1, -100], device=x.device)
try:
    regfast.cross_entropy(x, target).backward()
    torch.cuda.synchronize()
    said = "no error"
except RuntimeError as error:
    said = str(error)
print(said, file=sys.stderr, flush=True)
os._exit(0 if "device-side assert" in said else 1)
"""


def check_class_out_of_range(machine: Machine) -> None:
    """An assertion on the device, as PyTorch's, which ends the process's use of it: hence processes of their own."""
    cases = ((10, 10), (5000, -1), (5000, 2**62))
    environment = {**os.environ, "REGFAST_CUDA_KERNELS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", _BAD_CLASS.format(classes=classes, bad=bad, index=machine.index)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for classes, bad in cases
    ]
    said = [process.communicate(timeout=120)[1] for process in running]
    if any("busy or unavailable" in text for text in said):
        raise Skip("the device lets one process in at a time")
    for (classes, bad), process, text in zip(cases, running, said, strict=True):
        assert process.returncode == 0, f"class {bad} of {classes}: {text[-300:]}"
