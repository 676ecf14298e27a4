"""The same maths in plain torch: the specification, the oracle of the tests, and the fallback for derivatives.

Every function has the signature, shapes, dtypes and errors of its namesake in ``regfast``, and is built from torch
operators that have first and second derivatives, forward mode and batching rules, so that ``create_graph=True``,
``torch.func`` and forward mode can be routed here. Half types are computed in float32 and rounded once, but for
products on devices other than the CPU, which are ``F.linear``'s: in the type that tensor cores multiply.

Whoever puts ``regfast.cross_entropy`` in the place of ``F.cross_entropy`` must not find it here again, so the namesakes
and what goes with them are taken from ``torch.ops.aten``, which nobody replaces.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from functools import reduce as fold
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction

__all__ = [
    "cross_entropy",
    "cross_entropy_outputs",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_outputs",
    "linear_mse_loss",
    "linear_nll",
    "linear_nll_loss",
    "log_softmax",
    "logsumexp",
    "mse_loss",
    "phm_linear",
    "softmax",
]

_aten = torch.ops.aten

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": _aten.relu.default,
    "gelu": _aten.gelu.default,
    "gelu_tanh": lambda x: _aten.gelu.default(x, approximate="tanh"),
    "silu": _aten.silu.default,
    "sigmoid": _aten.sigmoid.default,
    "tanh": _aten.tanh.default,
}

REDUCTIONS = ("none", "mean", "sum")  # in the order of torch's reduction numbers
FAMILIES = ("squared", "gaussian", "bernoulli", "poisson")  # in the order of the extension's numbers
LIKELIHOODS = (*FAMILIES[1:], "categorical")  # the families that users name
OUTPUTS = ("loss", "lse", "entropy", "logprob", "argmax")
HALF = (torch.float16, torch.bfloat16)
FLOATING = "a floating-point dtype"


@overload
def _up(x: Tensor) -> Tensor: ...
@overload
def _up(x: Tensor | None) -> Tensor | None: ...
def _up(x: Tensor | None) -> Tensor | None:
    """Half types as float32, everything else as it is."""
    return x.float() if x is not None and x.dtype in HALF else x


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``input @ weight.T + bias``, on the CPU not rounded to half types, elsewhere multiplied in them."""
    if input.device.type == "cpu":
        input, weight, bias = _up(input), _up(weight), _up(bias)
    return _aten.linear.default(input, weight, bias)


def _promoted(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that torch's elementwise operators give for these tensors, whatever their dimensions."""
    return fold(torch.promote_types, (x.dtype for x in tensors if x is not None))


def _autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of x, and so chooses dtypes; some devices know no autocast at all."""
    device = x.device.type
    # Of these two it is known: torch 2.11 does not compile the question.
    known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def result_types(input: Tensor, target: Tensor | None, weight: Tensor | None) -> dict[str, torch.dtype]:
    """Of a cross-entropy's outputs: input's, float32 at least under autocast, as torch's. Wider probabilities (target;
    classes count for nothing) or weights of them make a wider loss."""
    row = torch.promote_types(input.dtype, torch.float32) if _autocast(input) else input.dtype
    probabilities = target is not None and target.is_floating_point()
    loss = torch.promote_types(row, _promoted(target, weight)) if probabilities else row
    return {"loss": loss, "logprob": loss, "lse": row, "entropy": row}


def require_normalizer(op: str, normalizer: object, reduction: str) -> None:
    """A mean's sum is divided by it, and nothing else is."""
    if reduction == "mean" and type(normalizer) in (int, float):
        return
    number = isinstance(normalizer, (int, float, Tensor)) and not isinstance(normalizer, bool)
    _require(number, TypeError, f"{op}: normalizer", "a number or a Tensor", type(normalizer).__name__)
    real = not isinstance(normalizer, Tensor) or not normalizer.is_complex()
    _require(real, TypeError, f"{op}: normalizer", "a real number", getattr(normalizer, "dtype", None))
    one = not isinstance(normalizer, Tensor) or normalizer.numel() == 1
    _require(one, RuntimeError, f"{op}: normalizer", "one number", f"shape {tuple(getattr(normalizer, 'shape', ()))}")
    _require(reduction == "mean", ValueError, f"{op}: reduction", "mean with a normalizer", repr(reduction))


def divided(total: Tensor, normalizer: float | Tensor) -> Tensor:
    """A sum of losses by a normalizer, which may be a tensor of any dtype and of one element."""
    return total / (normalizer.reshape(()) if isinstance(normalizer, Tensor) else normalizer)


def normalized(
    op: str,
    call: Callable[..., Tensor | tuple[Tensor, ...]],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    outputs: str | tuple[str, ...],
    loss_dtype: torch.dtype | None,
    normalizer: float | Tensor,
) -> Any:
    """What ``call(reduction=, loss_dtype=)`` gives with a loss that is its sum divided by the normalizer. The sum is
    divided in float32 at least, since it may be beyond the range of half types, and then rounded once; gradients of
    float64 logits are divided in float64."""
    require_normalizer(op, normalizer, reduction)
    own = result_types(input, target, weight)
    types = {name: loss_dtype or type for name, type in own.items()}
    wide = fold(torch.promote_types, (*own.values(), *types.values()), torch.float32)
    result = call(reduction="sum", loss_dtype=wide)
    values = [result] if isinstance(result, Tensor) else list(result)
    for i, name in enumerate((outputs,) if isinstance(outputs, str) else outputs):
        if name == "loss":
            values[i] = divided(values[i], normalizer)
        if name in types:
            values[i] = values[i].to(types[name])
    return values[0] if isinstance(result, Tensor) else type(result)(values)


_SUM_TYPES = {torch.float32: None, torch.float64: None, **dict.fromkeys(HALF, torch.float32)}


def sum_to_divide(
    op: str, input: object, target: object, reduction: str, loss_dtype: torch.dtype | None, normalizer: float | Tensor
) -> tuple[int | None, torch.dtype | None]:
    """What :func:`normalized` asks for in the plainest of calls, whose loss has input's type: the number of the sum and
    its loss_dtype. No number in any other."""
    if not isinstance(input, Tensor) or not isinstance(target, Tensor) or loss_dtype is not None:
        return None, None
    if input.dtype not in _SUM_TYPES or target.is_floating_point() or _autocast(input):
        return None, None
    require_normalizer(op, normalizer, reduction)
    return REDUCTIONS.index("sum"), _SUM_TYPES[input.dtype]


def _require(condition: bool, error: type[Exception], what: str, expected: object, got: object) -> None:
    """Raises what torch raises, in the words of this library."""
    if not condition:
        raise error(f"regfast.{what}: expected {expected}, got {got}")


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """``activation(input @ weight.T + bias)``."""
    names = ", ".join(ACTIVATIONS)
    _require(activation in ACTIVATIONS, ValueError, "linear: activation", f"one of {names}", repr(activation))
    if weight.layout == torch.strided:
        _require(weight.dim() <= 2, RuntimeError, "linear: weight", "1 or 2 dimensions", tuple(weight.shape))
    if activation == "none":
        return _aten.linear.default(input, weight, bias)
    if input.dtype in HALF and all(x is None or x.dtype == input.dtype for x in (weight, bias)):
        y = ACTIVATIONS[activation](_product(input, weight, bias))
        # Under autocast the product has chosen the dtype of the result.
        return y if _autocast(input) else y.to(input.dtype)
    return ACTIVATIONS[activation](_aten.linear.default(input, weight, bias))


def phm_weight(a: Tensor, s: Tensor) -> Tensor:
    """The weight that ``a`` and ``s`` stand for: the sum over i of ``torch.kron(a[i], s[i])``."""
    return _aten.einsum.default("mup,mvr->uvpr", [a, s]).reshape(a.shape[1] * s.shape[1], a.shape[2] * s.shape[2])


def phm_linear(input: Tensor, a: Tensor, s: Tensor, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """``activation(input @ w.T + bias)`` with ``w`` the sum of ``kron(a[i], s[i])``, which here is stored."""
    names = ", ".join(ACTIVATIONS)
    _require(activation in ACTIVATIONS, ValueError, "phm_linear: activation", f"one of {names}", repr(activation))
    cube = a.dim() == 3 and a.shape[0] == a.shape[1] == a.shape[2] >= 1
    _require(cube, RuntimeError, "phm_linear: a", "shape (n, n, n)", tuple(a.shape))
    fits = s.dim() == 3 and s.shape[0] == a.shape[0]
    shape = f"shape ({a.shape[0]}, out_features / {a.shape[0]}, in_features / {a.shape[0]})"
    _require(fits, RuntimeError, "phm_linear: s", shape, tuple(s.shape))
    if input.dtype in HALF and all(x is None or x.dtype == input.dtype for x in (a, s, bias)):
        if input.device.type == "cpu":
            a, s = _up(a), _up(s)
        y = ACTIVATIONS[activation](_product(input, phm_weight(a, s), bias))
        # Under autocast the product has chosen the dtype of the result.
        return y if _autocast(input) else y.to(input.dtype)
    return ACTIVATIONS[activation](_aten.linear.default(input, phm_weight(a, s), bias))


def softmax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """``exp(input) / sum(exp(input))`` along ``dim``."""
    _require((dtype or input.dtype).is_floating_point, NotImplementedError, "softmax: input", FLOATING, input.dtype)
    return _aten.softmax.int(input, dim, dtype)


def log_softmax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """``input - logsumexp(input)`` along ``dim``."""
    _require((dtype or input.dtype).is_floating_point, NotImplementedError, "log_softmax: input", FLOATING, input.dtype)
    return _aten.log_softmax.int(input, dim, dtype)


def logsumexp(input: Tensor, dim: int | Sequence[int] = -1, keepdim: bool = False) -> Tensor:
    """``log(sum(exp(input)))`` over ``dim``, one dimension or several."""
    result = _logsumexp(_up(input), dim, keepdim)
    return result.to(input.dtype) if input.dtype in HALF else result


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """``(input - target) ** 2``, weighted and reduced; with a weight, the mean is divided by the sum of the weights."""
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    dtype = _promoted(input, target, weight)
    _require(
        reduction in REDUCTIONS, ValueError, "mse_loss: reduction", f"one of {', '.join(REDUCTIONS)}", repr(reduction)
    )
    _require(dtype.is_floating_point, NotImplementedError, "mse_loss: input", FLOATING, dtype)
    loss = _squared_error(input, target, reduction, weight)
    # Autocast lists torch's mse_loss among the operators that return float32; its weighted form is no such operator.
    if weight is None and _autocast(input):
        return loss
    return loss.to(dtype)


def _squared_error(input: Tensor, target: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
    """As F.mse_loss, which warns of shapes that broadcast."""
    shape = input.shape
    if shape != target.shape:
        pairs = zip(reversed(shape), reversed(target.shape), strict=False)
        broadcast = all(a == b or a == 1 or b == 1 for a, b in pairs)
        expected = f"a shape that broadcasts with {tuple(shape)}"
        _require(broadcast, RuntimeError, "mse_loss: target", expected, tuple(target.shape))
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). This will "
            "likely lead to incorrect results due to broadcasting. Please ensure they have the same size.",
            stacklevel=4,
        )
        input, target = torch.broadcast_tensors(input, target)
    # Of one dtype: mse_loss of torch 2.11 promotes by itself, and its backward does not.
    dtype = _promoted(_up(input), _up(target))
    x, y = input.to(dtype), target.to(dtype)
    if weight is None:
        return _aten.mse_loss.default(x, y, REDUCTIONS.index(reduction))
    _require(weight.shape == shape, ValueError, "mse_loss: weight", tuple(shape), tuple(weight.shape))
    terms = (x - y).square() * _up(weight)
    if reduction == "none":
        return terms
    return terms.sum() if reduction == "sum" else terms.sum() / _up(weight).sum()


def _logsumexp(x: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> Tensor:
    return _aten.logsumexp.default(x, [dim] if isinstance(dim, int) else list(dim), keepdim)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    outputs: str | tuple[str, ...] = ("loss",),
    inplace_backward: bool = False,
    loss_dtype: torch.dtype | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Cross-entropy of logits: the tensor for one name in ``outputs``, a plain tuple for several.

    ``inplace_backward`` is accepted and has no effect: plain torch always writes its gradient into memory of its own.
    """
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    if normalizer is not None:
        options: dict[str, Any] = {"z_loss": z_loss, "softcap": softcap, "logit_scale": logit_scale, "outputs": outputs}
        call = partial(
            cross_entropy, input, target, weight, None, ignore_index, label_smoothing=label_smoothing, **options
        )
        return normalized("cross_entropy", call, input, target, weight, reduction, outputs, loss_dtype, normalizer)
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    known = set(names) <= set(OUTPUTS) and len(set(names)) == len(names) > 0
    _require(known, ValueError, "cross_entropy: outputs", f"names among {', '.join(OUTPUTS)}", repr(outputs))
    _require_class_weight_type("cross_entropy", input, weight, target.shape == input.shape)
    results = cross_entropy_outputs(
        input, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, names, loss_dtype
    )
    return results[0] if len(results) == 1 else tuple(results)


def _require_class_weight_type(op: str, input: Tensor, weight: Tensor | None, probabilities: bool) -> None:
    """torch multiplies losses of classes by weights of the logits' type alone, losses of probabilities by any."""
    if weight is not None and not probabilities and not _autocast(input):
        _require(weight.dtype == input.dtype, RuntimeError, f"{op}: weight", input.dtype, weight.dtype)


def cross_entropy_outputs(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int | str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float | None,
    outputs: Sequence[str],
    loss_dtype: torch.dtype | None,
) -> list[Tensor]:
    """One tensor per name in ``outputs``, in that order; what each name means is defined here."""
    if isinstance(reduction, int):
        reduction = REDUCTIONS[reduction]
    names = ", ".join(REDUCTIONS)
    _require(reduction in REDUCTIONS, ValueError, "cross_entropy: reduction", f"one of {names}", repr(reduction))
    _require(input.dtype.is_floating_point, NotImplementedError, "cross_entropy: input", FLOATING, input.dtype)
    probabilities = target.shape == input.shape
    if weight is not None and not probabilities:
        frozen = not (weight.requires_grad and torch.is_grad_enabled())
        _require(frozen, RuntimeError, "cross_entropy: weight", "one without gradient for class targets", "one with it")

    dtypes = result_types(input, target if probabilities else None, weight)

    class_dim = 1 if input.dim() > 1 else 0
    z = _up(input)
    if logit_scale is not None:
        z = z * logit_scale
    if softcap is not None:
        z = softcap * _aten.tanh.default(z / softcap)
    if not probabilities:
        target = target if target.dtype in (torch.int64, torch.bool) or target.is_floating_point() else target.long()
        target = target.reshape(()) if input.dim() == 1 and target.shape == (1,) else target
    target, weight = _up(target), _up(weight)

    compute: dict[str, Callable[[], Tensor]] = {
        "loss": lambda: _loss(z, target, weight, ignore_index, reduction, label_smoothing, z_loss, probabilities),
        "lse": lambda: _lse(z, class_dim),
        "entropy": lambda: _entropy(z, class_dim),
        "logprob": lambda: _logprob(z, target, ignore_index, class_dim, probabilities),
        "argmax": lambda: z.detach().argmax(class_dim),
    }
    try:
        results = {name: compute[name]() for name in outputs}
    except IndexError as error:
        expected = f"classes from 0 to {z.shape[class_dim] - 1}"
        bad = re.search(r"Target (-?\d+) is out of bounds", str(error))
        got = bad[1] if bad else error
        raise IndexError(f"regfast.cross_entropy: target: expected {expected}, got {got}") from None
    return [result if name == "argmax" else result.to(loss_dtype or dtypes[name]) for name, result in results.items()]


def as_batch(input: Tensor, classes: int, target: Tensor) -> tuple[Tensor, Tensor, torch.Size | None]:
    """A batch of more than one dimension as one of rows, and its shape; None where there is nothing to do. torch takes
    a class in one dimension for a single row, unless with one class that is the shape of probabilities."""
    if input.dim() == 1 and target.shape == (1,) and classes != 1 and not target.is_floating_point():
        return input, target.squeeze(0), None
    if input.dim() <= 2:
        return input, target, None
    batch = input.shape[:-1]
    fits = target.shape[: len(batch)] == batch
    _require(
        fits, RuntimeError, "linear_cross_entropy: target", f"batch {tuple(batch)} as input has", tuple(target.shape)
    )
    return input.flatten(0, -2), target.flatten(0, len(batch) - 1), batch


def unbatched(result: Tensor, batch: torch.Size) -> Tensor:
    """A result for each row in the shape of the batch; a reduced loss as it is."""
    return result.reshape(batch + result.shape[1:]) if result.dim() else result


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    outputs: str | tuple[str, ...] = ("loss",),
    memory_budget: int | None = None,
    filter_eps: float = 0.0,
    loss_dtype: torch.dtype | None = None,
    options: object = None,
    normalizer: float | Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Cross-entropy of ``linear(input, linear_weight, linear_bias)``, which here is stored.

    ``memory_budget``, ``filter_eps`` and ``options`` are accepted and have no effect.
    """
    if normalizer is not None:
        further: dict[str, Any] = {"z_loss": z_loss, "softcap": softcap, "logit_scale": logit_scale, "outputs": outputs}
        given: dict[str, Any] = {"linear_bias": linear_bias, "weight": weight, "ignore_index": ignore_index, **further}
        given["label_smoothing"] = label_smoothing
        call = partial(linear_cross_entropy, input, linear_weight, target, **given)
        return normalized(
            "linear_cross_entropy", call, input, target, weight, reduction, outputs, loss_dtype, normalizer
        )
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    known = set(names) <= set(OUTPUTS) and len(set(names)) == len(names) > 0
    _require(known, ValueError, "linear_cross_entropy: outputs", f"names among {', '.join(OUTPUTS)}", repr(outputs))
    _require_class_weight_type("linear_cross_entropy", input, weight, target.is_floating_point())
    input, target, batch = as_batch(input, linear_weight.shape[0], target)
    results = linear_cross_entropy_outputs(
        input,
        linear_weight,
        target,
        linear_bias,
        weight,
        -100 if ignore_index is None else ignore_index,
        reduction,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        names,
        loss_dtype,
    )
    if batch is not None:
        results = [unbatched(result, batch) for result in results]
    return results[0] if len(results) == 1 else tuple(results)


def linear_cross_entropy_outputs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int | str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float | None,
    outputs: Sequence[str],
    loss_dtype: torch.dtype | None,
) -> list[Tensor]:
    """One tensor per name in ``outputs``, in that order. Logits of half types stay in float32."""
    _require(input.dtype.is_floating_point, NotImplementedError, "linear_cross_entropy: input", FLOATING, input.dtype)
    # Dimension 0 of the weight holds the classes, and what comes after them belongs to the loss's positions.
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = _product(input, linear_weight.flatten(0, -2), bias)
    logits = logits.unflatten(-1, linear_weight.shape[:-1])
    probabilities = target.shape == logits.shape
    if weight is not None:
        frozen = probabilities or not (weight.requires_grad and torch.is_grad_enabled())
        expected = "one without gradient for class targets"
        _require(frozen, RuntimeError, "linear_cross_entropy: weight", expected, "one with it")
    results = cross_entropy_outputs(
        logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, outputs, None
    )
    dtypes = result_types(input, target if probabilities else None, weight)
    return [
        result if name == "argmax" else result.to(loss_dtype or dtypes[name])
        for name, result in zip(outputs, results, strict=True)
    ]


def linear_nll(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    family: str,
    sigma: float | Tensor | None = None,
    pos_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    full: bool | None = None,
    eps: float = 1e-6,
    reduction: str = "mean",
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """Negative log-likelihood of ``target`` under ``family`` with ``linear(input, weight, bias)`` as its parameter."""
    names = ", ".join(LIKELIHOODS)
    _require(family in LIKELIHOODS, ValueError, "linear_nll: family", f"one of {names}", repr(family))
    if family == "categorical":
        mode = reduction if sample_weight is None else "none"
        loss = linear_cross_entropy(input, weight, target, linear_bias=bias, reduction=mode, loss_dtype=loss_dtype)
        assert isinstance(loss, Tensor)  # of one output
        return loss if sample_weight is None else weighted_classes(loss, target, sample_weight, reduction)
    variance, number = gaussian_variance(sigma, eps, input, target, sample_weight)
    scale = variance if family == "gaussian" else pos_weight
    full = family == "gaussian" if full is None else full
    options = (FAMILIES.index(family), number, full, reduction, loss_dtype)
    return linear_nll_loss(input, weight, target, bias, scale, sample_weight, *options)


def linear_mse_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """``(linear(input, weight, bias) - target) ** 2``, reduced."""
    return linear_nll_loss(input, weight, target, bias, None, sample_weight, 0, 1.0, False, reduction, loss_dtype)


def gaussian_variance(sigma: float | Tensor | None, eps: float, *others: Tensor | None) -> tuple[Tensor | None, float]:
    """The variance, of at least eps, as a tensor or as a number. As in F.gaussian_nll_loss the bound has no
    derivative. That of a half type is computed in float32, where squares of its range fit."""
    if not isinstance(sigma, Tensor):
        return None, max(1.0 if sigma is None else float(sigma) ** 2, eps)
    type = _promoted(sigma, *(x for x in others if x is not None and x.is_floating_point()))
    variance = sigma.to(torch.promote_types(type, torch.float32)).square()
    value = variance.detach()
    return variance + torch.where(value < eps, eps - value, 0), 1.0


def weighted(loss: Tensor, sample_weight: Tensor, reduction: str) -> Tensor:
    """A loss of each row, or of each of its outputs, under a weight for each row; a mean is divided by the weights."""
    weights = sample_weight.reshape(sample_weight.shape + (1,) * (loss.dim() - sample_weight.dim())).expand(loss.shape)
    terms = _up(loss) * weights
    if reduction == "none":
        return terms.to(loss.dtype)
    total = terms.sum()
    if reduction == "mean":  # the rows' weights are summed up before they are repeated: torch adds equal terms badly
        total = total / (_up(sample_weight).sum() * (loss.numel() // max(1, sample_weight.numel())))
    return total.to(loss.dtype)


def weighted_classes(loss: Tensor, target: Tensor, sample_weight: Tensor, reduction: str) -> Tensor:
    """A loss of each row's class under a weight for each row. Rows that are ignored count for nothing in a mean."""
    expected = f"one number for each row, shape {tuple(loss.shape)}"
    fits = sample_weight.shape == loss.shape
    _require(fits, RuntimeError, "linear_nll: sample_weight", expected, tuple(sample_weight.shape))
    if not target.is_floating_point():
        sample_weight = torch.where(target == -100, 0, sample_weight)
    return weighted(loss, sample_weight, reduction)


def linear_nll_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    sample_weight: Tensor | None,
    family: int,
    variance: float,
    full: bool,
    reduction: int | str,
    loss_dtype: torch.dtype | None,
) -> Tensor:
    """As the op of that name: ``scale`` is a gaussian's variance or bernoulli's pos_weight, ``variance`` the number in
    its place. Predictions of half types stay in float32."""
    eta, dtype = _product(input, weight, bias), loss_dtype or nll_dtype(input, target)
    return nll_loss(eta, target, scale, sample_weight, family, variance, full, reduction, dtype)


def nll_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    """Of the loss of a linear model: what input promotes to with a floating target, and float32 under autocast."""
    dtype = _promoted(input, target) if target.dtype.is_floating_point else input.dtype
    return torch.promote_types(dtype, torch.float32) if _autocast(input) else dtype


def nll_loss(
    eta: Tensor,
    target: Tensor,
    scale: Tensor | None,
    sample_weight: Tensor | None,
    family: int,
    variance: float,
    full: bool,
    reduction: int | str,
    dtype: torch.dtype,
) -> Tensor:
    """The loss of predictions, in a dtype."""
    if isinstance(reduction, int):
        reduction = REDUCTIONS[reduction]
    name = FAMILIES[family]
    op = "linear_mse_loss" if name == "squared" else "linear_nll"
    names = ", ".join(REDUCTIONS)
    _require(reduction in REDUCTIONS, ValueError, f"{op}: reduction", f"one of {names}", repr(reduction))
    eta, y = _up(eta), _up(target)
    _require(eta.shape == y.shape, RuntimeError, f"{op}: target", f"shape {tuple(eta.shape)}", tuple(y.shape))
    y = y if y.is_floating_point() else y.to(eta.dtype)
    if name == "squared":
        loss = (eta - y).square()
    elif name == "gaussian":
        v: float | Tensor
        log_v: float | Tensor
        if scale is None:  # a number may be beyond the range of the predictions' dtype
            v, log_v = variance, math.log(variance) if variance > 0 else -math.inf
        else:
            v, log_v = _up(scale), torch.log(_up(scale))
        loss = 0.5 * (log_v + (eta - y).square() / v)
        loss = loss + 0.5 * math.log(2 * math.pi) if full else loss
    elif name == "bernoulli":
        # F.binary_cross_entropy_with_logits' formula, which itself has no derivative with respect to pos_weight.
        factor = 1 if scale is None else 1 + (_up(scale) - 1) * y
        loss = (1 - y) * eta - factor * _aten.log_sigmoid.default(eta)
    else:
        loss = torch.exp(eta) - y * eta
        if full:  # Stirling's approximation of log(y!), as in F.poisson_nll_loss
            above = torch.where(y <= 1, 2, y)  # NaN stays
            stirling = above * torch.log(above) - above + 0.5 * torch.log(2 * math.pi * above)
            loss = loss + torch.where(y <= 1, 0, stirling)
    if sample_weight is not None:
        loss = weighted(loss, _up(sample_weight), reduction)
    else:
        loss = loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
    return loss.to(dtype)


def _loss(
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    probabilities: bool,
) -> Tensor:
    """torch's own loss, and what comes to each row on top of it."""
    class_dim = 1 if z.dim() > 1 else 0
    smoothing = 0.0
    if not probabilities:
        # Smoothed here, not by torch, whose way to do it has no batching rule for a batch of targets alone.
        smoothing, label_smoothing = label_smoothing, 0.0
        _require(0 <= smoothing <= 1, RuntimeError, "cross_entropy: label_smoothing", "a number from 0 to 1", smoothing)
    mode = REDUCTIONS.index(reduction)
    loss = _aten.cross_entropy_loss.default(z, target, weight, mode, ignore_index, label_smoothing)
    if smoothing == 0 and z_loss == 0:
        return loss

    rows = z.new_zeros(())
    if smoothing:
        log_p = _aten.log_softmax.int(z, class_dim)
        if weight is not None:
            log_p = log_p * weight.view([-1 if d == class_dim else 1 for d in range(z.dim())])
        rows = rows - smoothing * log_p.sum(class_dim) / z.shape[class_dim]
        loss = (1 - smoothing) * loss
    lse = _lse(z, class_dim)
    valid = torch.ones_like(lse, dtype=torch.bool) if probabilities else target != ignore_index
    if z_loss:
        # The mask comes before the square, so that an infinite lse of an ignored row gives no NaN in any derivative.
        rows = rows + z_loss * torch.where(valid, lse, 0).square()
    rows = torch.where(valid, rows, 0)
    if reduction == "none":
        return loss + rows
    if reduction == "sum":
        return loss + rows.sum()
    if weight is None or probabilities:
        count = valid.sum()
    else:
        count = torch.where(valid, weight[torch.where(valid, target, 0)], 0).sum()
    return loss + rows.sum() / count


def _lse(z: Tensor, class_dim: int) -> Tensor:
    """logsumexp with the maximum apart: torch's derivative exp(z - lse) has lost log(sum) beside a huge maximum."""
    if z.shape[class_dim] == 0:
        return _logsumexp(z, class_dim)
    top = z.detach().amax(class_dim, keepdim=True)
    top = torch.where(top.isfinite(), top, 0)
    return _logsumexp(z - top, class_dim) + top.squeeze(class_dim)


def _entropy(z: Tensor, class_dim: int) -> Tensor:
    log_p = _aten.log_softmax.int(z, class_dim)
    # p log p is 0 where p is 0: an infinite log p would make it 0 * inf, in the value and in both derivatives.
    return -(log_p.exp() * torch.where(log_p == -torch.inf, 0, log_p)).sum(class_dim)


def _logprob(z: Tensor, target: Tensor, ignore_index: int, class_dim: int, probabilities: bool) -> Tensor:
    log_p = _aten.log_softmax.int(z, class_dim)
    if probabilities:
        return (log_p * target).sum(class_dim)
    return -_aten.nll_loss_nd.default(log_p, target, None, 0, ignore_index)  # 0 where ignored
