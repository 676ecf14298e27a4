"""Methods of modules in which a linear layer and the activation after it become one call.

A module's own code multiplies and activates in two calls, ``self.act(self.fc1(x))`` or one statement after another.
That nothing else looks at what is between them can be read in its source, and then the two are written as one call.
Which layer and which activation they are is asked at each call.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import linecache
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import is_bare, is_product, linear
from .types import Activation

_MODULES: dict[type[nn.Module], Activation] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}
# transformers' classes that are one of these, by the rounding of their formula.
_OF_TRANSFORMERS: dict[str, Activation] = {
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
}
_FUNCTIONS: dict[Any, Activation] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    F.tanh: "tanh",
    torch.tanh: "tanh",
}


def activation_of(called: object) -> Activation | None:
    """The name of the activation that a module or function is and nothing else: hooks are called before or after it."""
    if not isinstance(called, nn.Module):
        try:
            return _FUNCTIONS.get(called)
        except TypeError:  # not hashable
            return None
    if called._forward_hooks or called._forward_pre_hooks or called._backward_hooks or called._backward_pre_hooks:
        return None
    if "forward" in vars(called):
        return None
    kind = type(called)
    if kind is nn.GELU:
        return "gelu" if called.approximate == "none" else "gelu_tanh"
    if kind.__module__ != "transformers.activations":
        return _MODULES.get(kind)
    inner = vars(called).get("act")
    if inner is F.gelu:
        return "gelu"
    if isinstance(inner, functools.partial) and inner.func is F.gelu and not inner.args:
        return "gelu_tanh" if inner.keywords == {"approximate": "tanh"} else None
    return _OF_TRANSFORMERS.get(kind.__name__)


def is_conv1d(layer: object) -> bool:
    """Whether a layer is transformers' whose weight is transposed, or ours of it."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__ in ("transformers.pytorch_utils", "regfast.replace")


def _weight(layer: Any) -> Tensor | None:
    """What a layer multiplies by if it does nothing else: ``(out_features, in_features)``."""
    if is_product(layer):
        weight: Tensor = layer.weight
        return weight
    if is_conv1d(layer) and is_bare(layer):
        transposed: Tensor = layer.weight.t()
        return transposed
    return None


def linear_then(activation: Any, layer: Any, input: Tensor) -> Tensor:
    """``activation(layer(input))``, in one call where these are a linear layer and an activation of ours."""
    name = activation_of(activation)
    weight = None if name is None else _weight(layer)
    if weight is None or name is None:
        result: Tensor = activation(layer(input))
        return result
    return linear(input, weight, layer.bias, activation=name)


# ---- reading methods ----

_LINEAR_THEN = "__regfast_linear_then"


def _attribute_of_self(node: ast.AST) -> str | None:
    """``name`` of ``self.name``."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None


def _one_argument(node: ast.AST) -> ast.Call | None:
    """A call with one positional argument and no others."""
    if not isinstance(node, ast.Call) or node.keywords or len(node.args) != 1 or isinstance(node.args[0], ast.Starred):
        return None
    return node


class _Fuser(ast.NodeTransformer):
    """Writes pairs as one call. A pair is the expression of what activates and the name of the layer."""

    def __init__(self, may_activate: Callable[[ast.expr], bool]) -> None:
        self.may_activate = may_activate
        self.pairs: list[tuple[ast.expr, str]] = []

    def fused(self, outer: ast.Call, inner: ast.Call, layer: str) -> ast.Call:
        self.pairs.append((outer.func, layer))
        name = ast.Name(_LINEAR_THEN, ast.Load())
        return ast.copy_location(ast.Call(name, [outer.func, inner.func, inner.args[0]], []), outer)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        outer = _one_argument(node)
        inner = _one_argument(outer.args[0]) if outer else None
        layer = _attribute_of_self(inner.func) if inner else None
        if outer and inner and layer and self.may_activate(outer.func):
            return self.fused(outer, inner, layer)
        return node

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """``x = self.fc1(x)`` and then ``x = self.act(x)``."""
        kept: list[ast.stmt] = []
        for statement in statements:
            before = _assigned_call(kept[-1]) if kept else None
            here = _assigned_call(statement)
            if before and here and before[0] == here[0]:
                name, outer = here
                inner, given = before[1], outer.args[0]
                layer = _attribute_of_self(inner.func)
                same = isinstance(given, ast.Name) and given.id == name
                if layer and same and self.may_activate(outer.func):
                    call = self.fused(outer, inner, layer)
                    kept[-1] = ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], call), statement)
                    continue
            kept.append(statement)
        return kept

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                setattr(node, field, self.block(statements))
        return node


def _assigned_call(statement: ast.stmt) -> tuple[str, ast.Call] | None:
    """``name = f(x)``."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    target, call = statement.targets[0], _one_argument(statement.value)
    return (target.id, call) if isinstance(target, ast.Name) and call else None


def _same_code(a: CodeType, b: CodeType) -> bool:
    """Whether two functions do the same, wherever their lines are."""

    def same(x: object, y: object) -> bool:
        if isinstance(x, CodeType) and isinstance(y, CodeType):
            return _same_code(x, y)
        return type(x) is type(y) and repr(x) == repr(y)

    parts = ("co_code", "co_names", "co_varnames", "co_cellvars", "co_freevars", "co_flags")
    alike = all(getattr(a, part) == getattr(b, part) for part in parts) and len(a.co_consts) == len(b.co_consts)
    return alike and all(map(same, a.co_consts, b.co_consts))


@functools.lru_cache(maxsize=4)
def _parsed(source: str, filename: str) -> tuple[ast.Module, CodeType] | None:
    try:
        return ast.parse(source), compile(source, filename, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None


def _codes(code: CodeType) -> Iterator[CodeType]:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner
            yield from _codes(inner)


def _definition_of(method: FunctionType) -> ast.FunctionDef | None:
    """A copy of the method in its file, unless what is there now, as a file that was edited, is another one."""
    code = method.__code__
    source = "".join(linecache.getlines(code.co_filename, method.__globals__))
    parsed = _parsed(source, code.co_filename)
    # The whole file, since the code of a call depends on whether its name was imported there.
    if parsed is None or not any(_same_code(c, code) for c in _codes(parsed[1]) if c.co_qualname == code.co_qualname):
        return None
    for node in ast.walk(parsed[0]):
        if isinstance(node, ast.FunctionDef) and (node.name, node.lineno) == (code.co_name, code.co_firstlineno):
            return copy.deepcopy(node)
    return None


def _looked_up(node: ast.expr, names: dict[str, Any]) -> object:
    """What an expression of dotted names stands for, in a module's names; None for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _looked_up(node.value, names)
        return getattr(owner, node.attr, None) if inspect.ismodule(owner) else None
    return None


@functools.cache
def _rewritten(method: FunctionType) -> tuple[FunctionType, list[tuple[ast.expr, str]]] | None:
    """The method with its pairs as one call each, and the pairs."""
    code = method.__code__
    if code.co_freevars or method.__closure__ or not code.co_argcount or code.co_varnames[0] != "self":
        return None  # super() and what surrounds a function cannot be had again
    definition = _definition_of(method)
    if definition is None or definition.decorator_list:
        return None
    if inspect.isgeneratorfunction(method) or inspect.unwrap(method) is not method:
        return None
    for node in ast.walk(definition):
        # Names of a class's private attributes are spelled otherwise outside of it.
        if isinstance(node, ast.Attribute) and node.attr.startswith("__"):
            return None
        if isinstance(node, ast.Name) and node.id == "self" and not isinstance(node.ctx, ast.Load):
            return None
    local = set(code.co_varnames) | set(code.co_cellvars)

    def may_activate(node: ast.expr) -> bool:
        if _attribute_of_self(node):
            return True
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        return not names & local and activation_of(_looked_up(node, method.__globals__)) is not None

    fuser = _Fuser(may_activate)
    fuser.visit(definition)
    if not fuser.pairs:
        return None
    # Inside another function, so that its globals stay those of its module, without a name of ours.
    outer = ast.FunctionDef(
        "make",
        ast.arguments([], [ast.arg(_LINEAR_THEN)], None, [], [], None, []),
        [definition, ast.Return(ast.Name(definition.name, ast.Load()))],
        [],
    )
    if sys.version_info >= (3, 12):
        outer.type_params = []
    definition.args.defaults, definition.args.kw_defaults = [], [None] * len(definition.args.kwonlyargs)
    for node in ast.walk(definition):  # names that may be there for type checkers alone
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
    module = ast.fix_missing_locations(ast.Module([outer], []))
    made: dict[str, Any] = {}
    exec(compile(module, code.co_filename, "exec", dont_inherit=True), method.__globals__, made)
    new: FunctionType = made["make"](linear_then)
    functools.update_wrapper(new, method)
    del new.__wrapped__  # type: ignore[attr-defined]  # what asks for the source of it would find the other one's
    new.__defaults__, new.__kwdefaults__ = method.__defaults__, method.__kwdefaults__
    return new, fuser.pairs


def _methods(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """Methods that are a class's own or inherited, but for those of every module."""
    names = {name for c in kind.__mro__ if c is not nn.Module and issubclass(c, nn.Module) for name in vars(c)}
    for name in sorted(names):
        method = inspect.getattr_static(kind, name)
        if isinstance(method, FunctionType) and not name.startswith("__") and method is not vars(nn.Module).get(name):
            yield name, method


_made: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _fused_class(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass in which these methods are fused."""
    if (kind, names) in _made:
        return _made[kind, names]

    def as_it_was(self: nn.Module) -> nn.Module:
        """torch.jit.script reads sources, and compiles the class that it was."""
        plain = copy.copy(self)
        plain.__class__ = kind
        return plain

    def reduced(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _empty_of, (kind, names), self.__getstate__()

    of_class = {"_fused_from": kind, "__prepare_scriptable__": as_it_was, "__reduce_ex__": reduced}
    of_class |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    methods = {name: found[0] for name in names if (found := _rewritten(inspect.getattr_static(kind, name)))}
    return _made.setdefault((kind, names), type(kind.__name__, (kind,), {**of_class, **methods}))


def _empty_of(kind: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """As pickle wants it, which knows no class that has no name of its own."""
    now = _fused_class(kind, names)
    return now.__new__(now)


def is_fused(module: nn.Module) -> bool:
    """Whether its class is one of these."""
    return hasattr(type(module), "_fused_from")


def fused_class_of(module: nn.Module) -> type[nn.Module] | None:
    """The class that a module may change to, if its code has a linear layer and an activation of ours after it."""
    kind = type(module)
    layers = {name for name, child in module._modules.items() if child is not None and _weight(child) is not None}
    if not layers or isinstance(module, (torch.jit.ScriptModule, nn.Sequential)):
        return None
    # Of classes that are pickled, or know of their subclasses, in a way of their own there is none.
    own = {"__reduce_ex__", "__reduce__", "__init_subclass__"}
    if type(kind) is not type or any(own & vars(c).keys() for c in kind.__mro__ if c is not object):
        return None

    def is_pair(activation: ast.expr, layer: str, names: dict[str, Any]) -> bool:
        attribute = _attribute_of_self(activation)
        called = getattr(module, attribute, None) if attribute else _looked_up(activation, names)
        return layer in layers and activation_of(called) is not None

    names = tuple(
        name
        for name, method in _methods(kind)
        if name not in vars(module)
        and any(not layers.isdisjoint(code.co_names) for code in (method.__code__, *_codes(method.__code__)))
        and (found := _rewritten(method))
        and any(is_pair(activation, layer, method.__globals__) for activation, layer in found[1])
    )
    return _fused_class(kind, names) if names else None
