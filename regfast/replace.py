"""Models in place: layers and losses change their classes, and nothing else of them changes."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.jit import is_scripting

from .cross_entropy import CrossEntropyLoss
from .fused_methods import activation_of, fused_class_of, is_conv1d, is_fused
from .lazy import AutoLazyHead, LazyHead
from .linear import Linear, is_product, linear
from .linear_cross_entropy import LinearCrossEntropyLoss
from .mse_loss import MSELoss

_HEADS = (nn.Linear, Linear, LazyHead, AutoLazyHead)
_LOSSES: dict[type[nn.Module], type[nn.Module]] = {nn.CrossEntropyLoss: CrossEntropyLoss, nn.MSELoss: MSELoss}
if hasattr(nn, "LinearCrossEntropyLoss"):  # since torch 2.13
    _LOSSES[nn.LinearCrossEntropyLoss] = LinearCrossEntropyLoss


class FusedSequential(nn.Sequential):
    """:class:`torch.nn.Sequential` in which a linear layer and the activation after it are one call.

    The modules stay, with their names: a layer that has come to do more than multiply (an adapter, hooks, a quantised
    weight), or an activation with hooks, is called by itself.
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            for layer in self:
                input = layer(input)
            return input
        modules = iter(self._modules.values())
        module = next(modules, None)
        while module is not None:
            after = next(modules, None)
            activation = activation_of(after) if after is not None and is_product(module) else None
            if activation is None:
                input, module = module(input), after
            else:
                layer = cast(nn.Linear, module)
                input = linear(input, layer.weight, layer.bias, activation=activation)
                module = next(modules, None)
        return input


def __getattr__(name: str) -> type:
    """``Conv1D``: a subclass of transformers' class of that name, made when somebody, pickle for one, asks for it."""
    if name != "Conv1D":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    pytorch_utils: Any = importlib.import_module("transformers.pytorch_utils")

    class Conv1D(pytorch_utils.Conv1D):  # type: ignore[misc]  # a class that is found at run time
        """transformers' linear layer, whose weight is transposed, computed by :func:`regfast.linear`."""

        def forward(self, x: Tensor) -> Tensor:
            if is_scripting():
                return torch.ops.regfast.linear(x, self.weight.t(), self.bias, "none")
            return linear(x, self.weight.t(), self.bias)

    Conv1D.__qualname__ = "Conv1D"
    made: type = globals().setdefault("Conv1D", Conv1D)
    return made


@dataclass(frozen=True)
class Entry:
    """What became of one module: of which class it was and is now, or why it was left."""

    name: str
    was: type
    now: type | None
    why: str


def _public_name(kind: type) -> str:
    """Of a class, or of the first that it inherits from: some add to one that users know when it is taken."""
    package = sys.modules[__package__ or ""]
    public = (c.__name__ for c in kind.__mro__ if getattr(package, c.__name__, None) is c)
    return next((f"regfast.{name}" for name in public), "a subclass of it")


@dataclass
class Replacement:
    """What :func:`replace` did: ``changed`` and ``left``, printed as a table; ``restore()`` undoes it."""

    entries: list[Entry] = field(default_factory=list)
    _modules: list[tuple[nn.Module, type, type]] = field(default_factory=list, repr=False)

    @property
    def changed(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.now is not None]

    @property
    def left(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.now is None]

    def restore(self) -> None:
        """Gives every module its class back, but those that somebody has changed since."""
        for module, was, now in self._modules:
            if type(module) is now:
                module.__class__ = was
        self._modules.clear()

    def _change(self, name: str, module: nn.Module, now: type, why: str) -> None:
        self.entries.append(Entry(name, type(module), now, why))
        self._modules.append((module, type(module), now))
        module.__class__ = now

    def _leave(self, name: str, module: nn.Module, why: str) -> None:
        self.entries.append(Entry(name, type(module), None, why))

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[str]] = {}
        for e in self.entries:
            now = "left" if e.now is None else _public_name(e.now)
            groups.setdefault((e.was.__name__, now, e.why), []).append(e.name or "(the model)")
        rows = [("class", "became", "modules", "first", "why")]
        rows += [(was, now, str(len(names)), names[0], why) for (was, now, why), names in groups.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
        return "\n".join(line.rstrip() for line in lines) if self.entries else "nothing to replace"


def _pairs(sequential: nn.Sequential) -> Iterator[tuple[nn.Module, nn.Module]]:
    modules = list(sequential._modules.values())
    for module, after in itertools.pairwise(modules):
        if type(module) in (nn.Linear, Linear) and activation_of(after):
            yield module, after


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    """What a model of transformers calls its head."""
    try:
        found = cast(Any, model).get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if type(found) in _HEADS and type(found) is not LazyHead else None


def _heads_of(model: nn.Module, head: object) -> list[nn.Module]:
    """The layers whose logits are to be lazy."""
    found: nn.Module | None
    if head is None:
        return []
    if isinstance(head, nn.Module):
        found = head
        if all(module is not head for module in model.modules()):
            raise ValueError(
                f"regfast.replace: head: expected a module of the model, got another {type(head).__name__}"
            )
    elif head == "auto":
        heads = map(_output_embeddings, model.modules())
        return [h for h in heads if h is not None]
    elif isinstance(head, str):
        found = dict(model.named_modules()).get(head)
        if found is None:
            raise ValueError(f"regfast.replace: head: expected auto or the name of a module, got {head!r}")
    else:
        raise TypeError(f"regfast.replace: head: expected auto, a name, a module or None, got {type(head).__name__}")
    if type(found) not in _HEADS:
        raise TypeError(f"regfast.replace: head: expected a torch.nn.Linear, got {type(found).__name__}")
    return [cast(nn.Module, found)]


def replace(
    model: nn.Module, *, linear: bool = True, losses: bool = True, head: str | nn.Module | None = "auto"
) -> Replacement:
    """Lets a model's layers and losses be computed by regfast, in place: the classes of its modules change.

    Parameters, buffers, names, hooks, the ``state_dict`` and the state of optimizers stay as they are. Modules are
    changed by their exact class: a subclass of ``nn.Linear`` is somebody's own and is left.

    Args:
        model: any module, before or after it was trained, compiled models before they are compiled.
        linear: ``nn.Linear`` becomes :class:`regfast.Linear`, and transformers' ``Conv1D`` is computed by the same. An
            ``nn.Sequential`` in which one is followed by an activation of :func:`regfast.linear` computes both in one
            call, and so does a module whose own code calls one right after the other (``self.act(self.fc1(x))``, or
            two statements that assign one name), as the source of its methods shows.
        losses: ``nn.CrossEntropyLoss``, ``nn.MSELoss`` and ``nn.LinearCrossEntropyLoss`` become ours.
        head: the layer whose logits are to be :class:`regfast.LazyLogits`, as :class:`regfast.LazyHead` makes them: its
            name, the module, None, or ``auto``: the ``get_output_embeddings()`` of the model or of those within it,
            which a training library's module may wrap, lazy wherever that is not slower (in half types for which
            the CPU has instructions it may be, for less memory).

    Returns:
        A :class:`Replacement`: ``print(report)`` shows what was changed, and what was left and why;
        ``report.restore()`` gives all classes back.

    Raises:
        ValueError: for a head that the model does not have. TypeError: for one that is no ``nn.Linear``.

    A model that was pickled whole, with its classes, needs regfast to be loaded; a ``state_dict`` does not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"regfast.replace: model: expected a torch.nn.Module, got {type(model).__name__}")
    report, lazy = Replacement(), _heads_of(model, head)
    for name, module in list(model.named_modules()):
        kind = type(module)
        if any(module is h for h in lazy):
            wanted = AutoLazyHead if head == "auto" else LazyHead
            if kind is not wanted:
                report._change(name, module, wanted, "logits are multiplied only if someone looks")
        elif "forward" in vars(module) and (kind is nn.Linear or kind in _LOSSES or is_conv1d(module)):
            report._leave(name, module, "its forward was replaced")
        elif losses and kind in _LOSSES:
            report._change(name, module, _LOSSES[kind], "")
        elif not linear:
            continue
        elif kind is nn.Linear:
            report._change(name, module, Linear, "")
        elif is_conv1d(module):
            if kind.__module__ != __name__:
                report._change(name, module, sys.modules[__name__].Conv1D, "a linear layer whose weight is transposed")
        elif kind is nn.Sequential and isinstance(module, nn.Sequential):
            if any(_pairs(module)):
                report._change(name, module, FusedSequential, "linear layers with the activations after them")
        elif isinstance(module, nn.Linear) and kind not in _HEADS:
            report._leave(name, module, "a subclass of nn.Linear, whose own forward may do more")
        elif kind is FusedSequential or is_fused(module):
            continue
        elif fused := fused_class_of(module):
            report._change(name, module, fused, "linear layers with the activations after them")
        elif _has_hidden_pair(module):
            report._leave(name, module, "its code does more between a linear layer and an activation: not fused")
    return report


def _has_hidden_pair(module: nn.Module) -> bool:
    """Whether a linear layer and an activation are parts of it: its forward may call one after the other."""
    children = list(module.children())
    activation = any(activation_of(child) or type(child).__module__ == "transformers.activations" for child in children)
    return activation and any(isinstance(child, nn.Linear) or is_conv1d(child) for child in children)
