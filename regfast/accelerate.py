"""Unmodified programs on regfast: torch's functions take ours where it was measured to be faster."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable
from types import FunctionType, MethodDescriptorType, ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._device import DeviceContext

from ._extension import build_info
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
_PRODUCTS = {_F32: (1 << 30, 0), _BF16: (1 << 12, 1 << 19), _F16: (1 << 12, 1 << 19)}
_OURS_ALONE = {getattr(torch, name) for name, by in build_info()["linear"].items() if by == "regfast"}
# Half types that this CPU has instructions for, by which torch's library multiplies several times as fast as float32.
FAST_HALF = {dtype for dtype in (_BF16, _F16) if dtype not in _OURS_ALONE}
LINEAR = {
    dtype: (first, 1 << 62 if dtype in _OURS_ALONE else end)
    for dtype, (first, end) in _PRODUCTS.items()
    if end or dtype in _OURS_ALONE
}

# Products of torch itself, with products=True, by multiplications of one of them: from each number on, by dtype in the
# kernels' order (float32, float64, bfloat16, float16), -1 never; what csrc/cpu/tuning.h leaves to ATen stays there.
# Half types on CPUs without instructions for them, against ATen held to AVX2: 3 to 50x. float32 as for linear.
_PRODUCTS_FROM = [_PRODUCTS[_F32][0] if _F32 in _OURS_ALONE else -1, -1, 1 << 12, 1 << 12]

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
        return input.is_cpu and not torch.compiler.is_exporting()
    return input.is_cpu and input.layout is torch.strided and not input.is_nested and is_unwatched()


def _is_plain(*tensors: object) -> bool:
    """Whether each is a Tensor, a Parameter or None: subclasses have torch's function, which asks them."""
    for tensor in tensors:
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not Parameter:
            return False
    return True


# What each function of torch becomes: called with its arguments, it returns the result or NotImplemented.


def _linear(input, weight, bias):
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
    limits = LINEAR.get(dtype)
    if limits is None or not _is_plain(weight, bias) or weight.dim() != 2:
        return NotImplemented
    first, end = limits
    if not first <= input.numel() * weight.shape[0] < end or not _may_take(input):
        return NotImplemented
    return linear(input, weight, bias)


def _softmax_of(ours: Callable) -> Callable:
    """Of torch.softmax(input, dim, dtype), and of the tensor's method."""

    def call(input, dim=None, dtype=None, **others):
        if type(dim) is not int or others or not _may_take(input):
            return NotImplemented
        return ours(input, dim, dtype)

    return call


def _functional_softmax_of(ours: Callable) -> Callable:
    def call(input, dim=None, _stacklevel=3, dtype=None):
        return ours(input, dim, dtype) if type(dim) is int and _may_take(input) else NotImplemented

    return call


def _logsumexp(input, dim=None, keepdim=False, **others):
    if type(dim) is not int or type(keepdim) is not bool or others or not _may_take(input):
        return NotImplemented
    return logsumexp(input, dim, keepdim)


def _cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    if not _is_plain(target, weight) or not _may_take(input):
        return NotImplemented
    return cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


def _linear_cross_entropy(input, linear_weight, target, *, linear_bias=None, weight=None, **options):
    if not _is_plain(linear_weight, target, linear_bias, weight) or not _may_take(input):
        return NotImplemented
    return linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, weight=weight, **options)


def _mse_loss(input, target, size_average=None, reduce=None, reduction="mean", weight=None):
    if weight is not None or not _is_plain(target) or target.dtype is not input.dtype or target.shape != input.shape:
        return NotImplemented
    if not (input.is_contiguous() and target.is_contiguous() and _may_take(input)):
        return NotImplemented
    return mse_loss(input, target, size_average, reduce, reduction)


# Where a function stands, the way to ours, and from where on it is taken.
_PLACES: list[tuple[object, str, Callable, dict[torch.dtype, int]]] = [
    (F, "softmax", _functional_softmax_of(softmax), SOFTMAX),
    (F, "log_softmax", _functional_softmax_of(log_softmax), SOFTMAX),
    (F, "cross_entropy", _cross_entropy, CROSS_ENTROPY),
    (F, "mse_loss", _mse_loss, MSE_LOSS),
    (F, "linear_cross_entropy", _linear_cross_entropy, LINEAR_CROSS_ENTROPY),  # since torch 2.13
    *(
        (place, name, call, SOFTMAX)
        for place in (torch, torch.special, Tensor)
        for name, call in (
            ("softmax", _softmax_of(softmax)),
            ("log_softmax", _softmax_of(log_softmax)),
            ("logsumexp", _logsumexp),
        )
    ),
]

_lock = threading.RLock()
_open: list[Accelerated] = []  # a handle as often as it was entered
_products_are_ours = False
_active = False  # what is left in a user's hands after restore() calls torch's own function


def _asks(torchs: Callable) -> Callable:
    """torch's function for what answers functions itself (subclasses, modes, proxies). Methods of tensors and Python
    functions of torch look themselves up by their names, which would be ours, to pass themselves on; they pass on
    themselves here."""
    if isinstance(torchs, MethodDescriptorType):
        return lambda *arguments, **options: handle_torch_function(
            torchs, (*arguments, *options.values()), *arguments, **options
        )
    if not isinstance(torchs, FunctionType):
        return torchs
    names = {**torchs.__globals__, torchs.__name__: torchs}
    asks = FunctionType(torchs.__code__, names, torchs.__name__, torchs.__defaults__)
    asks.__kwdefaults__ = torchs.__kwdefaults__
    return asks


def _dispatcher(torchs: Callable, ours: Callable, least: dict[torch.dtype, int]) -> Callable:
    """What stands in the place of torch's function."""
    elements_of = least.get
    asks = _asks(torchs)

    @functools.wraps(torchs)
    def call(*arguments, **options):
        if _active:
            input = arguments[0] if arguments else options.get("input")
            if type(input) is Tensor:
                elements = elements_of(input.dtype)
                if elements is not None and _tracing_state() is None and input.numel() >= elements:
                    result = ours(*arguments, **options)
                    if result is not NotImplemented:
                        return result
            if has_torch_function((*arguments, *options.values()) if options else arguments):
                return asks(*arguments, **options)
        return torchs(*arguments, **options)

    def scriptable():
        """torch.jit.script compiles torch's own function in its place: with its own globals, so before it is asked."""
        torch.jit.script(torchs)
        return torchs

    call.__prepare_scriptable__ = scriptable
    return call


def _linear_dispatcher(torchs: Callable) -> Callable:
    """The same for the function that is called most: its own names for its arguments, and nothing else asked where its
    dtype is torch's."""

    @functools.wraps(torchs)
    def call(input, weight, bias=None):
        wanted = _active and type(input) is Tensor and (input.dtype in LINEAR or _autocast_is_active())
        if wanted and _tracing_state() is None:
            result = _linear(input, weight, bias)
            if result is not NotImplemented:
                return result
        return torchs(input, weight, bias)

    return call


def _is_torchs(function: object) -> bool:
    """Whether nobody has put a function of his own there before us."""
    code = getattr(function, "__code__", None)
    return function is not None and (code is None or code.co_filename == F.__file__)


# Functions as they were when regfast was imported, with what takes their place. By identity: a builtin function is
# equal to another one of the same name.
_PAIRS = [
    (torchs, _dispatcher(torchs, ours, least))
    for place, name, ours, least in _PLACES
    if _is_torchs(torchs := getattr(place, name, None))
]
if _is_torchs(F.linear):
    _PAIRS.append((F.linear, _linear_dispatcher(F.linear)))
_OURS = {id(torchs): dispatcher for torchs, dispatcher in _PAIRS}
_TORCHS = {id(dispatcher): torchs for torchs, dispatcher in _PAIRS}


def _swap(new_of: dict[int, Callable]) -> None:
    """Puts new functions in the place of old ones, wherever modules have a name for these."""
    for place, name in [(F, "linear"), *(entry[:2] for entry in _PLACES)]:
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


def _begin_tables() -> None:
    """Tables of torch's functions that torch makes at some time of its own: of what they are now, not of ours."""
    importlib.import_module("torch._dynamo")
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

    def __call__(self, function: Callable) -> Callable:
        """``@regfast.accelerate()``: ours for as long as a call of the function lasts."""
        self.restore()

        @functools.wraps(function)
        def accelerated(*arguments, **options):
            with accelerate(products=self.products):
                return function(*arguments, **options)

        return accelerated


def accelerate(*, products: bool = False) -> Accelerated:
    """Lets programs that know nothing of regfast run on it: functions of torch take ours where it is faster.

    These are ``linear``, ``cross_entropy``, ``softmax``, ``log_softmax``, ``mse_loss`` and ``linear_cross_entropy`` of
    ``torch.nn.functional``, which modules such as ``nn.Linear`` and ``nn.CrossEntropyLoss`` call, and ``softmax``,
    ``log_softmax`` and ``logsumexp`` of ``torch``, ``torch.special`` and ``torch.Tensor``. A call takes regfast if its
    tensors are plain CPU tensors and the tables at the top of this file say that for its dtype and size ours was
    measured to be faster; any other call is torch's, with 0.3 us on top of it. Values and gradients are those of the
    functions of regfast, whose docstrings say what they save for backward.

    Code that has imported such a function by name, before or after, takes part: names in modules are replaced too,
    and put back. What holds a function otherwise (an attribute of an object, a default argument, a
    ``functools.partial``) keeps torch's. Under ``torch.compile`` code is compiled again for functions that have
    changed; methods of tensors are torch's there. Subclasses of Tensor, modes, ``torch.func``, forward mode,
    ``torch.jit`` and ``torch.export`` see torch's own functions.

    Args:
        products: give ``aten::mm``, ``addmm``, ``bmm`` and ``baddbmm`` on the CPU, to which ``matmul``, attention,
            ``transformers``' Conv1D, backward passes and optimizers come down, our kernels too, in torch's dispatcher:
            in float32 and half types, where the table says so. Compiled code (inductor's) calls them as well. Nothing
            else in the process may be computing when they come and go.

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
