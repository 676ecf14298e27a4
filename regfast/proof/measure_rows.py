"""The softmax family in each class of rows: short, medium, long, of elements that lie apart; many of them, and few."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

import regfast

from .cases import ARITHMETICS
from .timing import Timed

# Ours, PyTorch's, and how often all logits are read or written: forward, and both ways.
FAMILY: dict[str, tuple[Callable, Callable, int, int]] = {
    "softmax": (regfast.softmax, torch.softmax, 2, 5),
    "log_softmax": (regfast.log_softmax, torch.log_softmax, 2, 5),
    "logsumexp": (regfast.logsumexp, torch.logsumexp, 1, 3),
    "cross_entropy": (regfast.cross_entropy, F.cross_entropy, 1, 2),
}


def timed_rows(shapes, place: torch.device) -> Iterator[Timed]:
    """Shapes as measure.py has them; many rows in two dtypes, since their class is decided by bytes."""
    for op in FAMILY:
        for label, row_bytes in shapes.rows:
            for dtype in ("bfloat16", "float32"):
                size = ARITHMETICS[dtype].itemsize
                shape = (max(1, shapes.bytes_of_logits // row_bytes), row_bytes // size)
                yield from timed_class(op, label, shape, dtype, place, f"{op.removeprefix('log_')} ")
            yield from timed_class(op, f"{label} few", (shapes.few_rows, row_bytes // 2), "bfloat16", place)
        yield from timed_class(op, "columns", shapes.pixels, "float32", place)
        yield from timed_class(op, "columns few", shapes.few_pixels, "float32", place)


def timed_class(
    op: str, label: str, shape: tuple[int, ...], dtype: str, place: torch.device, kernel: str = ""
) -> Iterator[Timed]:
    """Forward, and with the gradient. kernel: how what is predicted of it begins, if anything is."""
    ours, theirs, forward, both = FAMILY[op]
    n, c, *rest = shape

    def make():
        x = 3 * torch.randn(shape, device=place, dtype=ARITHMETICS[dtype])
        target = [torch.randint(c, (n, *rest), device=place)] if op == "cross_entropy" else []
        return [x.requires_grad_(), *target]

    along = {} if op == "cross_entropy" else {"dim": 1}
    what = f"{label}: {' x '.join(map(str, shape))} {dtype}"
    moved = math.prod(shape) * ARITHMETICS[dtype].itemsize
    for mode, times in (("fwd", forward), ("fwd_bwd", both)):
        yield Timed(
            op,
            what,
            mode,
            make,
            partial(ours, **along),
            partial(theirs, **along),
            times * moved,
            kernel=kernel and kernel + mode,
            rows=f"{op} {label}",
            reads_only=times == 1,
            first=(dtype == "bfloat16" and not label.endswith("few")) or label == "columns",
        )
