"""What torch.utils.flop_counter.FlopCounterMode counts for each op that multiplies: the products that run, two
operations for a multiplication and its addition, as for PyTorch's own; what comes between them counts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import _extension  # noqa: F401  registers the ops

_ops = torch.ops.regfast
Shape = Sequence[int]


def _product(input: Shape, weight: Shape) -> int:
    """Rows of input by a weight of all dimensions but its last for outputs; each of its gradients takes as many."""
    return 2 * prod(input) * prod(weight[:-1])


@register_flop_formula(_ops.linear_forward)
def _linear(input: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return _product(input, weight)


@register_flop_formula(_ops.linear_backward)
def _linear_backward(
    grad: Shape,
    input: Any,
    weight: Any,
    saved: Any,
    activation: str,
    output_mask: list[bool],
    *args: Any,
    **kwargs: Any,
) -> int:
    # input and weight are given where the gradient of the other one needs them.
    inner = weight[-1] if output_mask[0] else input[-1] if output_mask[1] else 0
    return 2 * prod(grad) * inner * sum(output_mask[:2])


@register_flop_formula([_ops.linear_cross_entropy_forward, _ops.linear_nll_forward])
def _loss(input: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return _product(input, weight)


@register_flop_formula([_ops.linear_cross_entropy_forward_backward, _ops.linear_nll_forward_backward])
def _loss_with_gradients(input: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    output_mask: list[bool] = args[-1]
    return _product(input, weight) * (1 + sum(output_mask[:2]))


@register_flop_formula(_ops._product)
def _product_of_chunk(a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(a) * b[1]


@register_flop_formula(_ops._add_product_)
def _added_product(total: Shape, a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(a) * b[1]


# Backward of a loss per row computes the logits, or the predictions, again.
@register_flop_formula(_ops.linear_cross_entropy_backward)
def _linear_cross_entropy_backward(
    loss: Any, lse: Any, entropy: Any, logprob: Any, input: Shape, weight: Shape, *args: Any, **kwargs: Any
) -> int:
    return _loss_with_gradients(input, weight, *args)


@register_flop_formula(_ops.linear_nll_backward)
def _linear_nll_backward(grad: Shape, input: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return _loss_with_gradients(input, weight, *args)


def _phm(rows: int, s: Shape) -> tuple[int, int]:
    """The two products of a phm_linear, of the sizes that its gradients' have too: rows by a, and what that gives by s.

    The second is that of the dense layer, whose weight s has an n-th of.
    """
    n, outputs, inputs = s
    return 2 * rows * n**3 * inputs, 2 * rows * n * outputs * n * inputs


@register_flop_formula(_ops.phm_linear_forward)
def _phm_linear(input: Shape, a: Shape, s: Shape, *args: Any, **kwargs: Any) -> int:
    return sum(_phm(prod(input[:-1]), s))


@register_flop_formula(_ops.phm_linear_backward)
def _phm_linear_backward(
    grad: Shape,
    input: Any,
    a: Shape,
    s: Shape,
    saved: Any,
    activation: str,
    output_mask: list[bool],
    *args: Any,
    **kwargs: Any,
) -> int:
    mix, dense = _phm(prod(grad[:-1]), s)
    # The gradient of the mixed rows serves that of input and that of a; s needs the rows mixed again.
    of_input, of_a, of_s, _ = output_mask
    return mix * (of_input + of_a + of_s) + dense * ((of_input or of_a) + of_s)
