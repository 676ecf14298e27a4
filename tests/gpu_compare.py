"""How gpu_checks.py compares: values and gradients against PyTorch's, both against float64. It needs torch alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_as_good(ours: Tensor, theirs: Tensor, exact: Tensor, what: str, eps: float | None = None) -> None:
    """The tests' contract (twice PyTorch's error, plus an epsilon), twice over, since one tensor may be unlucky."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.device == theirs.device, what
    if not ours.is_floating_point():
        assert torch.equal(ours, theirs), what
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


def evaluate(
    fn: Callable, tensors: Sequence[Tensor], grads: list[Tensor] | None = None, dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs and gradients of fn, computed in another dtype if one is given, and the upstream gradients."""
    leaves = []
    for t in tensors:
        leaf = t.detach()
        leaves.append(leaf.to(dtype or t.dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else leaf)
    outputs = fn(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if grads is None:  # not ones, and not one number for all: backward passes treat those specially
        grads = [torch.randn_like(o) for o in outputs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    upstream = [g.to(o.dtype) for o, g in zip(outputs, grads, strict=True)]
    return [o.detach() for o in outputs], list(torch.autograd.grad(outputs, wanted, upstream)), grads


def compare(ours: Callable, theirs: Callable, *tensors: Tensor, what: str, eps: float | None = None) -> None:
    """Values and gradients of `ours` against those of `theirs`, in the tensors' dtype and in float64.

    eps: of arithmetic that is less exact than the dtype."""
    out, grad, grads = evaluate(ours, tensors)
    their_out, their_grad, _ = evaluate(theirs, tensors, grads)
    true_out, true_grad, _ = evaluate(theirs, tensors, grads, torch.float64)
    for i, (a, b, c) in enumerate(zip(out + grad, their_out + their_grad, true_out + true_grad, strict=True)):
        name = f"output {i}" if i < len(out) else f"gradient {i - len(out)}"
        assert_as_good(a, b, c, f"{what}: {name}", eps)


def spiky(*shape: int, dtype=torch.float32, device="cuda") -> Tensor:
    """Normal values of which one in ten is large: flat logits make every probability 1/V and hide errors."""
    values = torch.randn(shape, device=device)
    return (values + 4 * (torch.rand(shape, device=device) < 0.1) * torch.randn(shape, device=device)).to(dtype)


def classes_of(shape: tuple[int, ...], classes: int, ignored: float = 0.2, device="cuda") -> Tensor:
    target = torch.randint(classes, shape, device=device)
    return torch.where(torch.rand(shape, device=device) < ignored, -100, target)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values aligned, at an odd address, with gaps between rows, and with rows adjacent."""
    odd = x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    gaps = x.new_empty(*x.shape[:-1], x.shape[-1] + 3)[..., 1:-2].copy_(x)
    return {"aligned": x, "odd": odd, "gaps": gaps, "transposed": x.transpose(0, -1).contiguous().transpose(0, -1)}
