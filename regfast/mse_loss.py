"""Mean squared error, the Gaussian likelihood's loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.jit import is_scripting
from torch.nn import _reduction

from . import _C, _paths, kinds, reference
from ._extension import REDUCTION_NUMBERS, reduction_number, without_tensors
from .types import Reduction

_mse_loss: Callable[..., Tensor] = kinds.op("mse_loss")


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """``(input - target) ** 2``, reduced, as :func:`torch.nn.functional.mse_loss`.

    Args:
        input, target: of one shape and dtype; others broadcast and promote as in torch, by torch's own operators.
        size_average, reduce: deprecated, as in torch.
        reduction: none, mean (over all elements) or sum.
        weight: of each element, or None; weighted losses are computed by torch's own operators.

    Returns:
        A scalar, or with reduction none a tensor of input's shape; input's dtype. Sums are kept in float64 over
        blocks of fixed size, so they have the same bits with any number of threads.

    Raises:
        ValueError: for an unknown reduction. RuntimeError: for shapes that do not broadcast.

    Saved for backward: input and target, as ``F.mse_loss`` saves them; the residual ``input - target`` is recomputed.
    """
    if size_average is None and reduce is None and weight is None and not is_dynamo_compiling():
        number = REDUCTION_NUMBERS.get(reduction) if type(reduction) is str else None
        if (result := _C.mse_loss(input, target, number)) is not None:
            return result
    if not (
        isinstance(input, Tensor) and isinstance(target, Tensor) and (weight is None or isinstance(weight, Tensor))
    ):
        required, optional = {"input": input, "target": target}, {"weight": weight}
        return without_tensors(mse_loss, required, optional, input, target, size_average, reduce, reduction, weight)
    if size_average is not None or reduce is not None:
        reduction = cast(Reduction, _reduction.legacy_get_string(size_average, reduce))
    if weight is not None:
        _paths.composite("mse_loss", (input, target, weight), "a weight of each element")
        return reference.mse_loss(input, target, reduction=reduction, weight=weight)
    return _mse_loss(input, target, reduction_number("mse_loss", reduction))


class MSELoss(nn.MSELoss):
    """:class:`torch.nn.MSELoss` computed by :func:`regfast.mse_loss`."""

    if TYPE_CHECKING:  # TorchScript would want to look the type up
        reduction: Reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if is_scripting():
            return torch.ops.regfast.mse_loss(input, target, _reduction.get_enum(self.reduction))
        return mse_loss(input, target, reduction=self.reduction)
