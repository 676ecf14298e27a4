"""Arguments of the wrong kind raise TypeError, as in torch.

An op's schema takes most of them for what they are and raises RuntimeError for the others, with words that name no
function of ours; what it takes and torch does not (a bool for an int, a number for a dtype) is looked at here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from operator import index
from typing import Any, cast

import torch
from torch.compiler import is_dynamo_compiling

from . import _C

_WORDS = re.compile(r"Expected a value of type '(.*?)' for argument '(\w+)' but instead found type '(.*?)'")


def op(name: str, function: str | None = None) -> Callable[..., Any]:
    """The op of this name, called directly where its arguments are plain; else through torch.ops, with torch's
    exceptions for an argument that its schema does not take, which name the function."""
    direct, op = getattr(_C, name), getattr(torch.ops.regfast, name).default
    function = function or name

    def call(*arguments: object) -> Any:
        if not is_dynamo_compiling() and (result := direct(*arguments)) is not None:
            return result
        try:
            return op(*arguments)
        except RuntimeError as error:
            words = _WORDS.search(str(error))
            if words is None:
                raise
            expected, argument, found = words.groups()
        if expected == found == "int":
            raise ValueError(f"regfast.{function}: {argument}: expected an int of 64 bits, got a larger one")
        raise TypeError(f"regfast.{function}: {argument}: expected {expected}, got {found}")

    return call


def integer(function: str, name: str, value: Any) -> int:
    """An int, numpy's or a tensor of one; a bool is none."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return cast(int, value)
    if not isinstance(value, bool):
        try:
            return index(value)
        except TypeError:
            pass
    raise TypeError(f"regfast.{function}: {name}: expected an int, got {type(value).__name__}")


def number(function: str, name: str, value: Any) -> float:
    """A float, or what is one: an int, numpy's or a tensor of one; a string is none."""
    if not isinstance(value, (str, bytes)):
        try:
            return float(value.detach() if isinstance(value, torch.Tensor) else value)
        except (TypeError, ValueError, RuntimeError):
            pass
    raise TypeError(f"regfast.{function}: {name}: expected float, got {type(value).__name__}")


def boolean(function: str, name: str, value: object) -> bool:
    """A bool; a number is none."""
    if isinstance(value, (bool, torch.SymBool)):
        return cast(bool, value)
    raise TypeError(f"regfast.{function}: {name}: expected a bool, got {type(value).__name__}")


def dtype(function: str, name: str, value: object) -> torch.dtype | None:
    """A dtype or None."""
    if value is None or isinstance(value, torch.dtype):
        return value
    raise TypeError(f"regfast.{function}: {name}: expected a torch.dtype or None, got {type(value).__name__}")
