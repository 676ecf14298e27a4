"""The fully connected layer with its activation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.jit import is_scripting

from ._extension import without_tensors
from .reference import ACTIVATIONS

_linear = torch.ops.regfast.linear.default


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """``activation(input @ weight.T + bias)``, as :func:`torch.nn.functional.linear` and an activation after it.

    Args:
        input: ``(*, in_features)``, any strides. float32, float64, bfloat16 and float16 have kernels; half types are
            multiplied and accumulated in float32 and rounded once.
        weight: ``(out_features, in_features)`` (or ``(in_features,)``), input's dtype.
        bias: ``(out_features,)`` or None.
        activation: none, relu, gelu, gelu_tanh, silu, sigmoid or tanh, applied before the result is rounded and stored.

    Returns:
        ``(*, out_features)``, input's dtype.

    Raises:
        ValueError: for an unknown activation.
        RuntimeError: for shapes, dtypes or devices that do not fit, as ``F.linear`` does.

    Saved for backward: input if weight needs a gradient, weight if input does (with an activation both, and bias), and
    the output (relu, sigmoid, tanh) or the pre-activation (gelu, gelu_tanh, silu). Gradients are computed only for the
    inputs that need them. The products follow Goto and van de Geijn, "Anatomy of high-performance matrix
    multiplication" (2008).
    """
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))):
        tensors = {"input": input, "weight": weight}, {"bias": bias}
        return without_tensors(linear, *tensors, input, weight, bias, activation=activation)
    return _linear(input, weight, bias, activation)


class Linear(nn.Linear):
    """:class:`torch.nn.Linear` computed by :func:`regfast.linear`, with an optional activation after it.

    Parameters, their initialisation and ``state_dict`` are ``nn.Linear``'s; ``activation`` is as in
    :func:`regfast.linear`. Shapes: ``(*, in_features)`` to ``(*, out_features)``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "none",
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"regfast.Linear: activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return torch.ops.regfast.linear(input, self.weight, self.bias, self.activation)
        return _linear(input, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        return super().extra_repr() + activation
