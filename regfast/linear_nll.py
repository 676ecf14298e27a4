"""Negative log-likelihoods of linear models, without storing their predictions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary

from . import kinds
from ._extension import are_tensors, not_a_tensor, reduction_number, refuse_scripts, without_tensors
from .cross_entropy import cross_entropy
from .linear import is_product
from .linear_cross_entropy import linear_cross_entropy
from .reference import FAMILIES, LIKELIHOODS, gaussian_variance, nll_dtype, nll_loss, weighted_classes
from .types import Family, Reduction

_linear_nll: Callable[..., Tensor] = kinds.op("linear_nll")
_linear_mse_loss: Callable[..., Tensor] = kinds.op("linear_nll", "linear_mse_loss")


def linear_nll(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    family: Family,
    sigma: float | Tensor | None = None,
    pos_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    full: bool | None = None,
    eps: float = 1e-6,
    reduction: Reduction = "mean",
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """``-log P(target | linear(input, weight, bias))`` for a likelihood of the exponential family.

    With ``eta`` the linear layer's output, and the same values and gradients as F.linear followed by the loss named:

    =========== ======================================= ======================== ===================================
    family      loss                                    d loss / d eta           as
    =========== ======================================= ======================== ===================================
    gaussian    log(sigma) + (eta - y)^2 / (2 sigma^2), (eta - y) / sigma^2      F.gaussian_nll_loss
                and log(2 pi) / 2 with full
    bernoulli   log(1 + exp(eta)) - y eta               sigmoid(eta) - y         F.binary_cross_entropy_with_logits
    poisson     exp(eta) - y eta, and Stirling's        exp(eta) - y             F.poisson_nll_loss
                log(y!) with full
    categorical log(sum(exp(eta))) - eta[y]             softmax(eta) - onehot(y) F.cross_entropy
    =========== ======================================= ======================== ===================================

    Each gradient is estimate minus observation (McCullagh and Nelder, "Generalized Linear Models", 1989). A chunk of
    rows at a time is multiplied, turned into loss and residual in place and multiplied again; up to eight outputs are
    predicted, compared and multiplied in a single read of input.

    Args:
        input: ``(*, in_features)``, any strides; float32, float64, bfloat16 or float16. Half types are multiplied and
            accumulated in float32, predictions are not rounded to them; residuals of bfloat16 are, for the products
            that give gradients, where the CPU multiplies pairs of them (AVX512-BF16, AMX).
        weight: ``(out_features, in_features)``, input's dtype.
        target: ``(*, out_features)``, real numbers of any dtype: in [0, 1] for bernoulli, at least 0 for poisson. For
            categorical, classes or probabilities as :func:`regfast.linear_cross_entropy` takes them. Stirling's term
            is 0 up to 1, and so is its derivative by target, also at 0, where torch's is NaN.
        bias: ``(out_features,)`` or None, input's dtype.
        family: gaussian, bernoulli, poisson or categorical.
        sigma: the gaussian's standard deviation in target's units: a positive number, or a tensor ``()`` or
            ``(out_features,)``, which may be learned. 1 by default.
        pos_weight: of bernoulli: factors of the losses of ones, ``()`` or ``(out_features,)``.
        sample_weight: a weight for each row, input's shape without its last dimension. Like sigma and pos_weight it may
            have any floating dtype and is never rounded; a float64 one, or target, makes all of the call float64.
        full: whether a gaussian has its ``log(2 pi) / 2`` (by default it does), poisson Stirling's term (it does not).
        eps: the variance ``sigma^2`` is at least that, as in F.gaussian_nll_loss.
        reduction: none (of target's shape), mean (over all losses; with sample_weight divided by the sum of their
            weights) or sum.
        loss_dtype: of the result; by default what input and target promote to.

    Returns:
        The loss.

    Raises:
        ValueError: for an unknown family or reduction, an option of another family, or a sigma that is not positive.
        RuntimeError: for shapes, dtypes or devices that do not fit. Nothing broadcasts.

    Saved for backward: the inputs, and for a reduced loss its gradients, in float32 for half types. Under saved tensor
    hooks (a checkpoint's, ``save_on_cpu``) the inputs alone, from which backward computes the predictions again. Inputs
    have to stay as they are until backward, which raises where they were changed in place, and may be wrong where
    PyTorch was not told (``.data``, numpy). Gradients are computed only for the inputs that need them; those of target,
    pos_weight and sample_weight, second derivatives, forward mode and ``torch.func`` take plain torch operators.
    """
    duck = sigma if has_torch_function_unary(sigma) else None
    if not are_tensors(input, weight, target, bias, sample_weight, pos_weight, duck):
        return without_tensors(
            linear_nll,
            {"input": input, "weight": weight, "target": target},
            {"bias": bias, "sample_weight": sample_weight, "pos_weight": pos_weight, "sigma": duck},
            input,
            weight,
            target,
            bias,
            family=family,
            sigma=sigma,
            pos_weight=pos_weight,
            sample_weight=sample_weight,
            full=full,
            eps=eps,
            reduction=reduction,
            loss_dtype=loss_dtype,
        )
    mode = reduction_number("linear_nll", reduction)
    _check_options("linear_nll", family, sigma, pos_weight, full)
    if family == "categorical":
        if sample_weight is None:
            return linear_cross_entropy(
                input, weight, target, linear_bias=bias, reduction=reduction, loss_dtype=loss_dtype
            )
        each = linear_cross_entropy(input, weight, target, linear_bias=bias, reduction="none", loss_dtype=loss_dtype)
        return weighted_classes(each, target, sample_weight, reduction)
    others = (input, target, sample_weight)
    scale, variance = gaussian_variance(sigma, eps, *others) if family == "gaussian" else (pos_weight, 1.0)
    full = family == "gaussian" if full is None else full
    number, loss_dtype = FAMILIES.index(family), kinds.dtype("linear_nll", "loss_dtype", loss_dtype)
    return _linear_nll(input, weight, target, bias, scale, sample_weight, number, variance, full, mode, loss_dtype)


def linear_mse_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """``mse_loss(linear(input, weight, bias), target)`` without storing the predictions.

    The gaussian family of :func:`linear_nll` without its constants, whose arguments, errors, precision and saved
    tensors it has. ``target`` has the predictions' shape ``(*, out_features)``: where F.mse_loss would broadcast
    ``(N)`` against ``(N, 1)`` into N x N residuals, this raises RuntimeError.

    Returns: the mean or sum of the squared residuals, or each of them; with sample_weight the mean is divided by the
    sum of the weights, as F.mse_loss does.
    """
    if not are_tensors(input, weight, target, bias, sample_weight):
        return without_tensors(
            linear_mse_loss,
            {"input": input, "weight": weight, "target": target},
            {"bias": bias, "sample_weight": sample_weight},
            input,
            weight,
            target,
            bias,
            sample_weight=sample_weight,
            reduction=reduction,
            loss_dtype=loss_dtype,
        )
    mode = reduction_number("linear_mse_loss", reduction)
    loss_dtype = kinds.dtype("linear_mse_loss", "loss_dtype", loss_dtype)
    return _linear_mse_loss(input, weight, target, bias, None, sample_weight, 0, 1.0, False, mode, loss_dtype)


def _check_options(
    op: str, family: str, sigma: float | Tensor | str | None, pos_weight: object, full: bool | None
) -> None:
    """Options that no family, or another one, has."""

    def fail(argument: str, expected: str, got: object) -> NoReturn:
        raise ValueError(f"regfast.{op}: {argument}: expected {expected}, got {got}")

    if family not in LIKELIHOODS:
        fail("family", f"one of {', '.join(LIKELIHOODS)}", repr(family))
    if sigma is not None and family != "gaussian":
        fail("sigma", f"None for family {family}", sigma)
    if pos_weight is not None and family != "bernoulli":
        fail("pos_weight", f"None for family {family}", pos_weight)
    if full and family in ("bernoulli", "categorical"):
        fail("full", f"None or False for family {family}, which has no constant", full)
    if pos_weight is not None and not isinstance(pos_weight, Tensor):
        raise not_a_tensor(op, pos_weight=pos_weight)
    learnable = op == "LinearNLLLoss"
    # Values of a tensor are not looked at: a device would have to be waited for.
    if sigma is None or isinstance(sigma, Tensor) or (learnable and isinstance(sigma, str) and sigma == "learned"):
        return
    if isinstance(sigma, str) or not 0 < sigma < math.inf:
        expected = "a positive number, a tensor or 'learned'" if learnable else "a positive number or a tensor"
        fail("sigma", expected, repr(sigma))


class LinearNLLLoss(nn.Module):
    """A linear model together with its likelihood: :func:`linear_nll` of ``linear``'s parameters.

    Shapes: input ``(*, in_features)`` and target ``(*, out_features)`` to the loss; ``linear`` is a
    :class:`torch.nn.Linear`, initialised as that is, and gives predictions of ``eta``. Where it has come to do more
    than multiply (an adapter, hooks, a quantised weight), it is called, and its predictions are stored.

    Args:
        family, pos_weight, full, eps, reduction, loss_dtype: as in :func:`linear_nll`.
        sigma: a gaussian's: a number, a tensor of one number or one for each output (a buffer), or ``"learned"``: a
            parameter ``log_sigma`` of each output, 0 at first. ``loss.sigma`` is the value in use.
    """

    family: Family
    reduction: Reduction
    log_sigma: nn.Parameter | None
    fixed_sigma: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        family: Family,
        sigma: float | Tensor | Literal["learned"] | None = None,
        pos_weight: Tensor | None = None,
        full: bool | None = None,
        eps: float = 1e-6,
        reduction: Reduction = "mean",
        loss_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        reduction_number("LinearNLLLoss", reduction)
        _check_options("LinearNLLLoss", family, sigma, pos_weight, full)
        self.family, self.full, self.eps, self.reduction, self.loss_dtype = family, full, eps, reduction, loss_dtype
        self.linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self.register_buffer("pos_weight", pos_weight)
        learned = nn.Parameter(self.linear.weight.new_zeros(out_features)) if isinstance(sigma, str) else None
        self.register_parameter("log_sigma", learned)
        self._sigma = None if isinstance(sigma, (Tensor, str)) else sigma
        self.register_buffer("fixed_sigma", sigma if isinstance(sigma, Tensor) else None)

    __prepare_scriptable__ = refuse_scripts

    @property
    def sigma(self) -> float | Tensor | None:
        """The gaussian's standard deviation; None for another family."""
        if self.log_sigma is not None:
            return self.log_sigma.exp()
        if self.fixed_sigma is not None:
            return self.fixed_sigma
        return 1.0 if self._sigma is None and self.family == "gaussian" else self._sigma

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        if not is_product(self.linear):
            return self._of_predictions(self.linear(input), target, sample_weight)
        return linear_nll(
            input,
            self.linear.weight,
            target,
            self.linear.bias,
            family=self.family,
            sigma=self.sigma,
            pos_weight=self.pos_weight,
            sample_weight=sample_weight,
            full=self.full,
            eps=self.eps,
            reduction=self.reduction,
            loss_dtype=self.loss_dtype,
        )

    def _of_predictions(self, eta: Tensor, target: Tensor, sample_weight: Tensor | None) -> Tensor:
        """The loss of stored predictions."""
        if self.family == "categorical":
            mode: Reduction = self.reduction if sample_weight is None else "none"
            loss = cross_entropy(eta, target, reduction=mode, loss_dtype=self.loss_dtype)
            return loss if sample_weight is None else weighted_classes(loss, target, sample_weight, self.reduction)
        gaussian = self.family == "gaussian"
        scale, variance = gaussian_variance(self.sigma, self.eps) if gaussian else (self.pos_weight, 1.0)
        full = gaussian if self.full is None else self.full
        dtype = self.loss_dtype or nll_dtype(eta, target)
        number = FAMILIES.index(self.family)
        return nll_loss(eta, target, scale, sample_weight, number, variance, full, self.reduction, dtype)

    def extra_repr(self) -> str:
        sigma = "learned" if self.log_sigma is not None else self.sigma
        return f"family={self.family}{'' if sigma is None else f', sigma={sigma}'}, reduction={self.reduction}"
