"""The fully connected layer with parameterised hypercomplex multiplication: an n-th of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.jit import is_scripting

from . import kinds
from ._extension import are_tensors, without_tensors
from .linear import Linear, LinearActivation
from .reference import ACTIVATIONS, phm_weight
from .types import Activation

_phm_linear: Callable[..., Tensor] = kinds.op("phm_linear")


def phm_linear(
    input: Tensor, a: Tensor, s: Tensor, bias: Tensor | None = None, *, activation: Activation = "none"
) -> Tensor:
    """``activation(input @ w.T + bias)``, ``w`` the sum over i of ``torch.kron(a[i], s[i])``, of which no more than
    1 MiB or an n-th exists at a time.

    Args:
        input: ``(*, in_features)``, any strides. float32, float64, bfloat16 and float16 have kernels; half types are
            accumulated in float32. On the CPU few rows (up to out_features / n) are mixed in it; beside more of them an
            n-th of w at a time is; both are rounded where bfloat16 is multiplied in pairs (AVX512-BF16, AMX). The CUDA
            kernels, where they are enabled, round the mixed rows for the tensor cores.
        a: ``(n, n, n)``, input's dtype: the multiplication table.
        s: ``(n, out_features / n, in_features / n)``, input's dtype. Each call copies it unless its memory is that of
            a contiguous ``(out_features / n, n, in_features / n)``, as it is where s is :attr:`PHMLinear.matrices`.
        bias: ``(out_features,)`` or None.
        activation: none, relu, gelu, gelu_tanh, silu, sigmoid or tanh, applied before the result is rounded and stored.

    Returns:
        ``(*, out_features)``, input's dtype. With n = 1 it is ``linear(input * a, s[0], bias)``.

    Raises:
        ValueError: for an unknown activation. RuntimeError: for shapes, dtypes or devices that do not fit.

    Saved for backward: a, s, and input if a or s needs a gradient (with an activation all, bias, and the output or the
    pre-activation). Gradients are computed only for the inputs that need them. The method is that of Zhang et al.,
    "Beyond fully-connected layers with quaternions: parameterization of hypercomplex multiplications with 1/n
    parameters" (2021). A chunk of rows is mixed by ``a`` into n rows each, which are multiplied by ``s``: the FLOPs of
    the dense layer and n * n * in_features multiplications more for each row, on an n-th of its weights.
    """
    if not are_tensors(input, a, s, bias):
        required, optional = {"input": input, "a": a, "s": s}, {"bias": bias}
        return without_tensors(phm_linear, required, optional, input, a, s, bias, activation=activation)
    return _phm_linear(input, a, s, bias, activation)


class PHMLinear(nn.Module):
    """A fully connected layer of ``in_features * out_features / n + n ** 3`` weights, by :func:`phm_linear`.

    It saves memory, not arithmetic: its FLOPs are those of the dense layer of the same size. For a few rows, where
    reading the weights is what takes the time, it is faster.

    Shapes: ``(*, in_features)`` to ``(*, out_features)``; ``n`` divides both. Parameters, all contiguous: ``a``
    (n, n, n), ``s`` (out_features / n, n, in_features / n), which is in the order in which the kernels read it, and
    ``bias``; ``matrices`` is ``s`` in the order of the formula, as :func:`phm_linear` takes it. At the start the weight
    that they stand for, and so the output, has the variance of :class:`torch.nn.Linear`'s.
    """

    if TYPE_CHECKING:  # TorchScript would want to look the types up
        activation: Activation
        bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int,
        bias: bool = True,
        *,
        activation: Activation = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if activation not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise ValueError(f"regfast.PHMLinear: activation: expected one of {names}, got {activation!r}")
        if n < 1 or in_features % n or out_features % n:
            raise ValueError(
                f"regfast.PHMLinear: n: expected a positive number that divides in_features = {in_features} and "
                f"out_features = {out_features}, got {n}"
            )
        super().__init__()
        self.in_features, self.out_features, self.n, self.activation = in_features, out_features, n, activation
        options: Any = {"device": device, "dtype": dtype}
        self.a = nn.Parameter(torch.empty(n, n, n, **options))
        # Row v of all n matrices together, as a row of the product's right side.
        self.s = nn.Parameter(torch.empty(out_features // n, n, in_features // n, **options))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, **options)) if bias else None)
        self.reset_parameters()

    @classmethod
    @torch.no_grad()
    def from_linear(cls, layer: nn.Linear, n: int) -> tuple[PHMLinear, float]:
        """The nearest layer of this kind to a dense one, and how far it is.

        Args:
            layer: with Parameters of any floating dtype. n: divides its ``in_features`` and ``out_features``.

        Returns:
            A layer with its own Parameters (``layer.bias`` copied) whose weight W' is nearest to ``layer.weight``, W,
            in the sense of least squares, and the relative error ``|W' - W| / |W|`` of Frobenius norms, before
            rounding to W's dtype. A trained dense weight is far from having this form: expect to train on.

        Raises: TypeError for a layer that is no ``nn.Linear``; ValueError for an n that does not divide.

        Blocks of W, each as a row, are a matrix of rank n if and only if W is a sum of n Kronecker products; the
        nearest one comes from its singular values (Van Loan and Pitsianis, "Approximation with Kronecker products",
        1993).
        """
        if not isinstance(layer, nn.Linear):
            raise TypeError(
                f"regfast.PHMLinear.from_linear: layer: expected a torch.nn.Linear, got {type(layer).__name__}"
            )
        weight, has_bias = layer.weight, layer.bias is not None
        options: Any = {"device": weight.device, "dtype": weight.dtype}
        made = cls(layer.in_features, layer.out_features, n, has_bias, **options)
        rows, columns = layer.out_features // n, layer.in_features // n
        blocks = weight.double().reshape(n, rows, n, columns).transpose(1, 2).reshape(n * n, rows * columns)
        left, values, right = torch.linalg.svd(blocks, full_matrices=False)
        terms = min(n, len(values))  # more would be zero
        roots = values[:terms].sqrt()
        made.a.zero_()[:terms] = (left[:, :terms] * roots).T.reshape(terms, n, n)
        made.matrices.zero_()[:terms] = (roots[:, None] * right[:terms]).reshape(terms, rows, columns)
        if made.bias is not None:
            made.bias.copy_(layer.bias)
        rest, all_of_it = values[terms:].square().sum(), values.square().sum()
        return made.train(layer.training), (rest / all_of_it).sqrt().item() if all_of_it > 0 else 0.0

    @property
    def matrices(self) -> Tensor:
        """The n matrices that are multiplied by the numbers of ``a``: a view (n, out_features / n, in_features / n)."""
        return self.s.transpose(0, 1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Numbers of ``s`` and ``bias`` as :class:`torch.nn.Linear` draws its own; ``a`` leaves variances as they are.

        An output is the sum of n * n numbers of ``a`` times products of rows of ``s``, each of an n-th of the variance
        that the dense layer's output has: their squares sum to n.
        """
        bound = self.in_features**-0.5 if self.in_features else 0.0
        nn.init.uniform_(self.s, -bound, bound)
        nn.init.normal_(self.a)
        self.a.mul_((self.n / self.a.square().sum((0, 2), keepdim=True)).sqrt())
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return torch.ops.regfast.phm_linear(input, self.a, self.matrices, self.bias, self.activation)
        return _phm_linear(input, self.a, self.matrices, self.bias, self.activation)

    @torch.no_grad()
    def merge(self) -> Linear | LinearActivation:
        """The dense layer that this one stands for, with its weight stored, for inference."""
        dense: Linear | LinearActivation = Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device="meta",
            dtype=self.s.dtype,
            activation=self.activation,
        )
        wide = torch.promote_types(self.s.dtype, torch.float32)
        weight = phm_weight(self.a.to(wide), self.matrices.to(wide)).to(self.s.dtype)
        layer = dense.linear if isinstance(dense, LinearActivation) else dense
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, n={self.n}"
        return f"{sizes}, bias={self.bias is not None}{activation}"
