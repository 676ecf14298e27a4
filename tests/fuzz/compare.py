"""Whether results agree: with PyTorch in the same dtype, with float64, and bit by bit with another run."""

from __future__ import annotations

import torch
from torch import Tensor

# Epsilons of the arithmetic by which a result may be off, counted in the size of its terms; a chain of additions of
# 256 terms of one sign errs by as much. Whatever is off by more must be within twice PyTorch's own error.
EPSILONS = 16
# In float64 there is no better oracle than PyTorch's own operators, whose error is taken to be so many epsilons, and
# one more for every ORACLE_CHAIN terms of a sum: against an oracle of 64 bits of fraction, its softmax along a
# dimension that is not the last was off by 365 for 7713 classes where ours was off by 0.7.
ORACLE_EPSILONS, ORACLE_CHAIN = 32, 16
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit patterns; a NaN is one whatever its bits."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.detach().resolve_neg().contiguous(), b.detach().resolve_neg().contiguous()
    kind = BITS[a.element_size()]
    if torch.equal(a.view(kind), b.view(kind)):
        return True
    if not a.is_floating_point():
        return False
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(kind)[~nan], b.view(kind)[~nan])


def patterns(x: Tensor) -> Tensor:
    """0 where finite, 1 and -1 for infinities, 2 for NaN."""
    return torch.where(x.isnan(), 2, torch.where(x.isinf(), x.sign(), 0)).to(torch.int8)


def describe(x: Tensor, index: int) -> str:
    return f"{x.detach().reshape(-1)[index].item()!r}"


def compare(
    ours: Tensor,
    theirs: Tensor,
    exact: Tensor,
    size: Tensor | None,
    rounds: bool,
    acc: torch.dtype,
    between: Tensor | None = None,
    floor: float = 1.0,
    terms: int = 0,
    through: torch.dtype | None = None,
) -> str | None:
    """What is wrong with `ours`, or None.

    `exact` is in float64, `size` that of the terms that it sums up, `acc` the accumulators' dtype, `between` the
    composite in their range for half types, `floor` multiplies the smallest normal number, below which exponentials
    may be flushed, `terms` is the length of the longest sums, `through` a dtype that something was rounded to.
    """
    if ours.dtype != theirs.dtype:
        return f"dtype {ours.dtype}, PyTorch {theirs.dtype}"
    if ours.shape != theirs.shape:
        return f"shape {tuple(ours.shape)}, PyTorch {tuple(theirs.shape)}"
    if not ours.numel():
        return None
    ours, theirs, exact = ours.detach(), theirs.detach(), exact.detach().double()
    if not ours.is_floating_point():
        return None if torch.equal(ours, theirs) else "integers differ"
    dtype = ours.dtype
    info = max((torch.finfo(t) for t in (dtype, through or dtype)), key=lambda found: found.eps)
    acc_info = torch.finfo(acc)
    wide = ours.double()
    if size is None:
        size = exact.nan_to_num(0, 0, 0).abs().max()
    size = size.expand(exact.shape)
    # Where finite terms leave the range, the order of additions decides what comes of them. Infinities of the inputs
    # are no terms: with those, patterns are compared.
    within = size * 4 <= acc_info.max
    eps = max(info.eps, acc_info.eps) if rounds else acc_info.eps
    many = ORACLE_EPSILONS + terms / ORACLE_CHAIN if acc == torch.float64 else EPSILONS
    allowed = (
        many * eps * size
        + info.eps * exact.abs().nan_to_num(0, 0, 0)
        + EPSILONS * (acc_info.smallest_normal * floor + info.smallest_normal * info.eps)
    )
    error = (wide - exact).abs()
    wrong = within & ~(error <= allowed)
    if not wrong.any():
        return None
    mine, true = patterns(ours), patterns(exact.to(dtype))
    odd = wrong & ((mine != 0) | (true != 0))
    if odd.any():
        # As float64 says, or as PyTorch's own operators say in this dtype or in its accumulators'.
        fits = (mine == true) | (mine == patterns(theirs))
        if between is not None:
            fits |= mine == patterns(between.detach().to(dtype))
        near = exact.isfinite() & (exact.abs() + allowed >= info.max * (1 - info.eps))
        fits |= near & (mine != 2)
        if (odd & ~fits).any():
            at = int((odd & ~fits).reshape(-1).nonzero()[0])
            return f"at {at}: {describe(ours, at)}, PyTorch {describe(theirs, at)}, in float64 {describe(exact, at)}"
        wrong &= ~odd
        if not wrong.any():
            return None
    own = (theirs.double() - exact).abs()
    own = own[own.isfinite() & (patterns(theirs) == 0)]
    most = own.max() if own.numel() else torch.zeros(())
    wrong &= ~(error <= 2 * most + allowed)
    if not wrong.any():
        return None
    at = int((error / allowed).where(wrong, 0).argmax())
    return (
        f"at {at}: {describe(ours, at)}, PyTorch {describe(theirs, at)}, in float64 {describe(exact, at)}: error "
        f"{describe(error, at)}, allowed {describe(allowed, at)} or twice PyTorch's {most.item():.3g}"
    )
