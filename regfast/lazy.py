"""Logits that are multiplied only if someone looks: their cross-entropy is linear_cross_entropy, which stores none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.jit import is_scripting
from torch.nn import Parameter, _reduction
from torch.utils._pytree import tree_map_only

from . import reference
from .accelerate import FAST_HALF, is_unwatched
from .linear import Linear, linear
from .linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class _Formula:
    """What logits are: ``outer * f(inner * (input @ weight.T + bias))`` in some dtype, f the identity or tanh; their
    logarithmic softmax over classes with ``log``."""

    input: Tensor  # (..., D): what selects or arranges rows of logits does so with its rows
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    inner: float = 1.0
    outer: float = 1.0
    tanh: bool = False
    log: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.input.shape[:-1], self.weight.shape[0])

    # Both as they would have been done when the logits were made: recorded, and outside of autocast, whose casts input
    # and weight have.

    def multiply(self) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad(), self.no_autocast():
            return self._multiply()

    def no_autocast(self) -> torch.autocast:
        return torch.autocast(self.input.device.type, enabled=False)

    def _multiply(self) -> Tensor:
        logits = linear(self.input, self.weight, self.bias).to(self.dtype)
        if self.inner != 1.0:
            logits = logits * self.inner
        if self.tanh:
            logits = torch.tanh(logits)
        if self.outer != 1.0:
            logits = logits * self.outer
        return reference.log_softmax(logits, -1) if self.log else logits

    def detached(self) -> _Formula:
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, input=self.input.detach(), weight=self.weight.detach(), bias=bias)

    def scaled(self, factor: float) -> _Formula:
        return replace(self, outer=self.outer * factor) if self.tanh else replace(self, inner=self.inner * factor)

    def options(self) -> dict[str, float | None]:
        """The formula in the words of linear_cross_entropy: ``softcap * tanh(logit_scale * logits / softcap)``."""
        if self.tanh:
            return {"softcap": self.outer, "logit_scale": self.inner * self.outer}
        return {"softcap": None, "logit_scale": None if self.inner == 1.0 else self.inner}

    def fits(self) -> bool:
        """Whether linear_cross_entropy has such options."""
        return self.outer > 0 if self.tanh else True

    def outputs(self, target: Tensor, outputs: str, **options: Any) -> Any:
        """linear_cross_entropy of all rows, whose results have the rows' shape."""
        rows = self.input.flatten(0, -2) if self.input.dim() > 2 else self.input
        arguments = {"linear_bias": self.bias, "outputs": outputs, **self.options(), **options}
        with self.no_autocast():
            return linear_cross_entropy(rows, self.weight, target, **arguments)

    def of_rows(self, output: str, target: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """One number for each row; without targets, which only a loss looks at, of any class."""
        lead = self.input.shape[:-1]
        if target is None:
            target = torch.zeros(lead, dtype=torch.long, device=self.input.device)
        result = self.outputs(target.reshape(math.prod(lead)) if lead else target, output, loss_dtype=dtype)
        return result.reshape(lead)


class LazyLogits(Tensor):
    """Logits ``input @ weight.T + bias`` that have not been multiplied; made by :func:`lazy_logits`.

    A tensor of the logits' shape and dtype. Casts, slices of positions, reshapes that keep the classes last, factors
    and soft caps (``c * tanh(logits / c)``) give lazy logits again; :func:`torch.nn.functional.cross_entropy`,
    ``log_softmax`` followed by ``nll_loss`` or by ``gather`` of one class, ``logsumexp`` and ``argmax`` over the
    classes are one call of :func:`regfast.linear_cross_entropy`. Anything else multiplies, once, and goes on with an
    ordinary tensor.

    What is looked at after input or weight was changed in place, as an optimizer's step changes it, raises
    RuntimeError: the logits of before cannot be had any more.
    """

    _formula: _Formula
    _versions: list[tuple[Tensor, int]]  # of each tensor, when the logits were made
    _dense: Tensor | None
    _written: list[bool]
    _recorded: bool  # whether a gradient goes through them

    @staticmethod
    def __new__(cls: Any, formula: _Formula, written: list[bool] | None = None) -> Any:
        if not torch.is_grad_enabled():
            formula = formula.detached()
        tensors = [t for t in (formula.input, formula.weight, formula.bias) if t is not None]
        logits = Tensor._make_wrapper_subclass(
            cls,
            formula.shape,
            dtype=formula.dtype,
            device=formula.input.device,
            requires_grad=any(t.requires_grad for t in tensors),
        )
        logits._formula = formula
        logits._versions = [(t, t._version) for t in tensors if not t.is_inference()]
        logits._dense = None
        logits._written = [False] if written is None else written  # shared with what was made of it
        logits._recorded = logits.requires_grad
        if logits._recorded:
            with torch._C.DisableTorchFunctionSubclass():
                logits.register_hook(_refuse_gradient)
        return logits

    def multiplied(self) -> Tensor:
        """The logits as an ordinary tensor: the same one each time, with its graph."""
        self._refuse_adoption()
        if self._dense is None:
            self._dense = self._now().multiply()
        return self._dense

    def _now(self) -> _Formula:
        """The formula, whose tensors have to be as they were."""
        if any(tensor._version != version for tensor, version in self._versions) or self._written[0]:
            raise RuntimeError(
                "regfast.LazyLogits: expected input, weight, bias and logits as they were when the logits were made, "
                "got one that was changed in place since, as by an optimizer's step; look at logits before, or take "
                "them under torch.no_grad()"
            )
        self._refuse_adoption()
        return self._formula

    def _refuse_adoption(self) -> None:
        """Autograd takes logits that were made inside of a Function, without a graph, for the Function's result."""
        with torch._C.DisableTorchFunctionSubclass():
            adopted = self.requires_grad
        if adopted and not self._recorded:
            raise RuntimeError(
                "regfast.LazyLogits: expected logits whose gradient goes to input, weight or bias, got the result of a "
                "torch.autograd.Function that was applied to lazy logits; give that logits.multiplied()"
            )

    def _view(self, formula: _Formula) -> LazyLogits:
        """Logits that would share memory with these."""
        return LazyLogits(formula, self._written)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else kwargs.get("input")
        if type(first) is LazyLogits and first._dense is None and func in _LAZY:
            result = _LAZY[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        if _writes(func) and type(first) is LazyLogits:
            first.multiplied()
            first._written[0] = True
        return func(*_multiply_all(args), **_multiply_all(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # What comes past __torch_function__.
        return func(*_multiply_all(args), **_multiply_all(kwargs or {}))


def _multiply_all(arguments: Any) -> Any:
    return tree_map_only(LazyLogits, LazyLogits.multiplied, arguments)


def _refuse_gradient(grad: Tensor | None) -> None:
    if grad is None or not grad.any():  # DistributedDataParallel's, for an output that no loss was made of
        return
    raise RuntimeError(
        "regfast.LazyLogits: expected to be used through torch's functions, got a gradient for the wrapper itself, as "
        "from a torch.autograd.Function that was applied to it; give that logits.multiplied()"
    )


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name in _WRITING or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")


_WRITING = {"__setitem__", *(f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "pow", "and", "or", "xor"))}


# What is answered by the wrapper, which knows its shape and type.
_ABOUT = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad")),
    *(
        getattr(Tensor, name).__get__
        for name in ("is_cuda", "is_cpu", "is_sparse", "is_nested", "is_quantized", "itemsize")
    ),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "nelement", "ndimension", "is_floating_point")),
    *(getattr(Tensor, name) for name in ("is_complex", "element_size", "__len__", "get_device", "is_inference")),
    torch.numel,
    torch.is_floating_point,
    torch.is_complex,
    torch.is_tensor,
    Tensor.__hash__,
}


# What stays lazy. Each takes its function's arguments and returns NotImplemented where it has to multiply.


def _to_dtype(dtype: torch.dtype) -> Callable[..., Any]:
    def cast(logits: Any, **others: Any) -> Any:
        return NotImplemented if others else _cast(logits, dtype)

    return cast


def _cast(logits: LazyLogits, dtype: torch.dtype) -> Any:
    formula = logits._now()
    if dtype is formula.dtype:
        return logits
    # A tanh or a logarithm is of logits of that type, in which it would be computed again.
    if not dtype.is_floating_point or formula.log:
        return NotImplemented
    return LazyLogits(replace(formula, dtype=dtype))


def _to(logits: Any, *args: Any, **kwargs: Any) -> Any:
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
    if device is not None and device != logits.device:
        return NotImplemented
    return _cast(logits, dtype or logits.dtype)


def _same(logits: Any, *args: Any, **kwargs: Any) -> Any:
    return LazyLogits(logits._now())


def _contiguous(logits: Any, memory_format: Any = torch.contiguous_format) -> Any:
    return logits if memory_format is torch.contiguous_format else NotImplemented


def _detach(logits: Any) -> Any:
    return logits._view(logits._now().detached())


def _rows(logits: LazyLogits, shape: tuple[int, ...]) -> Any:
    """The logits in another shape, of which the classes are still the last dimension."""
    formula = logits._now()
    if not shape or any(size < -1 for size in shape) or shape.count(-1) > 1:
        return NotImplemented
    total, known = math.prod(formula.shape), math.prod(size for size in shape if size != -1)
    if -1 in shape:
        if known == 0 or total % known:
            return NotImplemented
        shape = tuple(total // known if size == -1 else size for size in shape)
    if shape[-1] != formula.shape[-1] or math.prod(shape) != total:
        return NotImplemented
    return logits._view(replace(formula, input=formula.input.reshape(*shape[:-1], formula.input.shape[-1])))


def _reshape(logits: Any, *shape: Any, **others: Any) -> Any:
    shape = others.pop("shape", others.pop("size", shape))
    if others or (len(shape) == 1 and isinstance(shape[0], torch.dtype)):
        return NotImplemented
    shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else tuple(shape)
    return _rows(logits, shape)


def _flatten(logits: Any, start_dim: Any = 0, end_dim: Any = -1) -> Any:
    n = logits.dim()
    if type(start_dim) is not int or type(end_dim) is not int:
        return NotImplemented
    start, end = start_dim % n if n else 0, end_dim % n if n else 0
    if not start <= end < n - 1:
        return NotImplemented
    shape = logits.shape
    return _rows(logits, (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]))


def _unsqueeze(logits: Any, dim: Any) -> Any:
    n = logits.dim() + 1
    place = dim % n if -n <= dim < n else n
    return NotImplemented if place >= n - 1 else _rows(logits, (*logits.shape[:place], 1, *logits.shape[place:]))


def _squeeze(logits: Any, dim: Any = None) -> Any:
    n = logits.dim()
    if dim is None:  # all that are 1, the classes among them
        if logits.shape[-1] == 1:
            return NotImplemented
        return _rows(logits, (*(size for size in logits.shape[:-1] if size != 1), logits.shape[-1]))
    place = dim % n if type(dim) is int and -n <= dim < n else n
    if place >= n - 1 or logits.shape[place] != 1:
        return NotImplemented
    return _rows(logits, (*logits.shape[:place], *logits.shape[place + 1 :]))


def _getitem(logits: Any, index: Any) -> Any:
    """Of positions: an index that leaves the classes alone is one of input's rows."""
    formula = logits._now()
    parts = index if type(index) is tuple else (index,)
    if any(isinstance(part, (list, LazyLogits)) for part in parts):
        return NotImplemented
    taken = 0
    for part in parts:
        if isinstance(part, bool):
            return NotImplemented
        if part is not None and part is not Ellipsis:
            taken += part.dim() if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) else 1
    reaches_classes = taken == logits.dim() or any(part is Ellipsis for part in parts[:-1])
    if reaches_classes and not (isinstance(parts[-1], slice) and parts[-1] == slice(None)):
        return NotImplemented
    if taken > logits.dim() or (Ellipsis not in [p for p in parts if not isinstance(p, Tensor)] and parts[-1] is None):
        return NotImplemented
    if parts[-1] is None:
        return NotImplemented
    return logits._view(replace(formula, input=formula.input[index]))


def _multiply(logits: Any, other: Any) -> Any:
    if isinstance(logits, LazyLogits) and type(other) in (int, float) and not logits._formula.log:
        return LazyLogits(logits._now().scaled(float(other)))
    return NotImplemented


def _divide(logits: Any, other: Any, **others: Any) -> Any:
    if others or type(other) not in (int, float) or other == 0 or logits._formula.log:
        return NotImplemented
    return LazyLogits(logits._now().scaled(1.0 / other))


def _tanh(logits: Any) -> Any:
    formula = logits._now()
    return NotImplemented if formula.tanh or formula.log else LazyLogits(replace(formula, tanh=True))


def _is_last(logits: LazyLogits, dim: object) -> bool:
    return type(dim) is int and dim in (-1, logits.dim() - 1)


def _log_softmax(logits: Any, dim: Any = None, dtype: Any = None) -> Any:
    formula = logits._now()
    if not _is_last(logits, dim) or formula.log or not formula.fits():
        return NotImplemented
    return LazyLogits(replace(formula, log=True, dtype=dtype or formula.dtype))


def _functional_log_softmax(input: Any, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None) -> Any:
    return _log_softmax(input, dim, dtype)


def _loss_dtype(logits: LazyLogits) -> torch.dtype:
    """The logits' type, which autocast would make float32 for a loss."""
    dtype = logits.dtype
    cast = torch.is_autocast_enabled(logits.device.type) and dtype.itemsize < 4
    return torch.float32 if cast else dtype


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: Any = -100,
    reduce: Any = None,
    reduction: Any = "mean",
    label_smoothing: Any = 0.0,
) -> Any:
    formula = input._now()
    if formula.log or not formula.fits() or input.dim() not in (1, 2) or isinstance(target, LazyLogits):
        return NotImplemented
    if weight is not None and weight.dtype is not formula.input.dtype:
        return NotImplemented
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    return formula.outputs(
        target,
        "loss",
        weight=weight,
        reduction=reduction,
        ignore_index=None if target.is_floating_point() else ignore_index,
        label_smoothing=label_smoothing,
        loss_dtype=_loss_dtype(input),
    )


def _our_cross_entropy(
    input: Any,
    target: Any,
    weight: Any,
    ignore_index: Any,
    reduction: Any,
    label_smoothing: Any,
    z_loss: Any,
    softcap: Any,
    logit_scale: Any,
    bits: Any,
    _: Any,
    loss_dtype: Any,
) -> Any:
    """regfast.cross_entropy below its Python function."""
    formula = input._now()
    if formula.log or not formula.fits() or input.dim() not in (1, 2) or isinstance(target, LazyLogits):
        return NotImplemented
    if weight is not None and weight.dtype is not formula.input.dtype:
        return NotImplemented
    if softcap is not None or logit_scale is not None:
        if formula.tanh:
            return NotImplemented
        logit_scale = formula.inner * (1.0 if logit_scale is None else logit_scale)
    else:
        softcap, logit_scale = formula.options().values()
    with formula.no_autocast():
        return torch.ops.regfast.linear_cross_entropy.default(
            formula.input,
            formula.weight,
            target,
            formula.bias,
            weight,
            ignore_index,
            reduction,
            label_smoothing,
            z_loss,
            softcap,
            logit_scale,
            bits,
            None,
            0.0,
            loss_dtype or _loss_dtype(input),
        )


def _nll_loss(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: Any = -100,
    reduce: Any = None,
    reduction: Any = "mean",
) -> Any:
    """Of logarithmic softmax, whose cross-entropy it is."""
    formula = input._now()
    if not formula.log or input.dim() not in (1, 2) or target.is_floating_point():
        return NotImplemented
    logits = LazyLogits(replace(formula, log=False))
    return _cross_entropy(logits, target, weight, size_average, ignore_index, reduce, reduction)


def _gather(input: Any, dim: Any, index: Any, *, sparse_grad: Any = False) -> Any:
    """The logarithmic probabilities of one class for each row."""
    formula = input._now()
    fits = isinstance(index, Tensor) and index.shape == (*input.shape[:-1], 1)
    if not formula.log or not fits or not _is_last(input, dim) or sparse_grad or input.dim() < 2:
        return NotImplemented
    return replace(formula, log=False).of_rows("logprob", index.squeeze(-1), formula.dtype).unsqueeze(-1)


def _logsumexp(input: Any, dim: Any = None, keepdim: Any = False) -> Any:
    formula = input._now()
    if (
        formula.log
        or not formula.fits()
        or not _is_last(input, dim[0] if isinstance(dim, tuple) and len(dim) == 1 else dim)
    ):
        return NotImplemented
    result = formula.of_rows("lse", dtype=formula.dtype)
    return result.unsqueeze(-1) if keepdim else result


def _argmax(input: Any, dim: Any = None, keepdim: Any = False) -> Any:
    formula = input._now()
    if not formula.fits() or not _is_last(input, dim) or (formula.inner <= 0 or formula.outer <= 0):
        return NotImplemented
    result = replace(formula, log=False).of_rows("argmax")
    return result.unsqueeze(-1) if keepdim else result


_LAZY: dict[object, Callable[..., Any]] = {
    **{
        getattr(Tensor, name): _to_dtype(dtype)
        for name, dtype in (
            ("float", torch.float32),
            ("double", torch.float64),
            ("half", torch.float16),
            ("bfloat16", torch.bfloat16),
        )
    },
    Tensor.to: _to,
    Tensor.clone: _same,
    torch.clone: _same,
    Tensor.contiguous: _contiguous,
    Tensor.detach: _detach,
    torch.detach: _detach,
    Tensor.view: _reshape,
    Tensor.reshape: _reshape,
    torch.reshape: _reshape,
    Tensor.flatten: _flatten,
    torch.flatten: _flatten,
    Tensor.squeeze: _squeeze,
    torch.squeeze: _squeeze,
    Tensor.unsqueeze: _unsqueeze,
    torch.unsqueeze: _unsqueeze,
    Tensor.__getitem__: _getitem,
    Tensor.mul: _multiply,
    Tensor.__mul__: _multiply,
    Tensor.__rmul__: _multiply,
    torch.mul: _multiply,
    Tensor.div: _divide,
    Tensor.__truediv__: _divide,
    torch.div: _divide,
    Tensor.tanh: _tanh,
    torch.tanh: _tanh,
    Tensor.log_softmax: _log_softmax,
    torch.log_softmax: _log_softmax,
    F.log_softmax: _functional_log_softmax,
    F.cross_entropy: _cross_entropy,
    torch.ops.regfast.cross_entropy.default: _our_cross_entropy,
    F.nll_loss: _nll_loss,
    Tensor.gather: _gather,
    torch.gather: _gather,
    Tensor.logsumexp: _logsumexp,
    torch.logsumexp: _logsumexp,
    Tensor.argmax: _argmax,
    torch.argmax: _argmax,
}


def _is_common(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether logits of these tensors may be put off: in a call that is recorded, and not watched or transformed."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not is_unwatched():
        return False
    given = [input, weight] if bias is None else [input, weight, bias]
    if any(type(t) is not Tensor and type(t) is not Parameter for t in given) or any(t.is_inference() for t in given):
        return False
    return any(t.requires_grad for t in given)


def lazy_logits(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear(input, weight, bias)`` for a loss: a :class:`LazyLogits`, of which a loss stores no logits.

    Args:
        input: ``(*, D)``. weight: ``(V, D)``, input's dtype. bias: ``(V,)`` or None. Under autocast they are cast as
            ``F.linear`` casts them.

    Returns:
        Logits ``(*, V)`` that have not been multiplied; an ordinary tensor where no gradient is recorded (evaluation,
        generation), under ``torch.compile`` (which sees the product and the loss as they are), in ``torch.func``,
        forward mode, ``torch.jit.trace``, under modes, and of subclasses of Tensor.

    Raises: as :func:`regfast.linear`, at once.

    Saved for backward: input, weight and bias, by the loss; :func:`regfast.linear_cross_entropy` tells how it computes.
    """
    if not _is_common(input, weight, bias):
        return linear(input, weight, bias)
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        given = (input, weight, bias)
        input, weight, bias = (t if t is None or t.dtype is torch.float64 else t.to(dtype) for t in given)  # type: ignore[assignment]
    if not _fits(input, weight, bias):
        return linear(input, weight, bias)
    return LazyLogits(_Formula(input, weight, bias, input.dtype))


def _fits(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether linear_cross_entropy has these shapes and dtypes; linear has words for what nobody has."""
    if input.dim() == 0 or weight.dim() != 2 or input.shape[-1] != weight.shape[1] or input.dtype is not weight.dtype:
        return False
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype is not weight.dtype):
        return False
    return input.dtype.is_floating_point and input.device == weight.device


def _has_backward_hooks(module: torch.nn.Module) -> bool:
    """Whether hooks want the gradient of what the module returns, which lazy logits do not have."""
    everywhere = torch.nn.modules.module
    return bool(
        module._backward_hooks
        or module._backward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


class LazyHead(Linear):
    """The last layer of a classifier or a language model: :class:`regfast.Linear` by :func:`lazy_logits`.

    An ``nn.Linear`` becomes one by ``regfast.replace(model, head="name of the layer")`` or by ``layer.__class__ =
    regfast.LazyHead``.
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return torch.ops.regfast.linear(input, self.weight, self.bias, "none")
        if _is_common(input, self.weight, self.bias) and not _has_backward_hooks(self):
            return lazy_logits(input, self.weight, self.bias)
        return super().forward(input)


class AutoLazyHead(LazyHead):
    """What ``regfast.replace(model, head="auto")`` makes of a head: lazy where that is not slower.

    In half types that the CPU multiplies itself it may be slower: linear_cross_entropy's products are ours (bfloat16,
    Sapphire Rapids with AMX, one core: 256 rows x 256 x 16384 classes take 21 ms, with logits 15; 1024 x 512 x 32000
    take 210 either way). ``head`` by name is lazy there too.
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return torch.ops.regfast.linear(input, self.weight, self.bias, "none")
        if isinstance(input, Tensor):  # torch.fx traces with something else
            kind = input.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
            if kind == "cpu" and dtype in FAST_HALF:
                return Linear.forward(self, input)
        return super().forward(input)
