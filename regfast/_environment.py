"""The environment variables that regfast reads: what each decides, and what is wrong with one that is set."""

from __future__ import annotations

import itertools
import os
import sys

from . import _C

MEANINGS = {
    "REGFAST_ISA": "the instruction set of the CPU's kernels, one of those that regfast.isas() lists",
    "REGFAST_GEMM": "auto, own or aten: who multiplies, where the table would choose",
    "REGFAST_POOL": "bytes of large results' memory that are kept for the next ones; 0 keeps none",
    "REGFAST_VERBOSE": "1 prints a line for each call to standard error",
    "REGFAST_CUDA_KERNELS": "0 or 1: the CUDA kernels are off or on, whatever a proof says",
    "REGFAST_CUDA_GEMM": "aten, sm80 or sm90: whose CUDA products, whatever a proof says",
    "REGFAST_PROOFS": "the folder of the GPUs' proofs, in the place of one in the user's cache directory",
    "REGFAST_CUDA": "when building: auto, 0 or 1: without or with CUDA kernels",
    "REGFAST_CUDA_ARCHS": "when building: for these architectures only, as in 80 90a",
    "REGFAST_SANITIZE": "when building: C++ under these sanitizers, as in address,undefined",
}
# What those may be that are read here or in C++; setup.py and csrc/cuda/kernels.py look at the ones of a build.
_CHOICES = {
    "REGFAST_ISA": tuple(_C.isas()),
    "REGFAST_GEMM": ("auto", "own", "aten"),
    "REGFAST_VERBOSE": ("0", "1"),
    "REGFAST_CUDA_KERNELS": ("0", "1"),
    "REGFAST_CUDA_GEMM": ("auto", "aten", "sm80", "sm90"),
}
# What python -m regfast found wrong and runs without.
refused: dict[str, str] = {}


def fault(name: str, value: str) -> str:
    """What is wrong with the value of a variable, in one sentence, or nothing. One that is empty is not set."""
    if not value:
        return ""
    if name == "REGFAST_POOL":
        fits = value.isdecimal() and int(value) < 1 << 63
        expected = "a number of bytes, or 0 for none"
    elif name == "REGFAST_PROOFS":
        fits = os.path.isdir(value) or not os.path.exists(value)
        expected = "a folder"
    else:
        choices = _CHOICES.get(name, (value,))
        fits = value in choices
        *others, last = choices
        expected = f"{', '.join(others)} or {last}" if others else last
        expected += " on this CPU" if name == "REGFAST_ISA" else ""
    return "" if fits else f"{name}: expected {expected}, got {value}"


def check() -> None:
    """Raises a ValueError that names a variable with a value that it cannot have.

    Under ``python -m regfast``, whose ``info`` is what one asks then, such a variable is taken away and noted down
    instead; the other commands refuse to run.
    """
    command = any(pair == ("-m", __package__) for pair in itertools.pairwise(sys.orig_argv))
    for name in MEANINGS:
        wrong = fault(name, os.environ.get(name, ""))
        if wrong and not command:
            raise ValueError(wrong)
        if wrong:
            refused[name] = wrong
            del os.environ[name]
