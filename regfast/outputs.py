"""The named tuples of several outputs: one class for each choice of names, in each order.

They are classes of this module from the start, not made when they are first asked for, so that a tuple that was
pickled, saved or exported in one process is read in another.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from itertools import permutations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .reference import OUTPUTS
from .types import Output

if TYPE_CHECKING:

    class CrossEntropyOutput(tuple[Tensor, ...]):
        """Several outputs of a cross-entropy: those asked for, by name and in the order of the names."""

        @property
        def loss(self) -> Tensor: ...
        @property
        def lse(self) -> Tensor: ...
        @property
        def entropy(self) -> Tensor: ...
        @property
        def logprob(self) -> Tensor: ...
        @property
        def argmax(self) -> Tensor: ...

else:

    class CrossEntropyOutput(ABC):  # noqa: B024  what is registered below is one
        """Several outputs of a cross-entropy, a named tuple: those asked for, by name and in the order of the names."""


_make: Any = tuple.__new__


def _new(cls: Any, *values: Any, **named: Any) -> Any:
    # As torch's own named results it takes one iterable too, in which tensor subclasses convert what they wrap.
    if len(values) == 1 and not named:
        values = tuple(values[0])
    names = cls._fields[len(values) :]
    if len(values) > len(cls._fields) or named.keys() != set(names):
        raise TypeError(
            f"regfast.{cls.__name__}: values: expected {', '.join(cls._fields)}, got {len(values)} values "
            f"and the names {', '.join(named) or 'none'}"
        )
    return _make(cls, (*values, *map(named.get, names)))


def _repr(self: Any) -> str:
    return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._asdict().items())})"


# What collections.namedtuple makes, without compiling source for each of 320 classes.
_MEMBERS: dict[str, Any] = {
    "__slots__": (),
    "__module__": __name__,
    "__doc__": "Outputs of a cross-entropy, in the order of the names that were asked for.",
    "__new__": _new,
    "__repr__": _repr,
    "__getnewargs__": lambda self: tuple(self),
    "_make": classmethod(_make),
    "_asdict": lambda self: dict(zip(self._fields, self, strict=True)),
    "_replace": lambda self, **named: type(self)(**{**self._asdict(), **named}),
    "_field_defaults": {},
}


def _item(place: int) -> property:
    return property(lambda self: self[place])


_PROPERTIES = [_item(place) for place in range(len(OUTPUTS))]


def _named_tuple(names: tuple[str, ...]) -> Any:
    fields = dict(zip(names, _PROPERTIES, strict=False))
    cls = type("CrossEntropyOutput", (tuple,), {**_MEMBERS, "_fields": names, "__match_args__": names, **fields})
    cls.__qualname__ = "_".join(("CrossEntropyOutput", *names))  # what pickle looks up
    return cls


_CLASSES: dict[tuple[str, ...], Any] = {
    names: _named_tuple(names) for count in range(2, len(OUTPUTS) + 1) for names in permutations(OUTPUTS, count)
}
for _class in _CLASSES.values():
    globals()[_class.__qualname__] = _class
    if not TYPE_CHECKING:
        CrossEntropyOutput.register(_class)  # torch looks for the base class tuple and no other
    _pytree._register_namedtuple(_class, serialized_type_name=f"{__name__}.{_class.__qualname__}")
torch.serialization.add_safe_globals(list(_CLASSES.values()))  # torch.load takes tuples of tensors by default


def require_one_for_scripts(module: Any) -> Any:
    """What torch.jit.script gets of a module: itself, unless its result has a type that depends on ``outputs``."""
    if len(select_outputs(type(module).__name__, module.outputs)[2]) > 1:
        raise NotImplementedError(
            f"regfast.{type(module).__name__}: outputs: expected one name, since torch.jit.script wants results of one "
            f"type, got {module.outputs!r}; torch.export takes several"
        )
    return module


LOSS: tuple[Output] = ("loss",)
LOSS_BIT = 1 << OUTPUTS.index("loss")  # the default's selection

Selection = tuple[int, Any, tuple[int, ...]]
_selections: dict[tuple[str, ...], Selection] = {}


def select_outputs(op: str, outputs: str | Sequence[str]) -> Selection:
    """The op's bits for some names, the result's type, and where in the op's list each name is."""
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    if names in _selections:
        return _selections[names]
    if not names or any(name not in OUTPUTS for name in names) or len(set(names)) != len(names):
        raise ValueError(f"regfast.{op}: outputs: expected different names among {', '.join(OUTPUTS)}, got {names!r}")
    in_order = sorted(names, key=OUTPUTS.index)
    bits = sum(1 << OUTPUTS.index(name) for name in names)
    _selections[names] = bits, _CLASSES.get(names), tuple(in_order.index(name) for name in names)
    return _selections[names]
