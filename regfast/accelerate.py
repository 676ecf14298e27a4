"""Unmodified programs on regfast: torch's functions take ours where it was measured to be faster."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable
from types import FunctionType, MethodDescriptorType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import (
    handle_torch_function,
    has_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)
from torch.utils._device import DeviceContext

from . import _C
from .cross_entropy import cross_entropy
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .mse_loss import mse_loss
from .softmax import log_softmax, logsumexp, softmax

_BF16, _F16, _F32, _F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# From how many elements of the first argument on a function takes regfast, by its dtype; what has no entry is left to
# torch. Found with `python bench/sweep.py --seed 31 --threads 1`, Sapphire Rapids: above, forward and forward +
# backward, ours were faster in all but a few draws; below, the call costs what the kernel saves.
#   softmax   float32: 0.9 to 1.2x at 4096, 1.1x and more from 16384; half types: 0.6 to 0.9x for short rows up to 65536
SOFTMAX = {_F32: 1 << 14, _F64: 1 << 14, _BF16: 1 << 18, _F16: 1 << 18}
#   cross_entropy   float32: 0.8 to 1.1x from 4096 to 32768, then 1.2 to 3x; half types: 0.8x of images up to 2^18
CROSS_ENTROPY = {_F32: 1 << 16, _F64: 1 << 16, _BF16: 1 << 19, _F16: 1 << 19}
#   mse_loss   contiguous: 1.0x with backward of a few numbers, 1.3 to 7x from 4096; other layouts: 0.4 to 0.7x
MSE_LOSS = {_F32: 1 << 13, _F64: 1 << 13, _BF16: 1 << 10, _F16: 1 << 10}
#   linear_cross_entropy   torch stores the logits or chunks them in Python; by elements of input
LINEAR_CROSS_ENTROPY = {_F32: 1 << 12, _F64: 1 << 12, _BF16: 1 << 12, _F16: 1 << 12}
# linear, by multiplications (rows x inputs x outputs): from the first number on, below the second. Half types on CPUs
# without instructions for them: 1.4 to 4x at 4096 to 2^16, 3 to 50x above; with them oneDNN's way there takes 2 to 7
# times ours until the product is large, as in the table of csrc/cpu/tuning.h. float32 on AMD (Zen 3): 1.2x of 2^33,
# while models of small layers lost 12%. float64: 0.3 to 1.1x of MKL's.
# bfloat16 where AMX multiplies it, ours too: as csrc/cpu/tuning.h has it (kSquaresProducts).
_PRODUCTS = {
    _F32: (1 << 30, 0),
    _BF16: (1 << 12, 1 << 26 if _C.isa() == "avx512_amx" else 1 << 19),
    _F16: (1 << 12, 1 << 19),
}
_OURS_ALONE = {getattr(torch, name) for name, by in _C.build_info()["linear"].items() if by == "regfast"}
# Half types that this CPU has instructions for, by which torch's library multiplies several times as fast as float32.
FAST_HALF = {dtype for dtype in (_BF16, _F16) if dtype not in _OURS_ALONE}
LINEAR = {
    dtype: (first, 1 << 62 if dtype in _OURS_ALONE else end)
    for dtype, (first, end) in _PRODUCTS.items()
    if end or dtype in _OURS_ALONE
}

# Products of torch itself, with products=True, by multiplications of one of them: from each number on, by dtype in the
# kernels' order (float32, float64, bfloat16, float16), -1 never; what csrc/cpu/tuning.h leaves to ATen stays there.
# Half types on CPUs without instructions for them, with ATen kept from them: 3 to 50x. float32 as for linear.
_PRODUCTS_FROM = [_PRODUCTS[_F32][0] if _F32 in _OURS_ALONE else -1, -1, 1 << 12, 1 << 12]

_is_left = _C.is_left
_mode_is_active = torch._C._is_torch_function_mode_enabled
_tracing_state = torch._C._get_tracing_state
_transform = torch._C._functorch.peek_interpreter_stack
_autocast_is_active = torch._C._is_any_autocast_enabled


def is_unwatched() -> bool:
    """Whether nobody watches or transforms calls here: no mode (but a default device), torch.func, forward mode."""
    if _transform() is not None or forward_ad._current_level >= 0 or _tracing_state() is not None:
        return False
    if not _mode_is_active():
        return True
    return all(type(mode) is DeviceContext for mode in torch.overrides._get_current_function_mode_stack())


def _may_take(input: Tensor) -> bool:
    """Whether ours may come in torch's place: a strided tensor of the CPU, in a call that nobody watches or transforms.
    Exported programs are torch's, so that they run without us."""
    if torch.compiler.is_compiling():
        # Not torch.compiler.is_exporting(), which torch 2.11 compiles to True everywhere.
        return input.is_cpu and not torch.compiler._is_exporting_flag
    return input.is_cpu and input.layout is torch.strided and not input.is_nested and is_unwatched()


def _is_plain(*tensors: object) -> bool:
    """Whether each is a Tensor, a Parameter or None: subclasses have torch's function, which asks them."""
    for tensor in tensors:
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not Parameter:
            return False
    return True


def _wins(input: Tensor, least: dict[torch.dtype, int], elements: int) -> bool:
    """What a table says of a tensor of so many elements. Under torch.jit.trace their number is a tensor, and no int."""
    enough = least.get(input.dtype)
    return enough is not None and elements >= enough


def _asks(torchs: Callable[..., Any]) -> Callable[..., Any]:
    """torch's function for what answers functions itself (subclasses, modes, proxies). Methods of tensors and Python
    functions of torch look themselves up by their names, which would be ours, to pass themselves on; they pass on
    themselves here."""
    if isinstance(torchs, MethodDescriptorType):
        return lambda *arguments, **options: handle_torch_function(
            torchs, (*arguments, *options.values()), *arguments, **options
        )
    names = {**torchs.__globals__, torchs.__name__: torchs}
    asks = FunctionType(torchs.__code__, names, torchs.__name__, torchs.__defaults__)
    asks.__kwdefaults__ = torchs.__kwdefaults__
    return asks


# What stands in the place of each function. They are written out, with the names that torch has for its arguments: what
# is left to torch pays for every step before it.


def _linear(torchs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(torchs)
    def call(input: Any, weight: Any, bias: Any = None) -> Any:
        if not _active or _is_left(LINEAR, input, weight):
            return torchs(input, weight, bias)
        if type(input) is Tensor and (type(weight) is Parameter or type(weight) is Tensor):
            if _autocast_is_active() and torch.is_autocast_enabled("cpu"):
                limits = LINEAR.get(torch.get_autocast_dtype("cpu"))
            else:
                limits = LINEAR.get(input.dtype)
            if limits is not None:
                first, end = limits
                if weight.dim() == 2 and _is_plain(bias):
                    products = input.numel() * weight.shape[0]
                    if type(products) is int and first <= products < end and _may_take(input):
                        return linear(input, weight, bias)
        return torchs(input, weight, bias)

    return call


def _functional_softmax(torchs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    asks = _asks(torchs)

    @functools.wraps(torchs)
    def call(input: Any, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None) -> Any:
        if _active and not _is_left(SOFTMAX, input):
            if (
                type(input) is Tensor
                and type(n := input.numel()) is int
                and type(dim) is int
                and _wins(input, SOFTMAX, n)
                and _may_take(input)
            ):
                return ours(input, dim, dtype)
            if has_torch_function_unary(input):
                return asks(input, dim, _stacklevel, dtype)
        return torchs(input, dim, _stacklevel + 1, dtype)

    return call


def _of_tensors(torchs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """softmax, log_softmax and logsumexp as builtin functions and methods: (input, dim, dtype or keepdim)."""
    method = isinstance(torchs, MethodDescriptorType)
    asks = _asks(torchs) if method else torchs  # the functions know themselves by another place than their name's

    @functools.wraps(torchs)
    def call(input: Any = ..., dim: Any = ..., *others: Any, **options: Any) -> Any:
        if _active and not _is_left(SOFTMAX, input):
            if type(input) is Tensor and type(n := input.numel()) is int:
                known = len(others) < 2 and not (options.keys() - {"dtype", "keepdim"})
                if known and _wins(input, SOFTMAX, n) and type(dim) is int and _may_take(input):
                    return ours(input, dim, *others, **options)
            if method and has_torch_function_unary(input):
                return asks(*_leading(input, dim), *others, **options)
        if dim is ... or others or options:
            if input is ...:  # by a name that numpy has for it
                return torchs(**options) if dim is ... else torchs(dim=dim, **options)
            return torchs(*_leading(input, dim), *others, **options)
        return torchs(input, dim)

    return call


def _leading(input: Any, dim: Any) -> tuple[Any, ...]:
    return (input,) if dim is ... else (input, dim)


def _cross_entropy(torchs: Callable[..., Any]) -> Callable[..., Any]:
    asks = _asks(torchs)

    @functools.wraps(torchs)
    def call(
        input: Any,
        target: Any,
        weight: Any = None,
        size_average: Any = None,
        ignore_index: Any = -100,
        reduce: Any = None,
        reduction: Any = "mean",
        label_smoothing: Any = 0.0,
    ) -> Any:
        take = torchs
        if _active and not _is_left(CROSS_ENTROPY, input, target, weight):
            if (
                type(input) is Tensor
                and type(n := input.numel()) is int
                and _wins(input, CROSS_ENTROPY, n)
                and _is_plain(target, weight)
                and _may_take(input)
            ):
                take = cross_entropy
            elif has_torch_function_variadic(input, target, weight):
                take = asks
        return take(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)

    return call


def _mse_loss(torchs: Callable[..., Any]) -> Callable[..., Any]:
    asks = _asks(torchs)

    @functools.wraps(torchs)
    def call(
        input: Any,
        target: Any,
        size_average: Any = None,
        reduce: Any = None,
        reduction: Any = "mean",
        weight: Any = None,
    ) -> Any:
        if _active and not _is_left(MSE_LOSS, input, target, weight):
            if type(input) is Tensor and type(n := input.numel()) is int and type(target) is Tensor:
                alike = weight is None and target.dtype is input.dtype and target.shape == input.shape
                adjacent = alike and input.is_contiguous() and target.is_contiguous()
                if adjacent and _wins(input, MSE_LOSS, n) and _may_take(input):
                    return mse_loss(input, target, size_average, reduce, reduction)
            if has_torch_function_variadic(input, target, weight):
                return asks(input, target, size_average, reduce, reduction, weight)
        return torchs(input, target, size_average, reduce, reduction, weight)

    return call


def _linear_cross_entropy(torchs: Callable[..., Any]) -> Callable[..., Any]:
    asks = _asks(torchs)

    @functools.wraps(torchs)
    def call(
        input: Any, linear_weight: Any, target: Any, *, linear_bias: Any = None, weight: Any = None, **options: Any
    ) -> Any:
        take = torchs
        if _active and not _is_left(LINEAR_CROSS_ENTROPY, input, linear_weight, target, linear_bias, weight):
            if (
                type(input) is Tensor
                and type(n := input.numel()) is int
                and _wins(input, LINEAR_CROSS_ENTROPY, n)
                and _is_plain(linear_weight, target, linear_bias, weight)
                and _may_take(input)
            ):
                take = linear_cross_entropy
            elif has_torch_function((input, linear_weight, target, linear_bias, weight)):
                take = asks
        return take(input, linear_weight, target, linear_bias=linear_bias, weight=weight, **options)

    return call


# Where a function stands, and what makes its dispatcher.
_PLACES: list[tuple[object, str, Callable[..., Any]]] = [
    (F, "linear", _linear),
    (F, "softmax", functools.partial(_functional_softmax, ours=softmax)),
    (F, "log_softmax", functools.partial(_functional_softmax, ours=log_softmax)),
    (F, "cross_entropy", _cross_entropy),
    (F, "mse_loss", _mse_loss),
    (F, "linear_cross_entropy", _linear_cross_entropy),  # since torch 2.13
    *(
        (place, ours.__name__, functools.partial(_of_tensors, ours=ours))
        for place in (torch, torch.special, Tensor)
        for ours in (softmax, log_softmax, logsumexp)
    ),
]

_lock = threading.RLock()
_open: list[Accelerated] = []  # a handle as often as it was entered
_products_are_ours = False
_active = False  # what is left in a user's hands after restore() calls torch's own function


def _dispatcher(torchs: Callable[..., Any], make: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in the place of torch's function."""
    call = make(torchs)

    def scriptable() -> Any:
        """torch.jit.script compiles torch's own function in its place: with its own globals, so before it is asked."""
        torch.jit.script(torchs)
        return torchs

    call.__prepare_scriptable__ = scriptable
    return call


def _is_torchs(function: object) -> bool:
    """Whether nobody has put a function of his own there before us."""
    code = getattr(function, "__code__", None)
    return code is None or code.co_filename == F.__file__


# Functions as they were when regfast was imported, with what takes their place. By identity: a builtin function is
# equal to another one of the same name.
_PAIRS = [
    (torchs, _dispatcher(torchs, make))
    for place, name, make in _PLACES
    if (torchs := getattr(place, name, None)) is not None and _is_torchs(torchs)
]
_OURS = {id(torchs): dispatcher for torchs, dispatcher in _PAIRS}
_TORCHS = {id(dispatcher): torchs for torchs, dispatcher in _PAIRS}


def _swap(new_of: dict[int, Callable[..., Any]]) -> None:
    """Puts new functions in the place of old ones, wherever modules have a name for these."""
    for place, name, _ in _PLACES:
        new = new_of.get(id(getattr(place, name, None)))
        if new is None:  # somebody else's by now
            continue
        if place is Tensor and new_of is _TORCHS:
            delattr(Tensor, name)  # torch's is inherited
        else:
            setattr(place, name, new)
    for module_name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or module_name.partition(".")[0] in ("torch", "regfast"):
            continue
        names = vars(module)
        for name, value in list(names.items()):
            new = new_of.get(id(value))
            if new is not None:
                names[name] = new


def _nothing_is_left(table: object, input: object, *others: object) -> bool:
    return False


_traced: list[Callable[..., bool]] = []


def _begin_tables() -> None:
    """Tables of torch's functions that torch makes at some time of its own: of what they are now, not of ours."""
    importlib.import_module("torch._dynamo")
    if not _traced:
        # Which a compiler does not read, and need not ask: what it compiles is no cost of each call.
        _traced.append(torch.compiler.substitute_in_graph(_is_left, skip_signature_check=True)(_nothing_is_left))
    torch.overrides.get_testing_overrides()
    for torchs, dispatcher in _PAIRS:
        if operator := torch.jit._builtins._find_builtin(torchs):
            torch.jit._builtins._register_builtin(dispatcher, operator)


def _update() -> None:
    """Makes functions and products what the open handles want. Under the lock."""
    global _active, _products_are_ours
    wanted, products = bool(_open), any(handle.products for handle in _open)
    if products != _products_are_ours:
        torch.ops.regfast._override_products(products, _PRODUCTS_FROM)
        _products_are_ours = products
    if wanted and not _active:
        _begin_tables()
        _active = True
        _swap(_OURS)
    elif _active and not wanted:
        _swap(_TORCHS)
        _active = False


class Accelerated:
    """What :func:`accelerate` returns. It ends with ``restore()`` or, used in a ``with``, with its block."""

    def __init__(self, products: bool) -> None:
        self.products = products
        self._begun = False  # without a block
        self._begin()
        self._begun = True

    def _begin(self) -> None:
        with _lock:
            _open.append(self)
            _update()

    def __enter__(self) -> Accelerated:
        with _lock:
            if not self._begun:
                self._begin()
            self._begun = False
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            if self in _open:  # restore() may have ended all
                _open.remove(self)
            _update()

    def restore(self) -> None:
        """Ends this one, however often it was entered."""
        with _lock:
            self._begun = False
            _open[:] = [other for other in _open if other is not self]
            _update()

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``@regfast.accelerate()``: ours for as long as a call of the function lasts."""
        self.restore()

        @functools.wraps(function)
        def accelerated(*arguments: Any, **options: Any) -> Any:
            with accelerate(products=self.products):
                return function(*arguments, **options)

        return accelerated


def accelerate(*, products: bool = False) -> Accelerated:
    """Lets programs that know nothing of regfast run on it: functions of torch take ours where it is faster.

    These are ``linear``, ``cross_entropy``, ``softmax``, ``log_softmax``, ``mse_loss`` and ``linear_cross_entropy`` of
    ``torch.nn.functional``, which modules such as ``nn.Linear`` and ``nn.CrossEntropyLoss`` call, and ``softmax``,
    ``log_softmax`` and ``logsumexp`` of ``torch``, ``torch.special`` and ``torch.Tensor``. A call takes regfast if its
    tensors are plain CPU tensors and the tables at the top of this file say that for its dtype and size ours was
    measured to be faster; any other call is torch's, with 0.1 to 0.3 us on top of it. Values and gradients are those of
    the functions of regfast, whose docstrings say what they save for backward.

    Code that has imported such a function by name, before or after, takes part: names in modules are replaced too,
    and put back. What holds a function otherwise (an attribute of an object, a default argument, a
    ``functools.partial``) keeps torch's. Under ``torch.compile`` code is compiled again for functions that have
    changed; methods of tensors are torch's there. Subclasses of Tensor, modes, ``torch.func``, forward mode,
    ``torch.jit`` and ``torch.export`` see torch's own functions.

    Args:
        products: give ``aten::mm``, ``addmm``, ``bmm`` and ``baddbmm`` on the CPU, to which ``matmul``, attention,
            ``transformers``' Conv1D, backward passes and optimizers come down, our kernels too, in torch's dispatcher:
            in float32 and half types, where the table says so. Compiled code (inductor's) calls them as well. On CPUs
            without instructions for half types, convolutions of these and the gradients of
            ``scaled_dot_product_attention`` are computed by them too. Nothing else in the process may be computing
            when they come and go.

    It holds for the process, all threads included, from the call on until :func:`restore`, and may be nested::

        regfast.accelerate()                # until regfast.restore()

        with regfast.accelerate():          # until the end of the block
            train()

        @regfast.accelerate()               # while train runs
        def train(): ...

    To begin and to end takes some hundredths of a second where thousands of modules are loaded.
    """
    if not isinstance(products, bool):
        raise TypeError(f"regfast.accelerate: products: expected a bool, got {type(products).__name__}")
    return Accelerated(products)


def restore() -> None:
    """Ends every :func:`accelerate`, whoever has begun it: torch's functions are the very objects that they were."""
    with _lock:
        for handle in list(_open):
            handle.restore()
