"""How a case compares: an op twice for equal bits, between canaries, and both with PyTorch and with float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .canaries import CANARIES

# Of tensors, to one or several.
Function = Callable[..., Any]
LAYOUTS = ("aligned", "odd", "gaps", "transposed")


def assert_as_good(ours: Tensor, theirs: Tensor, exact: Tensor, what: str, eps: float | None = None) -> None:
    """The tests' contract (twice PyTorch's error, plus an epsilon), twice over, since one tensor may be unlucky."""
    kinds = [(t.dtype, tuple(t.shape), t.device) for t in (ours, theirs)]
    assert kinds[0] == kinds[1], f"{what}: expected {kinds[1]}, got {kinds[0]}"
    if not ours.is_floating_point():
        assert torch.equal(ours, theirs), f"{what}: other numbers than PyTorch's"
        return
    rounded = exact.to(ours.dtype)
    finite = rounded.isfinite()
    same = torch.where(rounded.isnan(), ours.isnan(), ours == rounded)
    assert same[~finite].all(), f"{what}: infinities or NaNs where there should be others"
    if not finite.any():
        return
    info = torch.finfo(ours.dtype)
    size = exact[finite].abs().max().clamp(min=info.smallest_normal)
    error = (ours.double() - exact)[finite].abs().max()
    theirs_error = (theirs.double() - exact)[finite].abs().max()
    # In float64 the oracle is PyTorch itself, so what it errs by counts as ours; float32 inside would err by far more.
    allowed = 4 * theirs_error + (4096 if ours.dtype == torch.float64 else 4) * (eps or info.eps) * size
    assert error <= allowed, f"{what}: error {error:.3g}, PyTorch's {theirs_error:.3g}, allowed {allowed:.3g}"


def assert_same_bits(first: Sequence[Tensor], second: Sequence[Tensor], what: str = "the second run") -> None:
    """NaNs too: all bytes."""
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        bits = [t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b)]
        assert torch.equal(*bits), f"{what}: other bits in tensor {i}"


def evaluate(
    fn: Function, tensors: Sequence[Tensor], grads: list[Tensor] | None = None, dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs and gradients of fn, computed in another dtype if one is given, and the upstream gradients."""
    leaves = []
    for t in tensors:
        leaf = t.detach()
        leaves.append(leaf.to(dtype or t.dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else leaf)
    outputs = fn(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not wanted:
        return outputs, [], []
    if grads is None:  # not ones, and not one number for all: backward passes treat those specially
        grads = [torch.randn_like(o) for o in outputs]
    upstream = [g.to(o.dtype) for o, g in zip(outputs, grads, strict=True)]
    return [o.detach() for o in outputs], list(torch.autograd.grad(outputs, wanted, upstream)), grads


def compare(ours: Function, theirs: Function, *tensors: Tensor, eps: float | None = None) -> None:
    """Values and gradients of `ours` against those of `theirs`, in the tensors' dtype and in float64.

    eps: of arithmetic that is less exact than the dtype."""
    with CANARIES.watch():
        out, grad, grads = evaluate(ours, tensors)
    with CANARIES.watch():
        out_again, grad_again, _ = evaluate(ours, tensors, grads)
    assert_same_bits(out + grad, out_again + grad_again)
    their_out, their_grad, _ = evaluate(theirs, tensors, grads)
    true_out, true_grad, _ = evaluate(theirs, tensors, grads, torch.float64)
    for i, (a, b, c) in enumerate(zip(out + grad, their_out + their_grad, true_out + true_grad, strict=True)):
        assert_as_good(a, b, c, f"output {i}" if i < len(out) else f"gradient {i - len(out)}", eps)


def spiky(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values of which one in ten is large: flat logits make every probability 1/V and hide errors."""
    values = torch.randn(shape, device=device)
    return (values + 4 * (torch.rand(shape, device=device) < 0.1) * torch.randn(shape, device=device)).to(dtype)


def classes_of(shape: tuple[int, ...], classes: int, device: torch.device, ignored: float = 0.2) -> Tensor:
    target = torch.randint(classes, shape, device=device)
    return torch.where(torch.rand(shape, device=device) < ignored, -100, target)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values aligned, at an odd address, with gaps between rows, or with rows adjacent."""
    if layout == "aligned":
        return x
    if layout == "odd":
        return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    if layout == "gaps":
        return x.new_empty(*x.shape[:-1], x.shape[-1] + 3)[..., 1:-2].copy_(x)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    raise ValueError(layout)
