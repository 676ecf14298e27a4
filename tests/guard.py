"""Tensors that end exactly at an unmapped page, or begin right behind one, so that an access beyond them is a fault.

What lies between a tensor's elements, and between the tensor and the other page, is NaN or a class that does not exist.
"""

from __future__ import annotations

import ctypes
import mmap
from itertools import accumulate

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "strided", "padded", "rows expanded", "columns expanded")
SIDES = ("behind", "before")
NOWHERE = -(2**40)  # a class that whoever reads it looks up far from the row

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_PROT_NONE, _PROT_READ = 0, 1


def _protect(address: int, length: int, protection: int) -> None:
    if _libc.mprotect(address, length, protection):
        raise OSError(ctypes.get_errno(), "mprotect")


def strides_of(shape: tuple[int, ...], layout: str) -> list[int]:
    """In elements; unused memory lies only between elements, never behind the last one."""

    def contiguous(sizes):
        return list(accumulate([1, *reversed(sizes[1:])], lambda step, size: step * max(1, size)))[::-1]

    if not shape or layout == "contiguous":
        return contiguous(shape) if shape else []
    if layout == "transposed":
        return contiguous(shape[::-1])[::-1]
    if layout == "strided":
        return [2 * step for step in contiguous(shape)]
    if layout == "padded":
        return contiguous((*shape[:-1], shape[-1] + 3))
    if layout == "rows expanded":
        return [0, *contiguous(shape)[1:]]
    if layout == "columns expanded":
        return [*contiguous((*shape[:-1], 1))[:-1], 0]
    raise ValueError(layout)


def place(values: Tensor, layout: str = "contiguous", side: str = "behind", writable: bool = False) -> Tensor:
    """The values (of an expanded dimension its first ones) in such memory, read-only unless `writable`."""
    strides = strides_of(tuple(values.shape), layout)
    extent = 1 + sum((size - 1) * step for size, step in zip(values.shape, strides, strict=True))
    extent = extent if values.numel() else 0
    page, bytes_ = mmap.PAGESIZE, extent * values.element_size()
    inside = max(1, -(-bytes_ // page)) * page
    memory = mmap.mmap(-1, inside + 2 * page)  # freed with the tensor, which holds it
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + page
    whole = not values.is_floating_point() and not values.is_complex() and values.dtype != torch.bool
    unused = (
        max(NOWHERE, torch.iinfo(values.dtype).min) if whole else True if values.dtype == torch.bool else float("nan")
    )
    torch.frombuffer(memory, dtype=values.dtype, count=inside // values.element_size(), offset=page).fill_(unused)
    if extent:
        first = page + inside - bytes_ if side == "behind" else page
        flat = torch.frombuffer(memory, dtype=values.dtype, count=extent, offset=first)
        tensor = flat.as_strided(values.shape, strides)
        own, given = tensor, values
        for dim, step in enumerate(strides):
            if step == 0:
                own, given = own.narrow(dim, 0, 1), given.narrow(dim, 0, 1)
        own.copy_(given)
    else:
        tensor = torch.frombuffer(memory, dtype=values.dtype, count=1, offset=page)[:0].view(values.shape)
    _protect(start - page, page, _PROT_NONE)
    _protect(start + inside, page, _PROT_NONE)
    if not writable:
        _protect(start, inside, _PROT_READ)
    return tensor.detach().requires_grad_(values.requires_grad)
