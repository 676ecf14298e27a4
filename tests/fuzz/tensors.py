"""Tensors of every layout and of hostile values, each from a few plain numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import guard

INF, NAN = float("inf"), float("nan")
VALUES = ("normal", "spiky", "zeros", "ones", "equal", "integers", "wide", "huge", "denormal")
LAYOUTS = (
    "contiguous",
    "strided",
    "transposed",
    "padded",
    "offset",
    "expanded",
    "expanded_last",
    "negative",
    *(f"{layout}, {side}" for layout in guard.LAYOUTS for side in guard.SIDES),
)
_generator = torch.Generator()


def values(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Contiguous values of a kind, the same for the same arguments."""
    g = _generator.manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if kind in ("zeros", "ones", "equal"):
        return torch.full(shape, {"zeros": 0.0, "ones": 1.0, "equal": 0.37}[kind], dtype=dtype)
    if kind == "integers":
        return torch.randint(-3, 4, shape, generator=g).to(dtype)
    if kind == "uniform":
        return torch.rand(shape, generator=g, dtype=wide).to(dtype)
    if kind == "few_zero":  # weights, of which some are zero
        return (torch.rand(shape, generator=g, dtype=wide) * (torch.rand(shape, generator=g) < 0.8)).to(dtype)
    if kind == "probabilities":  # over dimension 1, or the only one
        x = torch.randn(shape, generator=g, dtype=torch.float64) * 3
        return x.softmax(1 if x.dim() > 1 else 0).to(dtype) if x.dim() else torch.ones(shape, dtype=dtype)
    if kind == "observed":  # by a coin
        x = torch.rand(shape, generator=g, dtype=wide)
        return torch.where(torch.rand(shape, generator=g) < 0.5, x.round(), x).to(dtype)
    if kind in ("small", "positive"):
        x = torch.randn(shape, generator=g, dtype=wide) * 0.1
        return (x.abs() + 0.5 if kind == "positive" else x).to(dtype)
    if kind == "counts":
        return torch.randint(0, 7, shape, generator=g).to(dtype)
    x = torch.randn(shape, generator=g, dtype=wide)
    if kind == "spiky":
        x = x * torch.where(torch.rand(shape, generator=g) < 0.1, 20.0, 1.0)
    elif kind == "wide":
        x = x * 10 ** (torch.rand(shape, generator=g, dtype=wide) * 8 - 5)
    elif kind == "huge":
        x = x * (torch.finfo(dtype).max / 8)
    elif kind == "denormal":
        x = x * torch.finfo(dtype).smallest_normal
    elif kind != "normal":
        raise ValueError(kind)
    return x.to(dtype)


def classes(shape: tuple[int, ...], count: int, ignored: float, ignore_index: int, dtype: torch.dtype, seed: int):
    """Random classes, of which about a share is ignored."""
    g = _generator.manual_seed(seed)
    t = torch.randint(0, max(count, 1), shape, generator=g)
    if ignored:
        t = torch.where(torch.rand(shape, generator=g) < ignored, ignore_index, t)
    return t.to(dtype)


def put(x: Tensor, hostile: list[tuple[str, float, int]]) -> Tensor:
    """Writes values into elements, rows (of the last dimension) or everything of a contiguous tensor."""
    if not x.numel():
        return x
    flat = x.view(-1) if x.dim() < 2 else x.view(-1, x.shape[-1])
    for where, value, index in hostile:
        value = max(min(value, torch.finfo(x.dtype).max), -torch.finfo(x.dtype).max) if abs(value) < INF else value
        if where == "all":
            x.fill_(value)
        elif where == "row" and x.dim() > 1:
            flat[index % len(flat)] = value
        else:
            x.view(-1)[index % x.numel()] = value
    return x


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of a contiguous tensor in another layout; memory between them is NaN, so that reading it shows.

    Those of two words lie in read-only memory, behind or before an unmapped page. The expanded layouts repeat what is
    at the first place of the first or last dimension.
    """
    if x.dim() == 0 and layout in ("strided", "transposed", "padded", "expanded", "expanded_last"):
        layout = "offset"
    if layout == "contiguous":
        return x
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "expanded_last":
        return x[..., :1].contiguous().expand(x.shape)
    if layout == "negative":
        return torch._neg_view(-x) if x.is_floating_point() else x
    if ", " in layout:  # read-only memory against an unmapped page
        return guard.place(x, *layout.split(", "))
    fill = NAN if x.is_floating_point() else 1 << 40 if x.dtype == torch.int64 else 77
    *lead, last = x.shape or (1,)
    if layout == "strided":
        view = x.new_full((*lead, 2 * last + 1), fill)[..., 1 : 2 * last + 1 : 2]
    elif layout == "padded":
        view = x.new_full((*lead, last + 3), fill)[..., 2 : last + 2]
    elif layout == "offset":
        view = x.new_full((x.numel() + 1,), fill)[1:].view(x.shape)
    else:
        raise ValueError(layout)
    return view.copy_(x)


def memory_of(x: Tensor) -> Tensor:
    """All bytes that a tensor's storage has, those between its elements too."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
