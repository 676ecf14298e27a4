"""Nothing of ours looks up a function that users put ours in the place of: it would call itself for ever."""

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, CASES, bound, scalar
from torch.func import grad, jvp, vmap
from util import HALF, class_targets, probability_targets, spiky

import regfast

NAMESAKES = {
    "linear": regfast.linear,
    "softmax": regfast.softmax,
    "log_softmax": regfast.log_softmax,
    "logsumexp": regfast.logsumexp,
    "cross_entropy": regfast.cross_entropy,
    "mse_loss": regfast.mse_loss,
    "linear_cross_entropy": regfast.linear_cross_entropy,
}
# What the namesakes are made of, or are found as: whoever replaces one of them may call ours from it.
PARTS = ("nll_loss", "logsigmoid", "relu", "gelu", "silu", "sigmoid", "tanh", "einsum", "matmul", "mm", "bmm", "addmm")
OUTPUTS = ("loss", "lse", "entropy", "logprob", "argmax")
PLACES = (F, torch, torch.special, torch.Tensor)


@pytest.fixture
def nobody_may_call(monkeypatch):
    for place in PLACES:
        for name in NAMESAKES if place is torch.Tensor else (*NAMESAKES, *PARTS):
            if hasattr(place, name):

                def looked_up(*_, name=f"{place.__name__}.{name}", **__):
                    raise AssertionError(f"{name} was looked up")

                monkeypatch.setattr(place, name, looked_up)


def every_way(fn, arguments):
    """All that takes the composite: first and second derivatives of transforms and of graphs, tangents, batches."""
    plain = [a.detach() for a in arguments]
    batches = [torch.stack([a, a * 0.5]) for a in plain]
    graph = torch.autograd.grad(scalar(fn)(*arguments), arguments, create_graph=True, materialize_grads=True)
    second = [g.detach() for g in graph if not g.requires_grad]
    if len(second) < len(graph):
        total = sum(g.square().sum() for g in graph if g.requires_grad)
        second += torch.autograd.grad(total, arguments, materialize_grads=True)
    return [
        fn(*arguments),
        graph,
        second,
        grad(scalar(fn), tuple(range(len(plain))))(*plain),
        jvp(fn, tuple(plain), tuple(torch.ones_like(a) for a in plain)),
        vmap(fn)(*batches),
    ]


@pytest.mark.parametrize("name", CASES)
def test_composites_look_up_nothing(name, request):
    fn, arguments = bound(name)
    true = every_way(fn, arguments)
    request.getfixturevalue("nobody_may_call")
    torch.testing.assert_close(every_way(fn, arguments), true)


def calls_of_odd_types():
    """Calls that take the composite for what they are given: integers, complex numbers, half types, other shapes."""
    x, w, t = spiky(4, 6), spiky(3, 6), class_targets((4,), 6, 0.2)
    q, c = probability_targets(4, 6), torch.rand(4, 6)
    yield lambda: regfast.linear(x.long(), w.long())
    yield lambda: regfast.linear(x.cfloat(), w.cfloat())
    yield lambda: regfast.linear(x, w[0])
    yield lambda: regfast.logsumexp(x.long(), 1)
    yield lambda: regfast.logsumexp(x.cfloat(), (0, 1))
    yield lambda: regfast.softmax(x.to("meta"), 1)
    yield lambda: regfast.mse_loss(x, x[:1].double(), weight=c)
    yield lambda: regfast.cross_entropy(x, t, label_smoothing=0.1, z_loss=0.1, softcap=5.0, outputs=OUTPUTS)
    for half in HALF:
        for activation in ACTIVATIONS:
            yield lambda h=half, a=activation: vmap(lambda x: regfast.linear(x, w.to(h), activation=a))(x.to(h))
        yield lambda h=half: vmap(lambda x, t: regfast.cross_entropy(x, t))(x.to(h), q)
        yield lambda h=half: vmap(lambda x: regfast.linear_cross_entropy(x, w.to(h), t[0] % 3))(x.to(h))


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_composites_of_odd_types_look_up_nothing(request):
    calls = list(calls_of_odd_types())
    true = [call() for call in calls]
    request.getfixturevalue("nobody_may_call")
    for call, result in zip(calls, true, strict=True):
        torch.testing.assert_close(call(), result)


def test_ours_in_the_place_of_torchs(monkeypatch):
    x, w, t = spiky(8, 5).requires_grad_(), spiky(5, 5).requires_grad_(), class_targets((8,), 5)

    def step(x, w):
        z = F.linear(torch.softmax(x, 1), w)
        return F.cross_entropy(z, t) + F.mse_loss(z, x) + torch.logsumexp(z, (0, 1)) + F.log_softmax(z, 0).sum()

    true = every_way(step, (x, w))
    for place in (F, torch):
        for name, ours in NAMESAKES.items():
            if hasattr(place, name):
                monkeypatch.setattr(place, name, ours)
    torch.testing.assert_close(every_way(step, (x, w)), true, rtol=1e-4, atol=1e-4)
    assert F.cross_entropy is regfast.cross_entropy and torch.logsumexp is regfast.logsumexp
