"""Loads the compiled extension and completes its ops with the composites that serve derivatives without kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"regfast: its extension does not load with torch {torch.__version__} ({error}); "
        "build it against this torch with: pip install --no-build-isolation ."
    ) from error

from . import reference

_built, _running = _C.build_info()["torch"].split("+")[0], torch.__version__.split("+")[0]
if _built != _running:
    raise ImportError(
        f"regfast: built against torch {_built}, imported with torch {_running}; "
        "build it against this torch with: pip install --no-build-isolation ."
    )

isa = _C.isa
isas = _C.isas
build_info = _C.build_info


def reduction_number(op: str, reduction: str) -> int:
    """torch's number for a reduction's name."""
    if reduction not in reference.REDUCTIONS:
        expected = ", ".join(reference.REDUCTIONS)
        raise ValueError(f"regfast.{op}: reduction: expected one of {expected}, got {reduction!r}")
    return reference.REDUCTIONS.index(reduction)


def not_a_tensor(op: str, **arguments: object) -> TypeError:
    """The error for the first of these arguments that is no tensor; required ones come first."""
    name, value = next((n, v) for n, v in arguments.items() if not isinstance(v, Tensor))
    return TypeError(f"regfast.{op}: {name}: expected a Tensor, got {type(value).__name__}")


def require_tensors(
    op: str, names: tuple[str, ...], first: object, second: object, third: object, *optional: object
) -> None:
    """Raises for the first argument, called by names, that is no tensor; those after the third may be None."""
    if isinstance(first, Tensor) and isinstance(second, Tensor) and isinstance(third, Tensor):
        for value in optional:
            if value is not None and not isinstance(value, Tensor):
                break
        else:
            return
    given = {name: value for name, value in zip(names[3:], optional, strict=True) if value is not None}
    raise not_a_tensor(op, **dict(zip(names[:3], (first, second, third), strict=True)), **given)


# The outputs of cross_entropy in the order of their bits and of the tensors that the op returns.
OUTPUTS = reference.OUTPUTS


def _composite_softmax(input: Tensor, dim: int, log: bool) -> Tensor:
    return reference.log_softmax(input, dim) if log else reference.softmax(input, dim)


def _with_names(composite: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """An op's composite by a function of the reference, which wants the names that the op's outputs have as bits."""

    def call(*arguments) -> list[Tensor]:
        *others, bits, loss_dtype = arguments
        return composite(*others, [name for bit, name in enumerate(OUTPUTS) if bits >> bit & 1], loss_dtype)

    return call


_library = torch.library.Library("regfast", "FRAGMENT")
for _name, _composite in {
    "composite_linear": lambda input, weight, bias, activation: reference.linear(
        input, weight, bias, activation=activation
    ),
    "composite_phm_linear": lambda input, a, s, bias, activation: reference.phm_linear(
        input, a, s, bias, activation=activation
    ),
    "composite_softmax": _composite_softmax,
    "composite_logsumexp": reference.logsumexp,
    "composite_cross_entropy": _with_names(reference.cross_entropy_outputs),
    "composite_linear_cross_entropy": _with_names(reference.linear_cross_entropy_outputs),
    "composite_linear_nll": reference.linear_nll_loss,
    "composite_mse_loss": lambda input, target, reduction: reference.mse_loss(
        input, target, reduction=reference.REDUCTIONS[reduction]
    ),
}.items():
    _library.impl(_name, _composite, "CompositeImplicitAutograd")
    # vmap does not decompose ops of other libraries by itself.
    _library.impl(_name, _composite, "FuncTorchBatched")
