"""replace(): classes of a model's modules change in place, and all else about it stays."""

import copy
import pickle
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regfast
from regfast._paths import recorded


def ops(call) -> list[str]:
    with recorded() as calls:
        call()
    return [c.op for c in calls]


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(inplace=True),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
}
X = torch.randn(6, 8)


def mlp(activation=None):
    return nn.Sequential(nn.Linear(8, 16), activation or nn.GELU(), nn.Dropout(0.0), nn.Linear(16, 5))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.attention = nn.MultiheadAttention(5, 1)
        self.head = nn.Linear(5, 30)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.distance = nn.MSELoss(reduction="sum")

    def forward(self, x, target):
        z = self.body(x)
        z = self.attention(z, z, z)[0]
        return self.loss(self.head(z), target) + self.distance(z, torch.zeros_like(z))


def test_everything_but_classes_stays():
    model, target = Model(), torch.randint(30, (6,))
    optimizer = torch.optim.Adam(model.parameters())
    seen = []
    model.head.register_forward_hook(lambda *_: seen.append("hook"))
    state, names, parameters = model.state_dict(), [n for n, _ in model.named_modules()], list(model.parameters())
    true = torch.autograd.grad(model(X, target), parameters)
    classes = [type(m) for m in model.modules()]

    report = regfast.replace(model, head="head")
    assert isinstance(model.head, regfast.LazyHead) and type(model.loss) is regfast.CrossEntropyLoss
    assert type(model.distance) is regfast.MSELoss and type(model.body[0]) is regfast.Linear
    assert isinstance(model.body, nn.Sequential) and isinstance(model.body[3], nn.Linear)
    assert [n for n, _ in model.named_modules()] == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.state_dict().keys() == state.keys() and not model.load_state_dict(state, strict=True).missing_keys
    assert seen == ["hook"]
    used = ops(lambda: torch.testing.assert_close(torch.autograd.grad(model(X, target), parameters), true))
    assert seen == ["hook"] * 2
    assert any(op.startswith("linear_cross_entropy") for op in used) and "mse_loss_forward" in used
    assert sum(op == "linear_forward" for op in used) == 2  # those of the body, the first with its activation
    model(X, target).backward()
    optimizer.step()

    text = str(report)
    assert re.search(r"^Sequential +a subclass of it .*activations", text, re.M) and re.search(
        r"^\S+ +left ", text, re.M
    )
    assert all(hasattr(regfast, name) for name in re.findall(r"regfast\.(\w+)", text)) and "regfast.LazyHead" in text
    ((name, why),) = [(e.name, e.why) for e in report.left]
    assert name == "attention.out_proj" and "subclass" in why
    assert {e.name for e in report.changed} == {"body", "body.0", "body.3", "head", "loss", "distance"}
    report.restore()
    assert [type(m) for m in model.modules()] == classes
    report.restore()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_sequentials_are_fused(name):
    model = mlp(ACTIVATIONS[name])
    true = model(X)
    gradient = torch.autograd.grad(true.sum(), model[0].weight)[0]
    regfast.replace(model)
    with recorded() as calls:
        result = model(X)
    assert [c.op for c in calls] == ["linear_forward"] * 2
    torch.testing.assert_close(result, true)
    torch.testing.assert_close(torch.autograd.grad(result.sum(), model[0].weight)[0], gradient)
    # One call for both: what is between them is never made.
    assert not any("Relu" in str(n) or "Gelu" in str(n) for n in graph(result.grad_fn))
    assert len(model[:2]) == 2 and isinstance(model[:2], nn.Sequential)


def graph(node):
    return [node, *(x for after, _ in node.next_functions if after is not None for x in graph(after))]


def test_what_is_added_to_layers_of_a_fused_sequential_counts():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.ReLU())
    regfast.replace(model)
    seen = []
    handle = model[1].register_forward_hook(lambda module, args, out: seen.append((args[0].min(), out.min())))
    model(X)
    assert seen[0][0] < 0 == seen[0][1]  # the hook sees what the activation was given
    handle.remove()
    handle = model[0].register_forward_hook(lambda module, args, out: out * 0 - 1)
    assert torch.equal(model[:2](X), torch.zeros(6, 8))
    handle.remove()

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) - 100

    model[0] = Adapter(model[0])
    assert torch.equal(model[:2](X), torch.zeros(6, 8))
    model[1].forward = lambda x: x * 0 + 7
    assert torch.equal(model[:2](X), torch.full((6, 8), 7.0))
    assert regfast.replace(nn.Sequential()).entries == [] and str(regfast.replace(nn.Sequential()))
    assert torch.equal(regfast.replace and nn.Sequential(nn.ReLU())(X), X.relu())


def test_left_alone():
    class Mine(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.ModuleDict({"mine": Mine(8, 8), "patched": nn.Linear(8, 8), "loss": nn.NLLLoss()})
    model["patched"].forward = lambda x: x
    model["block"] = nn.Module()  # whatever its code may do
    model["block"].linear1, model["block"].activation = nn.Linear(8, 16), nn.GELU()
    report = regfast.replace(model)
    assert type(model["mine"]) is Mine and type(model["patched"]) is nn.Linear and type(model["loss"]) is nn.NLLLoss
    why = {e.name: e.why for e in report.left}
    assert "subclass" in why["mine"] and "forward" in why["patched"] and "its code" in why["block"]
    assert type(model["block"].linear1) is regfast.Linear


@pytest.mark.parametrize("options", [{"linear": False}, {"losses": False}, {"head": None}])
def test_options(options):
    model = Model()
    regfast.replace(model, **({"head": "head"} | options))
    assert (type(model.body[0]) is regfast.Linear) is options.get("linear", True)
    assert (type(model.loss) is regfast.CrossEntropyLoss) is options.get("losses", True)
    assert (type(model.head) is regfast.LazyHead) is ("head" not in options)


def test_head_by_its_ways():
    model = Model()
    assert "LazyHead" not in str(regfast.replace(model))  # no get_output_embeddings
    regfast.replace(model, head=model.head)
    assert type(model.head) is regfast.LazyHead
    assert regfast.replace(model, head="head").changed == []  # it is one
    model.get_output_embeddings = lambda: model.body[3]
    regfast.replace(model)
    assert isinstance(model.body[3], regfast.LazyHead)  # one of ours by then
    for wrong, error in (("nowhere", ValueError), (nn.Linear(2, 2), ValueError), ("body", TypeError), (3, TypeError)):
        with pytest.raises(error, match=r"regfast\.replace: head: expected .*, got "):
            regfast.replace(model, head=wrong)
    with pytest.raises(TypeError, match=r"regfast\.replace: model: expected .*, got int"):
        regfast.replace(3)


def test_auto_is_lazy_where_that_is_not_slower(monkeypatch):
    model = Model()
    model.get_output_embeddings = lambda: model.head
    x, half = torch.randn(6, 5), torch.randn(6, 5).bfloat16()

    def lazy(x):
        return type(model.head(x)) is regfast.LazyLogits

    regfast.replace(model)
    fast = sys.modules["regfast.lazy"].FAST_HALF
    monkeypatch.setattr(sys.modules["regfast.lazy"], "FAST_HALF", set())
    assert lazy(x)
    monkeypatch.setattr(sys.modules["regfast.lazy"], "FAST_HALF", {torch.bfloat16})
    assert lazy(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not lazy(x)
    model.head.bfloat16()
    assert not lazy(half)
    regfast.replace(model, head="head")
    assert lazy(half) and type(model.head) is regfast.LazyHead
    assert regfast.replace(model).changed == []  # what was named stays
    assert fast == set()  # REGFAST_GEMM=own, as the tests have it


def test_shared_modules_copies_and_pickles():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = regfast.replace(model)
    assert len([e for e in report.changed if e.was is nn.Linear]) == 1
    true = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and torch.equal(twin(X), true)


def test_restore_leaves_what_somebody_changed_since():
    model = mlp()
    report = regfast.replace(model)
    model[0].__class__ = nn.Bilinear
    report.restore()
    assert type(model[0]) is nn.Bilinear and type(model[3]) is nn.Linear


def test_conv1d_of_transformers():
    utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(utils.Conv1D(12, 8))
    true = model(X)
    gradient = torch.autograd.grad(true.square().sum(), model.parameters())
    regfast.replace(model)
    assert isinstance(model[0], utils.Conv1D) and type(model[0]) is not utils.Conv1D
    assert ops(lambda: torch.testing.assert_close(model(X), true)) == ["linear_forward"]
    torch.testing.assert_close(torch.autograd.grad(model(X).square().sum(), model.parameters()), gradient)
    assert type(pickle.loads(pickle.dumps(model))[0]) is type(model[0])
    assert not regfast.replace(model).changed
    patched = nn.Sequential(utils.Conv1D(12, 8))
    patched[0].forward = lambda x: x
    report = regfast.replace(patched)
    assert type(patched[0]) is utils.Conv1D and "its forward was replaced" in str(report)


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 5)

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        return self.head(x)


def conv1d():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(12, 8)


@pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (lambda: nn.Linear(8, 5), (X,)),
        (mlp, (X,)),
        (Headed, (X,)),
        (conv1d, (X,)),
        (lambda: nn.CrossEntropyLoss(label_smoothing=0.1), (X, torch.randint(8, (6,)))),
        (nn.MSELoss, (X, 2 * X)),
    ],
    ids=["linear", "sequential", "head", "conv1d", "cross_entropy", "mse_loss"],
)
def test_what_takes_programs_apart_takes_replaced_ones(make, arguments):
    """Whatever replace() makes of a module can be scripted, traced and exported, as the module could."""
    model = make()
    true, named = model(*arguments), set(vars(model))
    assert regfast.replace(model).changed
    for program in (
        torch.jit.script(model),
        torch.jit.trace(model, arguments),
        torch.fx.symbolic_trace(model),
        torch.export.export(model, arguments).module(),
    ):
        torch.testing.assert_close(program(*arguments), true)
    assert set(vars(model)) - named <= {"__overloads__"}  # torch.jit's


def test_compiled():
    model, target = Model(), torch.randint(30, (6,))
    true = model(X, target)
    regfast.replace(model, head="head")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, target), true)


def test_linear_from_linear():
    layer = nn.Linear(8, 5, bias=False, dtype=torch.bfloat16).eval()
    made = regfast.Linear.from_linear(layer)
    assert type(made) is regfast.Linear and made.weight is layer.weight and made.bias is None and not made.training
    x = X.bfloat16()
    torch.testing.assert_close(made(x), layer(x))
    assert regfast.Linear.from_linear(nn.Linear(3, 2)).extra_repr() == nn.Linear(3, 2).extra_repr()
    with pytest.raises(TypeError, match=r"regfast\.Linear\.from_linear: layer: expected .*, got ReLU"):
        regfast.Linear.from_linear(nn.ReLU())


@pytest.mark.parametrize("n, shape", [(1, (7, 5)), (2, (8, 12)), (4, (12, 8)), (4, (4, 4))])
def test_phm_from_linear(n, shape):
    dense = nn.Linear(*shape)
    made, error = regfast.PHMLinear.from_linear(dense, n)
    weight = made.merge().weight
    assert error == pytest.approx(((weight - dense.weight).norm() / dense.weight.norm()).item(), abs=1e-6)
    assert made.a.requires_grad and made.bias is not dense.bias and torch.equal(made.bias, dense.bias)
    torch.testing.assert_close(made(torch.eye(shape[0])), F.linear(torch.eye(shape[0]), weight, dense.bias))
    # It is nearest: no direction of its parameters leads nearer.
    a, s = (p.detach().clone().requires_grad_() for p in (made.a, made.matrices))
    distance = (regfast.reference.phm_weight(a, s) - dense.weight.detach()).square().sum()
    assert all(g.abs().max() < 1e-5 for g in torch.autograd.grad(distance, (a, s)))
    # What has the form is found again.
    again, none = regfast.PHMLinear.from_linear(regfast.PHMLinear(*shape, n).merge(), n)
    assert none < 1e-6 and isinstance(again, regfast.PHMLinear)


def test_phm_from_linear_of_odd_layers():
    zero = nn.Linear(4, 4, bias=False, dtype=torch.float16)
    nn.init.zeros_(zero.weight)
    made, error = regfast.PHMLinear.from_linear(zero, 2)
    assert error == 0 and made.bias is None and made.s.dtype is torch.float16 and not made.merge().weight.any()
    with pytest.raises(ValueError, match=r"regfast\.PHMLinear: n: expected"):
        regfast.PHMLinear.from_linear(nn.Linear(4, 6), 4)
    with pytest.raises(TypeError, match=r"PHMLinear\.from_linear: layer: expected"):
        regfast.PHMLinear.from_linear(nn.ReLU(), 2)
