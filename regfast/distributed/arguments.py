"""What both vocabulary-parallel losses ask of their arguments, and what has to be the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import kinds
from .._extension import not_a_tensor, reduction_number
from ..outputs import select_outputs
from ..reference import HALF, OUTPUTS, require_normalizer
from .rows import Options

FLOATING = (torch.float32, torch.float64, *HALF)


def options_of(
    op: str,
    names: Sequence[str],
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float | None,
) -> Options:
    """Numbers of one kind, whatever they were given as, since those of all ranks are compared."""
    o = Options(
        kinds.integer(op, "ignore_index", ignore_index),
        kinds.number(op, "label_smoothing", label_smoothing),
        kinds.number(op, "z_loss", z_loss),
        None if softcap is None else kinds.number(op, "softcap", softcap),
        None if logit_scale is None else kinds.number(op, "logit_scale", logit_scale),
        frozenset(names),
    )
    if not 0 <= o.label_smoothing <= 1:
        raise RuntimeError(f"regfast.{op}: label_smoothing: expected a number from 0 to 1, got {o.label_smoothing}")
    if o.softcap is not None and not o.softcap > 0:
        raise RuntimeError(f"regfast.{op}: softcap: expected a positive number or None, got {o.softcap}")
    return o


def require_loss_dtype(op: str, dtype: torch.dtype | None) -> None:
    if kinds.dtype(op, "loss_dtype", dtype) not in (None, *FLOATING):
        raise RuntimeError(
            f"regfast.{op}: loss_dtype: expected float32, float64, bfloat16, float16 or None, got {dtype}"
        )


def require_target(op: str, shape: torch.Size, logits_shape: torch.Size, target: Tensor) -> bool:
    """Whether target holds probabilities; if it is neither these nor classes of rows, an error."""
    if target.is_floating_point() and target.shape == logits_shape:
        return True
    if target.shape != shape or target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise RuntimeError(
            f"regfast.{op}: target: expected class indices {tuple(shape)} of an integer type or probabilities "
            f"{tuple(logits_shape)} of a floating one, got {target.dtype} {tuple(target.shape)}"
        )
    return False


def require_class_weight(op: str, weight: Tensor | None, classes: int, like: Tensor) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise not_a_tensor(op, weight=weight)
    if weight.requires_grad:
        raise RuntimeError(f"regfast.{op}: weight: expected one without gradient, got one with it")
    if weight.shape != (classes,) or not weight.is_floating_point() or weight.device != like.device:
        raise RuntimeError(
            f"regfast.{op}: weight: expected one number for each of this rank's {classes} classes, floating and on "
            f"{like.device}, got {weight.dtype} {tuple(weight.shape)} on {weight.device}"
        )


def call_of(
    op: str,
    input: Tensor,
    shape: tuple[Any, ...],
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    normalizer: float | Tensor | None,
    **others: object,
) -> dict[str, object]:
    """What has to be the same on all ranks."""
    return {
        "input": f"{input.dtype} {shape}",
        "target": "probabilities" if target.is_floating_point() else "classes",
        "weight": weight is not None,
        **options._asdict(),
        "outputs": tuple(sorted(options.outputs)),
        "normalizer": None if normalizer is None else kinds.number(op, "normalizer", normalizer),
        **others,
    }


def in_one_type(input: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits and probabilities in the wider type, which is float64 if the weights are."""
    if not target.is_floating_point():
        return input, target
    wide = torch.promote_types(input.dtype, target.dtype)
    if weight is not None and weight.dtype == torch.float64:
        wide = torch.float64
    return input.to(wide), target.to(wide)


def checked_options(
    op: str,
    tensors: dict[str, object],
    reduction: str,
    outputs: str | tuple[str, ...],
    normalizer: float | Tensor | None,
    loss_dtype: torch.dtype | None,
    *numbers: Any,
) -> tuple[list[str], Options, Any, Any]:
    """What both losses ask of their arguments before they look at shapes: the outputs' names in the kernels' order, the
    options of ``numbers``, and what :func:`select_outputs` tells of the result."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise not_a_tensor(op, **{name: value})
    reduction_number(op, reduction)
    bits, result, places = select_outputs(op, outputs)
    names = [name for bit, name in enumerate(OUTPUTS) if bits >> bit & 1]
    if normalizer is not None:
        require_normalizer(op, normalizer, reduction)
    options = options_of(op, names, *numbers)
    require_loss_dtype(op, loss_dtype)
    return names, options, result, places
