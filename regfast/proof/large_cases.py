"""More than 2^31 elements, and strides beyond: every product of sizes has 64 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

import regfast

from .cases import Case, Skip
from .compare import classes_of, spiky
from .machine import Machine

LARGE = (2**16 + 5, 2**15 + 1)  # of which the product is more than 2**31


def large_cases(machine: Machine) -> Iterator[Case]:
    for op, check in LARGE_CHECKS.items():
        yield Case(op, f"{LARGE}, more than 2^31 elements", partial(check_large, machine, check))


def need_memory(machine: Machine, size: int) -> None:
    size += 2 << 30  # for what PyTorch allocates on the way
    if machine.free_bytes() < size:
        raise Skip(f"{size / 2**30:.0f} GiB of memory are not free")


def check_large(machine: Machine, check: Callable[[torch.device, list[int]], None]) -> None:
    need_memory(machine, 4 * LARGE[0] * LARGE[1] * 2)
    n = LARGE[0]
    check(machine.place, [0, 1, n // 2, n - 2, n - 1])
    machine.empty_cache()


def large_cross_entropy(place: torch.device, picked: list[int]) -> None:
    n, c = LARGE
    x = torch.empty(n, c, dtype=torch.bfloat16, device=place).normal_().requires_grad_()
    target = classes_of((n,), c, place, 0.1)
    loss = regfast.cross_entropy(x, target, reduction="none")
    (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    rows = x.detach()[picked].requires_grad_()
    true = F.cross_entropy(rows.float(), target[picked], reduction="none")
    (true_grad,) = torch.autograd.grad(true.sum(), rows)
    torch.testing.assert_close(loss.detach()[picked].float(), true.detach(), rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(grad[picked], true_grad, rtol=2**-6, atol=1e-7)
    del grad
    total = regfast.cross_entropy(x, target, reduction="sum", loss_dtype=torch.float32)
    (grad,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(grad[picked], true_grad, rtol=2**-6, atol=1e-7)
    torch.testing.assert_close(total, loss.double().sum().float(), rtol=1e-3, atol=0)


def large_softmax(place: torch.device, picked: list[int], ours: Callable, theirs: Callable) -> None:
    n, c = LARGE
    x = torch.empty(n, c, dtype=torch.bfloat16, device=place).normal_()
    y = ours(x, -1)
    torch.testing.assert_close(y[picked].float(), theirs(x[picked].float(), -1), rtol=2**-6, atol=1e-5)
    del y
    wide = x.as_strided((3, 20), ((n * c - 20) // 2, 1))
    for dim in (0, 1):
        torch.testing.assert_close(ours(wide, dim), theirs(wide, dim))


def large_linear(place: torch.device, picked: list[int]) -> None:
    """Outputs and gradients."""
    n, v = LARGE
    x, w, b = (spiky(*s, dtype=torch.bfloat16, device=place).mul(64**-0.25) for s in ((n, 64), (v, 64), (v,)))
    y = regfast.linear(x, w.requires_grad_(), b, activation="gelu")
    upstream = torch.zeros_like(y)
    upstream[picked] = torch.randn(len(picked), v, device=place, dtype=torch.bfloat16)
    (grad,) = torch.autograd.grad(y, w, upstream)
    exact = w.detach().float().requires_grad_()
    true = F.gelu(F.linear(x[picked].float(), exact, b.float()))
    (true_grad,) = torch.autograd.grad(true, exact, upstream[picked].float())
    torch.testing.assert_close(y.detach()[picked].float(), true.detach(), rtol=2**-6, atol=0.02)
    torch.testing.assert_close(grad.float(), true_grad, rtol=2**-6, atol=0.02 * true_grad.abs().max().item())


def large_linear_nll(place: torch.device, picked: list[int]) -> None:
    """Losses, in several chunks."""
    n, v = LARGE
    x, w, b = (spiky(*s, dtype=torch.bfloat16, device=place).mul(64**-0.25) for s in ((n, 64), (v, 64), (v,)))
    y = torch.empty(n, v, dtype=torch.bfloat16, device=place).normal_()
    loss = regfast.linear_nll(x, w.requires_grad_(), y, b, family="gaussian", full=False, reduction="none")
    upstream = torch.zeros_like(loss)
    upstream[picked] = torch.randn(len(picked), v, device=place, dtype=torch.bfloat16)
    (grad,) = torch.autograd.grad(loss, w, upstream, retain_graph=True)
    exact = w.detach().float().requires_grad_()
    true = 0.5 * (F.linear(x[picked].float(), exact, b.float()) - y[picked].float()).square()
    (true_grad,) = torch.autograd.grad(true, exact, upstream[picked].float())
    del upstream
    torch.testing.assert_close(loss.detach()[picked].float(), true.detach(), rtol=2**-7, atol=1e-4)
    torch.testing.assert_close(grad.float(), true_grad, rtol=2**-6, atol=0.02 * true_grad.abs().max().item())
    total = regfast.linear_mse_loss(x, w, y, b, reduction="sum", loss_dtype=torch.float32)
    torch.testing.assert_close(total.double(), 2 * loss.detach().sum(dtype=torch.float64), rtol=1e-4, atol=0)


LARGE_CHECKS: dict[str, Callable[[torch.device, list[int]], None]] = {
    "softmax": partial(large_softmax, ours=regfast.softmax, theirs=torch.softmax),
    "log_softmax": partial(large_softmax, ours=regfast.log_softmax, theirs=torch.log_softmax),
    "cross_entropy": large_cross_entropy,
    "linear": large_linear,
    "linear_nll": large_linear_nll,
}
