"""Arguments that are no plain tensors: proxies of torch.fx, duck types, subclasses; and TorchScript."""

import inspect
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from util import class_targets, spiky

import regfast

X, W, B, T, Y = spiky(6, 4), spiky(5, 4), spiky(5), class_targets((6,), 5), spiky(6, 5)
A, S = spiky(2, 2, 2), spiky(2, 3, 2)
# Each function with all of its tensors, in the order of their names.
CALLS = {
    "linear": (regfast.linear, {"input": X, "weight": W, "bias": B}, {"activation": "relu"}),
    "phm_linear": (regfast.phm_linear, {"input": X, "a": A, "s": S, "bias": spiky(6)}, {"activation": "tanh"}),
    "softmax": (regfast.softmax, {"input": X}, {"dim": 0, "dtype": torch.float64}),
    "log_softmax": (regfast.log_softmax, {"input": X}, {"dim": 1}),
    "logsumexp": (regfast.logsumexp, {"input": X}, {"dim": (0, 1), "keepdim": True}),
    "mse_loss": (regfast.mse_loss, {"input": X, "target": X + 1, "weight": X.abs()}, {"reduction": "sum"}),
    "cross_entropy": (
        regfast.cross_entropy,
        {"input": Y, "target": T, "weight": torch.rand(5)},
        {"ignore_index": 2, "z_loss": 0.1, "outputs": ("lse", "loss")},
    ),
    "linear_cross_entropy": (
        regfast.linear_cross_entropy,
        {"input": X, "linear_weight": W, "target": T, "linear_bias": B, "weight": torch.rand(5)},
        {"softcap": 5.0},
    ),
    "linear_mse_loss": (
        regfast.linear_mse_loss,
        {"input": X, "weight": W, "target": Y, "bias": B, "sample_weight": torch.rand(6)},
        {"reduction": "none"},
    ),
    "linear_nll": (
        regfast.linear_nll,
        {"input": X, "weight": W, "target": Y, "bias": B, "sigma": torch.rand(5), "sample_weight": torch.rand(6)},
        {"family": "gaussian", "full": False},
    ),
    "linear_nll bernoulli": (
        regfast.linear_nll,
        {"input": X, "weight": W, "target": Y.sigmoid(), "pos_weight": torch.rand(5)},
        {"family": "bernoulli"},
    ),
}
calls = pytest.mark.parametrize("name", CALLS)


def leaves(result):
    return result if isinstance(result, (tuple, list)) else (result,)


class Traced(nn.Module):
    """Passes one argument of a function as its own, so that a tracer replaces that one."""

    def __init__(self, fn, tensors, options, argument):
        super().__init__()
        self.fn, self.options, self.argument, self.names = fn, options, argument, list(tensors)
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def forward(self, argument):
        tensors = {name: getattr(self, name) for name in self.names} | {self.argument: argument}
        return self.fn(**tensors, **self.options)


@calls
def test_symbolic_trace(name):
    fn, tensors, options = CALLS[name]
    for argument in tensors:
        graph = torch.fx.symbolic_trace(Traced(fn, tensors, options, argument))
        assert any(node.target is fn for node in graph.graph.nodes), graph.graph
        for ours, true in zip(leaves(graph(tensors[argument])), leaves(fn(**tensors, **options)), strict=True):
            assert torch.equal(ours, true)


class Duck:
    """No tensor, but what torch asks first."""

    calls: list

    def __init__(self):
        self.calls = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        duck = next(a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Duck))
        duck.calls.append((func, types, args, kwargs or {}))
        return duck


@calls
def test_duck_types_decide(name):
    fn, tensors, options = CALLS[name]
    for argument, value in tensors.items():
        duck = Duck()
        given = tensors | {argument: duck}
        assert fn(**given, **options) is duck
        ((func, types, args, kwargs),) = duck.calls
        assert func is fn and Duck in types
        # All that was given comes, where the function has it.
        arguments = inspect.signature(fn).bind(*args, **kwargs).arguments
        assert all(arguments[key] is wanted for key, wanted in given.items())
        assert all(arguments[key] == wanted for key, wanted in options.items())
        duck.calls.clear()
        # The call can be made again with what was given, as handlers do.
        wanted, got = (
            leaves(fn(*a, **k)) for a, k in (((), {**tensors, **options}), ((), {**arguments, argument: value}))
        )
        assert all(map(torch.equal, wanted, got))


@calls
@pytest.mark.parametrize("wrong", [None, [1.0, 2.0], 3, "x", X.numpy()], ids=["None", "list", "int", "str", "numpy"])
def test_anything_else_is_a_type_error(name, wrong):
    fn, tensors, options = CALLS[name]
    parameters = inspect.signature(fn).parameters
    for argument in tensors:
        if argument == "sigma" or (wrong is None and parameters[argument].default is None):
            continue
        with pytest.raises(TypeError, match=rf"regfast\.{fn.__name__}: {argument}: expected a Tensor, got "):
            fn(**(tensors | {argument: wrong}), **options)


class Sub(torch.Tensor):
    """The simplest subclass: torch gives it results of its class."""


class Logged(torch.Tensor):
    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@calls
def test_subclasses_and_modes_see_our_ops(name):
    fn, tensors, options = CALLS[name]
    true = leaves(fn(**tensors, **options))
    for argument, value in tensors.items():
        for cls in (Sub, Logged):
            Logged.seen.clear()
            ours = leaves(fn(**(tensors | {argument: value.as_subclass(cls)}), **options))
            assert all(
                type(o) is cls and torch.equal(o.as_subclass(torch.Tensor), t) for o, t in zip(ours, true, strict=True)
            )
            assert type(ours) is type(true)
            if cls is Logged and not (name == "mse_loss" and "weight" in tensors):
                assert any("regfast" in str(func) for func in Logged.seen), Logged.seen
    with Seen() as mode:
        fn(**tensors, **options)
    assert name == "mse_loss" or any("regfast" in str(func) for func in mode.seen)


MODULES = {
    "Linear": (regfast.Linear(4, 5, activation="gelu"), (X,)),
    "PHMLinear": (regfast.PHMLinear(4, 6, 2, activation="silu"), (X,)),
    "CrossEntropyLoss": (regfast.CrossEntropyLoss(torch.rand(5), reduction="sum", label_smoothing=0.1), (Y, T)),
    "CrossEntropyLoss of options": (
        regfast.CrossEntropyLoss(z_loss=0.1, softcap=4.0, outputs="entropy", loss_dtype=torch.float64),
        (Y, T),
    ),
    "MSELoss": (regfast.MSELoss(reduction="none"), (X, X + 1)),
}
OTHERS = {
    "LinearCrossEntropyLoss": (regfast.LinearCrossEntropyLoss(4, 5, bias=True), (X, T)),
    "LinearNLLLoss": (regfast.LinearNLLLoss(4, 5, family="gaussian", sigma="learned"), (X, Y)),
    "CrossEntropyLoss of several": (regfast.CrossEntropyLoss(outputs=("loss", "argmax")), (Y, T)),
}
scripting = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")


@pytest.mark.parametrize("name", MODULES | OTHERS)
def test_symbolic_trace_of_modules(name):
    module, arguments = (MODULES | OTHERS)[name]
    graph = torch.fx.symbolic_trace(nn.Sequential(module) if len(arguments) == 1 else module)
    for ours, true in zip(leaves(graph(*arguments)), leaves(module(*arguments)), strict=True):
        assert torch.equal(ours, true)


@scripting
@pytest.mark.parametrize("name", MODULES)
def test_script(name, tmp_path):
    module, arguments = MODULES[name]
    parent = nn.Sequential(module) if len(arguments) == 1 else module
    scripted = torch.jit.script(parent)
    scripted.save(tmp_path / "module.pt")
    for twin in (scripted, torch.jit.load(tmp_path / "module.pt")):
        leaf = [a.clone().requires_grad_(a.is_floating_point()) for a in arguments]
        ours, true = twin(*leaf), module(*leaf)
        assert torch.equal(ours, true)
        assert torch.equal(torch.autograd.grad(ours.sum(), leaf[0])[0], torch.autograd.grad(true.sum(), leaf[0])[0])
    assert not isinstance(module, torch.jit.ScriptModule)  # what was scripted is left as it was


@scripting
@pytest.mark.parametrize("name", OTHERS)
def test_script_is_refused_in_words(name):
    module, _ = OTHERS[name]
    with pytest.raises(
        NotImplementedError, match=rf"regfast\.{type(module).__name__}: .*expected .*torch\.jit\.script|jit"
    ):
        torch.jit.script(module)


@scripting
@pytest.mark.parametrize("name", MODULES | OTHERS)
def test_trace(name):
    module, arguments = (MODULES | OTHERS)[name]
    traced = torch.jit.trace(module, arguments)
    other = tuple(a + 1 if a.is_floating_point() else a for a in arguments)
    for ours, true in zip(leaves(traced(*other)), leaves(module(*other)), strict=True):
        assert torch.equal(ours, true)
