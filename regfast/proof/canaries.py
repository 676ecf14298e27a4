"""Memory around every tensor that an op allocates, which nothing may write: results, gradients and workspaces.

torch's ``empty``, by which ops allocate, is replaced in this process: while somebody watches, a tensor lies between two
guards of known bytes and is filled with NaNs, so that what is written beside it, or read before it is written, shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

_GUARD = 512  # bytes: what the kernels take for the alignment of a device's own allocations, and a warp's widest store
_BYTE, _NANS = 0xA5, 0xFF


class Canaries:
    """Of one device in this process, from ``install`` on."""

    def __init__(self) -> None:
        self._bases: list[tuple[Tensor, int]] | None = None
        self._library: torch.library.Library | None = None

    def install(self, key: str) -> None:
        """For the tensors of this dispatch key: CUDA, or CPU where a test emulates the device there."""
        usual = torch.library.get_kernel("aten::empty.memory_format", key)

        def empty(
            keys: torch._C.DispatchKeySet,
            size: Sequence[int],
            dtype: torch.dtype | None = None,
            layout: torch.layout | None = None,
            device: torch.device | None = None,
            pin_memory: bool | None = None,
            memory_format: torch.memory_format | None = None,
        ) -> Tensor:
            plain = memory_format in (None, torch.contiguous_format) and layout in (None, torch.strided)
            # An empty tensor has no address, and kernels go by that where a result is not wanted.
            if self._bases is None or not plain or pin_memory or 0 in size:
                return usual.call_boxed(
                    keys,
                    size,
                    dtype=dtype,
                    layout=layout,
                    device=device,
                    pin_memory=pin_memory,
                    memory_format=memory_format,
                )
            return self._guarded(tuple(size), dtype or torch.get_default_dtype(), device)

        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            self._library.impl("empty.memory_format", empty, key, with_keyset=True)

    def _guarded(self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> Tensor:
        *steps, count = accumulate(reversed(size), lambda a, b: a * b, initial=1)
        inside = count * dtype.itemsize
        # The second guard begins right behind the last element.
        base = torch.empty_strided((_GUARD + inside + _GUARD,), (1,), dtype=torch.uint8, device=device)
        base.fill_(_BYTE)
        within = base[_GUARD : _GUARD + inside]
        within.fill_(_NANS if dtype != torch.bool else 1)
        assert self._bases is not None
        self._bases.append((base, inside))
        return within.view(dtype).as_strided(size, [max(1, step) for step in reversed(steps)])

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Raises an AssertionError at its end if a guard of a tensor that was allocated meanwhile has changed."""
        if self._library is None:
            yield
            return
        bases: list[tuple[Tensor, int]] = []
        self._bases = bases
        try:
            yield
        finally:
            self._bases = None
        guards = [
            (where, inside, guard)
            for base, inside in bases
            for where, guard in (("before", base[:_GUARD]), ("behind", base[_GUARD + inside :]))
        ]
        if not guards:
            return
        changed = (torch.stack([guard for *_, guard in guards]) != _BYTE).any(1)  # the device is asked once
        for (where, inside, _), written in zip(guards, changed.tolist(), strict=True):
            if written:
                raise AssertionError(f"memory {where} a tensor of {inside} bytes was written")


CANARIES = Canaries()
