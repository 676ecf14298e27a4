"""Memory of large results: regfast keeps it when they are freed, for the next result of about that size.

A fresh allocation has each of its pages zeroed by the system when it is first written to, which takes longer than most
kernels do. Results of 4 MiB and more (gradients, activations, the panels of ``linear_cross_entropy``) therefore come
from buffers that are kept, up to an eighth of the machine's memory and for half a minute; the system may take their
pages at any time, and does when it runs short. ``REGFAST_POOL=0`` turns this off, and ``REGFAST_POOL=<bytes>`` sets how
much may be kept. Linux only: elsewhere every result has a fresh allocation.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from . import _C

__all__ = ["Stats", "release", "stats"]


class Stats(NamedTuple):
    """What there is now, in bytes, and how many buffers results have had so far."""

    used_bytes: int  #: of results that live
    kept_bytes: int  #: for the next ones
    limit: int  #: on what is kept; 0: every result has a fresh allocation
    reused: int  #: buffers that had been kept
    mapped: int  #: buffers that the system gave


def stats() -> Stats:
    """The buffers of large results on the CPU, of the whole process."""
    return Stats(**_C.memory_stats())


def release() -> None:
    """Gives all that is kept back to the system. Results that live are not touched."""
    _C.release_memory()


def limit_as_asked() -> None:
    """By REGFAST_POOL, which the package has looked at."""
    asked = os.environ.get("REGFAST_POOL", "")
    if asked:
        _C.limit_memory(int(asked))
