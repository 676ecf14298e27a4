"""Linear, CrossEntropyLoss, LinearCrossEntropyLoss, MSELoss: drop-in subclasses of torch's modules."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from util import class_targets, probability_targets, spiky

import regfast

PAIRS = {
    "Linear": (regfast.Linear(7, 5), nn.Linear(7, 5)),
    "Linear without bias": (regfast.Linear(7, 5, bias=False), nn.Linear(7, 5, bias=False)),
    "CrossEntropyLoss": (regfast.CrossEntropyLoss(), nn.CrossEntropyLoss()),
    "CrossEntropyLoss with options": (
        regfast.CrossEntropyLoss(torch.ones(5), ignore_index=3, reduction="sum", label_smoothing=0.1),
        nn.CrossEntropyLoss(torch.ones(5), ignore_index=3, reduction="sum", label_smoothing=0.1),
    ),
    "MSELoss": (regfast.MSELoss(), nn.MSELoss()),
    "MSELoss with options": (regfast.MSELoss(reduction="none"), nn.MSELoss(reduction="none")),
}
HEADS = {
    "LinearCrossEntropyLoss": {},
    "LinearCrossEntropyLoss with bias": {"bias": True},
    "LinearCrossEntropyLoss of K dimensions": {"bias": True, "out_features": (2, 3), "reduction": "none"},
    "LinearCrossEntropyLoss with options": {
        "weight": torch.ones(5),
        "ignore_index": 3,
        "reduction": "sum",
        "label_smoothing": 0.1,
    },
}
if hasattr(nn, "LinearCrossEntropyLoss"):  # since torch 2.13
    for name, options in HEADS.items():
        PAIRS[name] = tuple(m.LinearCrossEntropyLoss(7, 5, **options) for m in (regfast, nn))
pairs = pytest.mark.parametrize("ours, theirs", PAIRS.values(), ids=PAIRS.keys())


def arguments_of(module):
    torch.manual_seed(0)
    x = spiky(4, 7)
    if isinstance(module, nn.Linear):
        return (x,)
    if isinstance(module, nn.MSELoss):
        return x[:, :5], x[:, 2:]
    target = class_targets((4, *getattr(module, "out_features", ())), 5)
    return x if hasattr(module, "linear") else x[:, :5], target


@pairs
def test_is_a_drop_in_subclass(ours, theirs):
    assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    values = []
    for module in (ours, theirs):
        first, *others = arguments_of(module)
        value = module(first.requires_grad_(), *others)
        values.append([value, *torch.autograd.grad(value.square().sum(), [first, *module.parameters()])])
    assert_close(*values)


@pairs
def test_takes_the_same_arguments(ours, theirs):
    mine, wanted = (inspect.signature(type(module)).parameters.values() for module in (ours, theirs))
    key = lambda p: (p.name, p.kind, p.default)  # noqa: E731
    assert set(map(key, wanted)) <= set(map(key, mine))
    positional = [p.name for p in wanted if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in mine][: len(positional)] == positional


@pairs
def test_copies(ours, theirs):
    arguments = arguments_of(ours)
    value = ours(*arguments)
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(stream, weights_only=False)):
        assert type(twin) is type(ours) and repr(twin) == repr(ours)
        assert torch.equal(twin(*arguments), value)


def test_linear_takes_factory_arguments():
    assert regfast.Linear(7, 5, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    assert regfast.Linear(7, 5, device="meta")(torch.empty(3, 7, device="meta")).shape == (3, 5)
    assert regfast.Linear(7, 5, activation="relu", dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    assert regfast.Linear(7, 5, False, "meta", activation="relu")(torch.empty(3, 7, device="meta")).shape == (3, 5)
    with pytest.raises(ValueError, match=r"regfast\.Linear: activation: expected .*relu.*, got 'mish'"):
        regfast.Linear(7, 5, activation="mish")


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_loss_passes_every_option(reduction, dtype):
    weight = torch.rand(9).to(dtype)
    options = {"ignore_index": 2, "reduction": reduction, "label_smoothing": 0.1}
    ours = regfast.CrossEntropyLoss(weight, **options)
    x, target = spiky(6, 9, dtype=dtype).requires_grad_(), class_targets((6,), 9, 0.4, 2)
    assert torch.equal(ours(x, target), regfast.cross_entropy(x, target, weight, **options))
    assert ours.weight is weight or torch.equal(ours.state_dict()["weight"], weight)
    extra = {"z_loss": 0.1, "softcap": 5.0, "logit_scale": 0.5, "outputs": ("loss", "lse", "argmax")}
    extra["loss_dtype"] = torch.float64
    got = regfast.CrossEntropyLoss(weight, **options, **extra)(x, target)
    true = regfast.cross_entropy(x, target, weight, **options, **extra)
    assert type(got) is type(true) and all(torch.equal(a, b) for a, b in zip(got, true, strict=True))


def test_cross_entropy_loss_in_place():
    x = spiky(6, 9).requires_grad_() * 1
    loss = regfast.CrossEntropyLoss(inplace_backward=True)(x, probability_targets(6, 9))
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.data_ptr() == x.data_ptr()


def test_options_of_cross_entropy_loss_survive_copies():
    ours = regfast.CrossEntropyLoss(
        z_loss=0.25, softcap=7.0, logit_scale=0.5, outputs=("lse", "loss"), loss_dtype=torch.float64
    )
    x, target = spiky(6, 9), class_targets((6,), 9)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        got, true = twin(x, target), ours(x, target)
        assert got._fields == true._fields == ("lse", "loss")
        assert all(torch.equal(a, b) for a, b in zip(got, true, strict=True))


def test_linear_cross_entropy_loss_passes_every_option():
    options = {
        "z_loss": 0.1,
        "softcap": 5.0,
        "logit_scale": 0.5,
        "outputs": ("lse", "loss"),
        "loss_dtype": torch.float64,
        "reduction": "none",
    }
    module = regfast.LinearCrossEntropyLoss(7, 5, memory_budget=1, filter_eps=1e-6, **options)
    x, target = spiky(40, 7), class_targets((40,), 5, 0.2)
    true = regfast.linear_cross_entropy(x, module.linear.weight, target, memory_budget=1, **options)
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        got = twin(x, target)
        assert got._fields == ("lse", "loss") and got.loss.dtype == torch.float64
        assert all(torch.equal(a, b) for a, b in zip(got, true, strict=True))
    half = regfast.LinearCrossEntropyLoss(7, 5, weight=torch.rand(5), dtype=torch.bfloat16).to(torch.bfloat16)
    assert half(x.bfloat16(), target).dtype == torch.bfloat16
    for name, wrong in (("weight", torch.rand(4)), ("label_smoothing", -0.1)):
        with pytest.raises(RuntimeError, match=rf"regfast\.LinearCrossEntropyLoss: {name}: expected .*, got"):
            regfast.LinearCrossEntropyLoss(7, 5, **{name: wrong})


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_weights_tied_with_an_embedding(reduction):
    # The shared gradient sums the lookup's and the head's over several backwards.
    embedding, head = nn.Embedding(30, 8), regfast.LinearCrossEntropyLoss(8, 30, reduction=reduction, memory_budget=1)
    head.linear.weight = embedding.weight
    assert len({id(p) for p in (*embedding.parameters(), *head.parameters())}) == 1
    true = embedding.weight.detach().clone().requires_grad_()
    optimiser = torch.optim.SGD([embedding.weight, true], lr=0.01)
    for step in range(6):
        tokens, target = torch.randint(30, (50,)), class_targets((50,), 30, 0.2)
        head(embedding(tokens).tanh(), target).sum().mul(1 + step).backward()
        loss = F.cross_entropy(F.embedding(tokens, true).tanh() @ true.T, target, reduction=reduction)
        loss.sum().mul(1 + step).backward()
        assert_close(embedding.weight.grad, true.grad, rtol=1e-4, atol=1e-5)
        if step % 3 == 2:  # gradients of three backwards are accumulated for each step
            optimiser.step()
            optimiser.zero_grad()
            assert_close(embedding.weight, true)
    assert torch.equal(head.linear.weight, embedding.weight)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_mse_loss_passes_every_option(reduction):
    x, y = spiky(6, 9), spiky(6, 9)
    assert torch.equal(regfast.MSELoss(reduction=reduction)(x, y), regfast.mse_loss(x, y, reduction=reduction))


@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_legacy_arguments():
    assert regfast.MSELoss(size_average=False).reduction == "sum"
    assert regfast.CrossEntropyLoss(reduce=False).reduction == "none"


def test_weight_of_cross_entropy_loss_moves_with_the_module():
    loss = regfast.CrossEntropyLoss(torch.rand(9)).double()
    assert loss.weight.dtype == torch.float64
    assert loss(spiky(6, 9, dtype=torch.float64), class_targets((6,), 9)).dtype == torch.float64


def test_a_model_trains_as_with_torch():
    def train(linear, loss):
        torch.manual_seed(1)
        model = nn.Sequential(linear(20, 16), nn.ReLU(), linear(16, 4))
        optimiser, criterion = torch.optim.SGD(model.parameters(), lr=0.1), loss()
        data, target = spiky(64, 20, size=1), class_targets((64,), 4)
        losses = []
        for _ in range(30):
            optimiser.zero_grad()
            value = criterion(model(data), target)
            value.backward()
            optimiser.step()
            losses.append(value.item())
        return torch.tensor(losses)

    torch.testing.assert_close(train(regfast.Linear, regfast.CrossEntropyLoss), train(nn.Linear, nn.CrossEntropyLoss))
