"""Loads the compiled extension and completes its ops with the composites that serve derivatives without kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

try:
    from . import _C
except ImportError as error:
    here = Path(__file__).parent
    if not any(here.glob("_C.*so")) and (here.parent / "setup.py").exists():
        raise ImportError(
            f"regfast: expected an installed package, got its sources in {here.parent}, where nothing is built: start "
            "Python elsewhere, or build there with: pip install --no-build-isolation --editable ."
        ) from None
    raise ImportError(
        f"regfast: its extension does not load with torch {torch.__version__} ({error}); "
        "build it against this torch with: pip install --no-build-isolation ."
    ) from error

from . import _environment, _paths, memory, reference
from .proof import decide

_built, _running = _C.TORCH.split("+")[0], torch.__version__.split("+")[0]
if _built != _running:
    raise ImportError(
        f"regfast: built against torch {_built}, imported with torch {_running}; "
        "build it against this torch with: pip install --no-build-isolation ."
    )

_environment.check()
_paths.print_if_asked()
memory.limit_as_asked()
isa = _C.isa
isas = _C.isas


class BuildInfo(TypedDict):
    """What build_info() tells."""

    torch: str
    compiler: str
    cxx_standard: int
    isas: list[str]
    isa: str
    linear: dict[str, str]  # who multiplies, by dtype
    cuda: bool
    cuda_kernels: dict[str, str]  # by device: which CUDA kernels are in use there, and why


def build_info() -> BuildInfo:
    """What was built, against which torch, and what runs here; of each GPU which kernels are in use, and why."""
    return {**_C.build_info(), "cuda_kernels": decide.state()}


_C.ask_about_cuda_kernels(decide.answer)


R = TypeVar("R")
REDUCTION_NUMBERS = {name: number for number, name in enumerate(reference.REDUCTIONS)}


def reduction_number(op: str, reduction: str) -> int:
    """torch's number for a reduction's name."""
    if reduction not in reference.REDUCTIONS:
        expected = ", ".join(reference.REDUCTIONS)
        raise ValueError(f"regfast.{op}: reduction: expected one of {expected}, got {reduction!r}")
    return REDUCTION_NUMBERS[reduction]


def are_tensors(first: object, second: object, third: object, *optional: object) -> bool:
    """Whether three arguments are tensors, and those after them tensors or None."""
    if isinstance(first, Tensor) and isinstance(second, Tensor) and isinstance(third, Tensor):
        for value in optional:
            if value is not None and not isinstance(value, Tensor):
                break
        else:
            return True
    return False


def not_a_tensor(op: str, **arguments: object) -> TypeError:
    """The error for the first of these arguments that is no tensor."""
    name, value = next((n, v) for n, v in arguments.items() if not isinstance(v, Tensor))
    return TypeError(f"regfast.{op}: {name}: expected a Tensor, got {type(value).__name__}")


def without_tensors(
    function: Callable[..., R],
    required: Mapping[str, object],
    optional: Mapping[str, object],
    *arguments: object,
    **options: object,
) -> R:
    """A call where not all arguments of these names are tensors; optional ones may be None. Those that have a
    ``__torch_function__`` (proxies of torch.fx, duck types) decide what comes of the call, as in torch; otherwise it is
    an error. Subclasses of Tensor do not come here: the op asks them."""
    relevant = (*required.values(), *optional.values())
    if has_torch_function(relevant):
        return handle_torch_function(function, relevant, *arguments, **options)
    given = {name: value for name, value in optional.items() if value is not None}
    raise not_a_tensor(function.__name__, **required, **given)


def refuse_scripts(module: torch.nn.Module) -> None:
    """For ``__prepare_scriptable__``, which torch.jit.script calls first."""
    raise NotImplementedError(
        f"regfast.{type(module).__name__}: torch.jit.script: expected a module of options that TorchScript has types "
        "for, got one with others; torch.export and torch.jit.trace take it"
    )


def _composite_softmax(input: Tensor, dim: int, log: bool) -> Tensor:
    return reference.log_softmax(input, dim) if log else reference.softmax(input, dim)


def _with_names(composite: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """An op's composite by a function of the reference, which wants the names that the op's outputs have as bits."""

    def call(*arguments: Any) -> list[Tensor]:
        *others, bits, loss_dtype = arguments
        return composite(*others, [name for bit, name in enumerate(reference.OUTPUTS) if bits >> bit & 1], loss_dtype)

    return call


# Subclasses of Tensor that pass every op on to the tensors that they stand for; any other knows torch's ops alone.
_PASS_OPS_ON = {"FakeTensor", "FunctionalTensor", "DTensor", "AsyncCollectiveTensor"}


def _subclass_takes_composite(cls: type) -> bool:
    return not any(base.__name__ in _PASS_OPS_ON and base.__module__.startswith("torch.") for base in cls.__mro__)


_C.ask_about_subclasses(_subclass_takes_composite)

_library = torch.library.Library("regfast", "FRAGMENT")
_COMPOSITES = {
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
}
for _name, _composite in _COMPOSITES.items():
    # vmap does not decompose ops of other libraries by itself, and nested tensors have a key of their own.
    for _key in ("CompositeImplicitAutograd", "CompositeImplicitAutogradNestedTensor", "FuncTorchBatched"):
        _library.impl(_name, _composite, _key)
# Without autograd's keys, in inference mode, nested tensors would reach no kernel of these ops.
for _name, _composite in _COMPOSITES.items():
    if not _name.endswith("cross_entropy"):  # torch has none of nested tensors
        _library.impl(_name.removeprefix("composite_"), _composite, "CompositeImplicitAutogradNestedTensor")
