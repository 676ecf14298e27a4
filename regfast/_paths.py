"""Which way each call took: printed where REGFAST_VERBOSE=1 asks for it, and recorded for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C


class Call(NamedTuple):
    """One call below autograd: of an op's kernels, or of the composite in place of the op."""

    op: str  # of the schema, without regfast::
    tensors: str  # "float32[200, 96], float32[700, 96]"
    path: str  # "kernels"; "aten": kernels, but products by ATen; "composite"
    by: str  # the kernels' instruction set or architecture
    why: str  # it is not ours alone


@contextmanager
def recorded(*modules: Any) -> Iterator[list[Call]]:
    """A list that holds, once the block has ended, the calls that were made meanwhile, on all threads.

    Each of the modules, by default the extension alone, has records of its own.
    """
    modules = modules or (_C,)
    calls: list[Call] = []
    marks = [(module, module.begin_calls()) for module in modules]
    try:
        yield calls
    finally:
        for module, mark in marks:
            calls += [Call(*call) for call in module.end_calls(mark)]


def composite(op: str, tensors: tuple[Tensor, ...], why: str) -> None:
    """Puts a composite on record that a Python function calls instead of its op."""
    if not torch.compiler.is_compiling() and _C.calls_recorded():
        shapes = (
            f"{str(t.dtype).removeprefix('torch.')}{'[nested]' if t.is_nested else list(t.shape)}" for t in tensors
        )
        _C.add_call(op, ", ".join(shapes), why)


def print_if_asked() -> None:
    if os.environ.get("REGFAST_VERBOSE") == "1":
        _C.print_calls()
