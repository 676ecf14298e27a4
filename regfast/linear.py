"""The fully connected layer with its activation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.jit import is_scripting
from torch.nn import Parameter

from . import _C, _onnx, kinds
from ._extension import without_tensors
from .reference import ACTIVATIONS
from .types import Activation

_linear: Callable[..., Tensor] = kinds.op("linear")


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation = "none") -> Tensor:
    """``activation(input @ weight.T + bias)``, as :func:`torch.nn.functional.linear` and an activation after it.

    Args:
        input: ``(*, in_features)``, any strides. float32, float64, bfloat16 and float16 have kernels; half types are
            multiplied and accumulated in float32 and rounded once.
        weight: ``(out_features, in_features)`` (or ``(in_features,)``), input's dtype.
        bias: ``(out_features,)`` or None.
        activation: none, relu, gelu, gelu_tanh, silu, sigmoid or tanh, applied before the result is rounded and stored.
            At infinity the derivatives of gelu and silu are their limits, 0 and 1, where torch's are NaN.

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
    if not is_dynamo_compiling() and (result := _C.linear(input, weight, bias, activation)) is not None:
        return result
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))):
        required, optional = {"input": input, "weight": weight}, {"bias": bias}
        return without_tensors(linear, required, optional, input, weight, bias, activation=activation)
    return _linear(input, weight, bias, activation)


def is_product(layer: nn.Module) -> bool:
    """Whether a call of this layer is F.linear of its weight and bias and nothing else, so that it may be fused.

    It is not where the layer was replaced (by an adapter, a quantised layer), where hooks are called before or after it
    (pruning, torch.nn.utils.weight_norm, parallelize_module, fully_shard) or where its weight answers F.linear itself.
    A parametrization is computed whenever the weight is read. Hooks on all modules of the process do not count: they
    watch.
    """
    plain = isinstance(layer, nn.Linear) and type(layer).forward in (nn.Linear.forward, Linear.forward)
    return plain and is_bare(layer)


def is_bare(layer: nn.Module) -> bool:
    """Whether a call of a layer is its class's forward and nothing else, and its weight knows our functions."""
    return (
        "forward" not in vars(layer)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
        and not _answers_functions(layer.weight)
    )


def _answers_functions(weight: object) -> bool:
    """Whether a weight is of a subclass of Tensor that answers torch's functions itself, and knows none of ours. Modes
    that are active (export's, for one) are not the weight's."""
    if not isinstance(weight, Tensor):
        return False
    kind = type(weight)
    if kind is Parameter or kind is Tensor:
        return False
    return kind.__torch_function__ is not torch._C._disabled_torch_function_impl


class Linear(nn.Linear):
    """:class:`torch.nn.Linear` computed by :func:`regfast.linear`.

    Parameters, their initialisation and ``state_dict`` are ``nn.Linear``'s. Shapes: ``(*, in_features)`` to
    ``(*, out_features)``. ``Linear(..., activation="relu")`` is a :class:`LinearActivation`, no ``nn.Linear``: what
    rewrites those (fuses, merges adapters, quantises) knows of no activation, and would drop it.

    ``torch.ao.quantization`` looks for the very class ``nn.Linear`` and passes over this one, which then warns: set
    ``layer.__class__ = torch.nn.Linear`` before. torchao's ``quantize_`` takes it as it is.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "none",
    ) -> None:
        if activation == "none":
            super().__init__(in_features, out_features, bias, device, dtype)
            return
        if type(self) is not Linear:
            raise TypeError(
                f"regfast.Linear: activation: expected none in a subclass, got {activation!r} in "
                f"{type(self).__name__}; subclass regfast.LinearActivation"
            )
        # Nothing has been set so far: the object is of the other class before it is anything.
        made: Any = self
        made.__class__ = LinearActivation
        made.__init__(in_features, out_features, bias, device, dtype, activation=activation)

    @classmethod
    def from_linear(cls, layer: nn.Linear) -> Linear:
        """A layer with the Parameters of another one, the very objects, and its mode; hooks are not taken over."""
        if not isinstance(layer, nn.Linear):
            raise TypeError(
                f"regfast.Linear.from_linear: layer: expected a torch.nn.Linear, got {type(layer).__name__}"
            )
        made = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        return made.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return torch.ops.regfast.linear(input, self.weight, self.bias, "none")
        if _answers_functions(self.weight):
            return nn.Linear.forward(self, input)
        return _linear(input, self.weight, self.bias, "none")

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:  # nn.Module's, while torch.jit traces
        _onnx.register()
        module: Any = super()
        return module._slow_forward(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # torch.ao.quantization leaves word of its plan on every module that it meets.
        if name == "qconfig":
            warnings.warn(
                "regfast.Linear: quantisation: expected torch.nn.Linear, the class that torch.ao.quantization looks "
                "for, got regfast.Linear, which it leaves as it is; set layer.__class__ = torch.nn.Linear before",
                stacklevel=2,
            )


class LinearActivation(nn.Module):
    """A linear layer and an activation in one call of :func:`regfast.linear`.

    The layer is ``linear``, a :class:`torch.nn.Linear` that may be replaced or changed as any other: what else it then
    does (adapters, hooks, a quantised weight) is done, and the activation follows by itself. ``weight``, ``bias``,
    ``in_features`` and ``out_features`` are read from it. A ``state_dict`` of ``nn.Linear`` loads. Shapes:
    ``(*, in_features)`` to ``(*, out_features)``.

    Raises: ValueError for an unknown activation; TypeError for a parameter that would replace ``weight`` or ``bias``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"regfast.Linear: activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        super().__init__()
        self.activation = activation
        self.linear = nn.Linear(in_features, out_features, bias, device, dtype)

    def __prepare_scriptable__(self) -> LinearActivation:
        if not is_product(self.linear):
            raise NotImplementedError(
                "regfast.LinearActivation: torch.jit.script: expected linear to be an nn.Linear without hooks, got "
                f"{type(self.linear).__name__}"
            )
        return self

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return torch.ops.regfast.linear(input, self.linear.weight, self.linear.bias, self.activation)
        if is_product(self.linear):
            return _linear(input, self.linear.weight, self.linear.bias, self.activation)
        return ACTIVATIONS[self.activation](self.linear(input))

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:
        _onnx.register()
        module: Any = super()
        return module._slow_forward(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # Where an assignment ends that would not reach linear's.
        if name in ("weight", "bias"):
            raise TypeError(
                f"regfast.LinearActivation: {name}: expected to be set on linear, which the activation follows, got "
                f"{'None' if param is None else f'a parameter of shape {tuple(param.shape)}'}"
            )
        super().register_parameter(name, param)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):
            if prefix + name in state_dict:
                state_dict[f"{prefix}linear.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)
