"""replace(): a linear layer and the activation after it in a module's own code become one call, and nothing else."""

import copy
import functools
import importlib
import io
import linecache
import pickle
import shutil
import sys
import traceback
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regfast
from regfast._paths import recorded

X = torch.randn(6, 8)


class Base(nn.Module):
    """Some code between layers; `fused` of its activations follow a linear layer in one call."""

    fused = 1

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.act, self.dropout = nn.GELU(), nn.Dropout(0.0)
        self.function = F.silu


class Nested(Base):
    def forward(self, x, *, scale: float = 2.0):
        return self.fc2(self.dropout(self.act(self.fc1(x)))) * scale


class Statements(Base):
    def forward(self, x):
        if x.dim() > 1:
            x = self.fc1(x)
            x = self.act(x)
            x = self.dropout(x)
        return self.fc2(x)


class Gated(Base):
    def forward(self, x):
        return self.act(self.fc1(x)) * self.fc2(x)


class Functions(Base):
    fused = 4

    def forward(self, x):
        x = F.relu(self.fc1(x))
        x = torch.tanh(self.fc2(x))
        x = nn.functional.gelu(self.fc1(x))
        return self.function(self.fc2(x))


class OtherMethod(Base):
    def forward(self, x):
        return self.inner(x) + x

    def inner(self, x, bias=1.0):
        return self.act(self.fc1(x)) + bias


class Inherited(OtherMethod):
    pass


class InLoops(Base):
    fused = 3

    def forward(self, x):
        for _ in range(2):
            x = self.fc1(x)
            x = self.act(x)
        with torch.enable_grad():
            (last,) = (self.act(self.fc2(y)) for y in (x,))
        return last


class SeenBetween(Base):
    fused = 0

    def forward(self, x):
        h = self.fc1(x)
        y = self.act(h)
        return y + h


class MoreBetween(Base):
    fused = 0

    def forward(self, x):
        x = self.fc1(x)
        x = x + 1
        x = self.act(x)
        return self.act(self.fc2(x) * 2)


class Keyword(Base):
    fused = 0

    def forward(self, x):
        return F.gelu(self.fc1(x), approximate="tanh") + self.act(self.fc2(input=x))


class LocalName(Base):
    fused = 0

    def forward(self, x):
        relu = torch.neg
        return relu(self.fc1(x))


def doubled(method):
    @functools.wraps(method)
    def both(self, x):
        return method(self, x) * 2

    return both


class Decorated(Base):
    fused = 0

    @doubled
    def forward(self, x):
        return self.act(self.fc1(x))


class Super(Nested):
    fused = 0

    def forward(self, x):
        return self.act(self.fc1(super().forward(x)))


class Private(Base):
    fused = 0

    def __init__(self):
        super().__init__()
        self.__two = 2

    def forward(self, x):
        return self.act(self.fc1(x)) * self.__two


class OtherActivation(Base):
    fused = 0

    def __init__(self):
        super().__init__()
        self.act = nn.Softplus()

    def forward(self, x):
        return self.act(self.fc1(x))


class OwnLinear(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


class OtherLayer(Nested):
    fused = 0

    def __init__(self):
        super().__init__()
        self.fc1 = OwnLinear(8, 8)


class Registered(Nested):
    fused = 0
    registry: ClassVar = []

    def __init_subclass__(cls, *, name, **options):
        Registered.registry.append(name)


class Meta(type):
    pass


class OfMetaclass(Nested, metaclass=Meta):
    fused = 0


class Pickled(Nested):
    fused = 0

    def __reduce__(self):
        return Pickled, ()


class Annotated(Base):
    def forward(self, x):
        def twice(y: "NotThere") -> "NotThere":  # noqa: F821
            return self.act(self.fc1(y)) * 2

        z: NotThere = twice(x)  # noqa: F821
        return z


FUSED = [Nested, Statements, Gated, Functions, OtherMethod, Inherited, InLoops, Annotated]
LEFT = [
    *(SeenBetween, MoreBetween, Keyword, LocalName, Decorated, Super, Private, OtherActivation, OtherLayer),
    *(Registered, OfMetaclass, Pickled),
]


def activations(call) -> int:
    """How many calls of ours have an activation in them: torch's own kernels count what is left."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = ("aten::gelu", "aten::relu", "aten::silu", "aten::tanh")
    return sum(event.count for event in profile.key_averages() if event.key in names)


@pytest.mark.parametrize("kind", FUSED + LEFT, ids=lambda kind: kind.__name__)
def test_what_is_fused(kind):
    model = kind()
    x = X.clone().requires_grad_()
    true = model(x)
    gradients = torch.autograd.grad(true.sum(), [x, *model.parameters()], allow_unused=True)
    before = activations(lambda: model(X))
    report = regfast.replace(model)
    if kind in FUSED:
        assert type(model) is not kind and isinstance(model, kind) and type(model).__name__ == kind.__name__
        assert [e.why for e in report.changed if not e.name] == ["linear layers with the activations after them"]
    elif kind is not Super:  # which inherits what can be fused, and calls it
        assert type(model) is kind
    assert before - activations(lambda: model(X)) == kind.fused
    with recorded() as calls:
        result = model(x)
    assert {c.op for c in calls} <= {"linear_forward"} and calls
    torch.testing.assert_close(result, true)
    for ours, theirs in zip(
        torch.autograd.grad(result.sum(), [x, *model.parameters()], allow_unused=True), gradients, strict=True
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)
    assert regfast.replace(model).changed == []
    report.restore()
    assert type(model) is kind and torch.equal(model(x), true)


@pytest.mark.parametrize("kind", FUSED, ids=lambda kind: kind.__name__)
def test_copies_and_files(kind):
    model = kind()
    regfast.replace(model)
    true = model(X)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert type(other) is type(model) and torch.equal(other(X), true)
    fresh = kind()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(X), true)


def test_what_is_asked_at_each_call():
    model = Nested()
    regfast.replace(model)
    seen = []
    for module in (model.act, model.fc1):
        handle = module.register_forward_hook(lambda module, inputs, output: seen.append(module))
        model(X)
        handle.remove()
    assert seen == [model.act, model.fc1]
    model.act = nn.Softplus()
    torch.testing.assert_close(model(X), model.fc2(F.softplus(model.fc1(X))) * 2)
    model.act = nn.Tanh()
    torch.testing.assert_close(model(X, scale=3.0), model.fc2(torch.tanh(model.fc1(X))) * 3)
    assert activations(lambda: model(X)) == 0
    model.fc1 = nn.Identity()
    torch.testing.assert_close(model(X), model.fc2(torch.tanh(X)) * 2)


def test_a_source_that_has_changed_since_is_not_read(tmp_path, monkeypatch):
    source = "from test_fused_methods import Base\n\n\nclass Model(Base):\n    def forward(self, x):\n"
    file = tmp_path / "a_model_of_a_user.py"
    monkeypatch.syspath_prepend(tmp_path)
    for before, after, fused in (("* 2", "* 2", True), ("* 2", "* 3", False), ("+ x", "- x", False)):
        file.write_text(f"{source}        return self.act(self.fc1(x)) {before}\n")
        sys.modules.pop(file.stem, None)
        linecache.clearcache()
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        model = importlib.import_module(file.stem).Model()
        true = model(X)
        file.write_text(f"{source}        return self.act(self.fc1(x)) {after}\n")
        linecache.clearcache()
        regfast.replace(model)
        assert ("forward" in vars(type(model))) and hasattr(type(model), "_fused_from") == fused
        torch.testing.assert_close(model(X), true)


def test_methods_of_an_instance_stay():
    model = Nested()
    model.forward = lambda x: x * 3
    regfast.replace(model)
    assert torch.equal(model(X), X * 3) and type(model) is Nested


def test_tracers_and_compilers_see_what_they_know():
    model = Nested()
    true = model(X)
    regfast.replace(model)
    torch.testing.assert_close(torch.jit.trace(model, X)(X), true)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(X), true)
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), true)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(X), true)
    torch._dynamo.reset()
    scripted = Statements()
    true = scripted(X)
    regfast.replace(scripted)
    torch.testing.assert_close(torch.jit.script(scripted)(X), true)
    torch.testing.assert_close(scripted(X), true)


def test_errors_point_at_the_code():
    model = Nested()
    regfast.replace(model)
    try:
        model(X[:, :7])
    except RuntimeError as error:
        frames = traceback.extract_tb(error.__traceback__)
    (frame,) = [f for f in frames if f.filename == __file__ and f.name == "forward"]
    assert frame.line == "return self.fc2(self.dropout(self.act(self.fc1(x)))) * scale"
    with pytest.raises(TypeError, match="unexpected keyword"):
        model(X, size=3)


def test_torchs_own_encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 8)
    true = encoder(x)
    report = regfast.replace(encoder)
    assert [e.was.__name__ for e in report.changed].count("TransformerEncoderLayer") == 2
    assert activations(lambda: encoder(x)) == 0
    torch.testing.assert_close(encoder(x), true)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), true)
