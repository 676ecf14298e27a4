"""softmax, log_softmax and logsumexp."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import _C, kinds, reference
from ._extension import without_tensors

_softmax: Callable[..., Tensor] = kinds.op("softmax")
_log_softmax: Callable[..., Tensor] = kinds.op("softmax", "log_softmax")
_logsumexp: Callable[..., Tensor] = kinds.op("logsumexp")


def softmax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """``exp(input - m) / sum(exp(input - m))`` along ``dim``, m the maximum, as :func:`torch.softmax`.

    Args:
        input: any shape and strides; float32, float64, bfloat16 and float16 have kernels, half types computing in
            float32.
        dim: the dimension whose entries sum to one.
        dtype: input is cast to it first.

    Returns:
        A contiguous tensor of input's shape. A row of -inf, or with +inf or NaN in it, is NaN.

    Raises:
        IndexError: for a ``dim`` out of range. NotImplementedError: for integers.

    Saved for backward: the output. One read of a row that fits the caches; the sum is kept
    online over blocks of longer rows (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
    """
    if dtype is None and not is_dynamo_compiling() and (result := _C.softmax(input, dim, False)) is not None:
        return result
    if not isinstance(input, Tensor):
        return without_tensors(softmax, {"input": input}, {}, input, dim, dtype)
    if dtype is not None:
        input = input.to(kinds.dtype("softmax", "dtype", dtype))
    return _softmax(input, kinds.integer("softmax", "dim", dim), False)


def log_softmax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """``(input - m) - log(sum(exp(input - m)))`` along ``dim``, m the maximum, as :func:`torch.log_softmax`.

    Arguments, errors, method and what is saved are those of :func:`softmax`.
    """
    if dtype is None and not is_dynamo_compiling() and (result := _C.softmax(input, dim, True)) is not None:
        return result
    if not isinstance(input, Tensor):
        return without_tensors(log_softmax, {"input": input}, {}, input, dim, dtype)
    if dtype is not None:
        input = input.to(kinds.dtype("log_softmax", "dtype", dtype))
    return _log_softmax(input, kinds.integer("log_softmax", "dim", dim), True)


def logsumexp(input: Tensor, dim: int | Sequence[int] = -1, keepdim: bool = False) -> Tensor:
    """``log(sum(exp(input)))`` over one or several dimensions, as :func:`torch.logsumexp`.

    Args:
        input: any shape and strides; float32, float64, bfloat16 and float16 have kernels.
        dim: a dimension, or several, which are reduced together.
        keepdim: whether reduced dimensions stay, with size one.

    Returns:
        input's shape without ``dim``. A row of -inf gives -inf; one with +inf and no NaN gives +inf.

    Raises:
        IndexError: for a ``dim`` out of range. RuntimeError: for one named twice.

    Saved for backward: input, as ``torch.logsumexp`` saves it, and the result in float32 (float64 for float64).
    """
    if not is_dynamo_compiling() and (result := _C.logsumexp(input, dim, keepdim)) is not None:
        return result
    if not isinstance(input, Tensor):
        return without_tensors(logsumexp, {"input": input}, {}, input, dim, keepdim)
    keepdim = kinds.boolean("logsumexp", "keepdim", keepdim)
    if not isinstance(dim, (tuple, list)):
        return _logsumexp(input, kinds.integer("logsumexp", "dim", dim), keepdim)
    if input.layout != torch.strided or input.is_nested:  # what has no strides cannot be permuted
        return reference.logsumexp(input, dim, keepdim)
    n = max(input.dim(), 1)
    dims = [d + n if d < 0 else d for d in (kinds.integer("logsumexp", "dim", d) for d in dim)]
    if any(not 0 <= d < n for d in dims):
        raise IndexError(f"regfast.logsumexp: dim: expected from {-n} to {n - 1}, got {tuple(dim)}")
    if len(set(dims)) != len(dims):
        raise RuntimeError(f"regfast.logsumexp: dim: expected different dimensions, got {tuple(dim)}")
    if input.dim() == 0:
        return _logsumexp(input, 0, keepdim)
    dims = dims or list(range(n))  # none means all, as in torch
    kept = [d for d in range(n) if d not in dims]
    # No -1, which is any number where another dimension is empty.
    rows = input.permute(*kept, *dims).reshape(
        [input.shape[d] for d in kept] + [math.prod([input.shape[d] for d in dims])]
    )
    result = _logsumexp(rows, -1, False)
    return result.reshape([1 if d in dims else size for d, size in enumerate(input.shape)]) if keepdim else result
