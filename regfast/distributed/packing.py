"""A float32 maximum and its place as one integer, so that the collective which finds a maximum finds its place too."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = torch.iinfo(torch.int64).min  # of a rank that has nothing


def packed(maxima: Tensor, places: Tensor) -> Tensor:
    """Integers that grow with the maximum, then towards the first of places from 0 to 2^32 - 1. A NaN counts for more
    than any number."""
    bits = (maxima + 0.0).view(torch.int32).long()  # + 0.0: there is one zero
    bits = torch.where(maxima.isnan(), torch.iinfo(torch.int32).max, bits)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) + (0xFFFFFFFF - places)


def unpacked(integers: Tensor) -> tuple[Tensor, Tensor]:
    """The maxima and their places."""
    ordered = integers >> 32
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(torch.int32).view(torch.float32), 0xFFFFFFFF - (integers & 0xFFFFFFFF)


def packed_bits(numbers: Tensor, here: Tensor) -> Tensor:
    """Of float32 that one rank has, where the others have LEAST."""
    return torch.where(here, numbers.view(torch.int32).long(), LEAST)


def unpacked_bits(integers: Tensor) -> Tensor:
    """The numbers again; 0 where no rank had any."""
    return integers.to(torch.int32).view(torch.float32)
