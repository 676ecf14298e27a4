"""Lazy logits: what stays lazy becomes one linear_cross_entropy, anything else multiplies, and all numbers are F's."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from util import class_targets, fresh_process, probability_targets

import regfast
from regfast import LazyLogits
from regfast._paths import recorded

B, T, D, V = 3, 5, 8, 19


@pytest.fixture
def tensors():
    return [
        torch.randn(B, T, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
        torch.randn(V, requires_grad=True),
    ]


def products(calls) -> list[str]:
    """The ops that multiply by the weight."""
    return [
        c.op for c in calls if c.op.startswith("linear") and "backward" not in c.op.removesuffix("forward_backward")
    ]


def both(tensors, use, *, bias=True, lazy=True, tolerance=1e-5):
    """use(logits) with lazy logits and with F.linear's: the same values and gradients, and (with lazy) one call of
    linear_cross_entropy and no logits."""
    x, w, b = tensors if bias else (*tensors[:2], None)
    leaves = [t for t in (x, w, b) if t is not None]
    with recorded() as calls:
        logits = regfast.lazy_logits(x, w, b)
        assert type(logits) is LazyLogits
        ours = use(logits)
        assert not isinstance(ours, LazyLogits)
    with torch.random.fork_rng():
        true = use(F.linear(x, w, b))
    assert_close(ours, true, rtol=tolerance, atol=tolerance)
    assert ours.dtype is true.dtype and ours.shape == true.shape
    made = products(calls)
    if lazy:
        assert logits._dense is None
        assert made and all(op.startswith("linear_cross_entropy") for op in made), made
        assert len(made) == 1
    else:
        assert made[0] == "linear_forward"
    if true.requires_grad:
        upstream = torch.randn_like(true)
        theirs = torch.autograd.grad(true, leaves, upstream)
        for got, wanted in zip(torch.autograd.grad(ours, leaves, upstream), theirs, strict=True):
            assert_close(got, wanted, rtol=tolerance, atol=tolerance)


TARGET = class_targets((B * T,), V, 0.2)
NEXT = class_targets((B * (T - 1),), V, 0.2)
LOSSES = {
    "view": lambda z: F.cross_entropy(z.view(-1, V), TARGET),
    "as transformers": lambda z: F.cross_entropy(z.float().view(-1, V), TARGET, ignore_index=-100, reduction="sum") / 7,
    "shifted": lambda z: F.cross_entropy(z[..., :-1, :].contiguous().view(-1, z.size(-1)), NEXT),
    "shifted by two": lambda z: F.cross_entropy(z[:, 1:].reshape(B * (T - 1), V), NEXT, reduction="none"),
    "flatten": lambda z: F.cross_entropy(z.flatten(0, 1), TARGET, label_smoothing=0.1),
    "flatten of torch": lambda z: F.cross_entropy(torch.flatten(z, end_dim=-2), TARGET),
    "reshape of torch": lambda z: F.cross_entropy(torch.reshape(z, (B * T, V)), TARGET),
    "module": lambda z: nn.CrossEntropyLoss(reduction="none")(z.to(torch.float32).view(B * T, -1), TARGET),
    "ours": lambda z: regfast.cross_entropy(z.view(-1, V), TARGET, reduction="sum"),
    "our module": lambda z: regfast.CrossEntropyLoss(label_smoothing=0.2)(z.view(-1, V), TARGET),
    "double": lambda z: F.cross_entropy(z.double().view(-1, V), TARGET),
    "last position": lambda z: F.cross_entropy(z[:, -1], TARGET[:B].clamp(0)),
    "last position, kept": lambda z: F.cross_entropy(z[:, -1:, :].squeeze(1), TARGET[:B].clamp(0)),
    "new dimension": lambda z: F.cross_entropy(z.unsqueeze(1)[:, 0].view(-1, V), TARGET),
    "one row": lambda z: F.cross_entropy(z[0, 1], TARGET[1].clamp(0)),
    "mask": lambda z: F.cross_entropy(z[TARGET.view(B, T) >= 0], TARGET[TARGET >= 0]),
    "chosen positions": lambda z: F.cross_entropy(z[:, torch.tensor([1, 3]), :].view(-1, V), TARGET[: 2 * B]),
    "probabilities": lambda z: F.cross_entropy(z.view(-1, V), probability_targets_of_seed()),
    "temperature": lambda z: F.cross_entropy((z / 0.7).view(-1, V), TARGET),
    "scale": lambda z: F.cross_entropy((0.3 * z * 2).view(-1, V), TARGET),
    "negative scale": lambda z: F.cross_entropy((z * -2).view(-1, V), TARGET),
    "soft cap": lambda z: F.cross_entropy((torch.tanh(z / 3.0) * 3.0).view(-1, V), TARGET),
    "soft cap and scale": lambda z: F.cross_entropy((z * 2).div(3.0).tanh().mul(3.0).mul(0.5).view(-1, V), TARGET),
    "nll_loss": lambda z: F.nll_loss(F.log_softmax(z.view(-1, V), dim=-1), TARGET),
    "nll_loss of float": lambda z: nn.NLLLoss()(F.log_softmax(z, dim=-1, dtype=torch.float32).view(-1, V), TARGET),
    "log-probabilities": lambda z: z.log_softmax(-1).gather(-1, TARGET.clamp(0).view(B, T, 1)).squeeze(-1),
    "log-probabilities of torch": lambda z: torch.gather(
        torch.log_softmax(z / 2, dim=2)[:, :-1], 2, NEXT.clamp(0).view(B, T - 1)[..., None]
    ),
    "logsumexp": lambda z: torch.logsumexp(z, dim=-1),
    "logsumexp, kept": lambda z: z.logsumexp(-1, keepdim=True) * 2,
    "argmax": lambda z: z.argmax(-1),
    "argmax of torch": lambda z: torch.argmax(z[:, 1:], dim=-1, keepdim=True),
    "argmax of detached": lambda z: z.detach().argmax(dim=-1),
    "copy": lambda z: F.cross_entropy(z.clone().view(-1, V), TARGET),
}


def probability_targets_of_seed():
    torch.manual_seed(3)
    return probability_targets(B * T, V)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", LOSSES)
def test_stays_lazy(name, bias, tensors):
    both(tensors, LOSSES[name], bias=bias)


OTHERS = {
    "arithmetic": lambda z: z + 1,
    "sum": lambda z: z.sum(),
    "softmax": lambda z: F.softmax(z, dim=-1),
    "topk": lambda z: torch.topk(z, 3)[0],
    "one class": lambda z: z[..., 3],
    "two classes": lambda z: z[..., [1, 3]],
    "classes of positions": lambda z: z[torch.arange(B)[:, None], torch.arange(T), TARGET.view(B, T).clamp(0)],
    "new last dimension": lambda z: z[..., None],
    "half of the classes": lambda z: z[..., : V // 2],
    "view over classes": lambda z: z.view(B, -1),
    "flatten all": lambda z: z.flatten(),
    "transpose": lambda z: F.cross_entropy(z.transpose(1, 2), TARGET.view(B, T)),
    "tensor factor": lambda z: z * torch.tensor(2.0),
    "tensors of torch": lambda z: torch.cat([z, z * 2], dim=-1),
    "of two arguments": lambda z: torch.stack((z, z)),
    "tanh alone": lambda z: torch.tanh(z) + 0,
    "negative cap": lambda z: F.cross_entropy((torch.tanh(z) * -3).view(-1, V), TARGET),
    "log_softmax": lambda z: z.log_softmax(-1) + 0,
    "log_softmax of positions": lambda z: z.log_softmax(1),
    "gather of two": lambda z: z.log_softmax(-1).gather(-1, torch.ones(B, T, 2).long()),
    "entropy by hand": lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1),
    "max": lambda z: z.max(-1)[0],
    "argmax of all": lambda z: z.argmax(),
    "argmax of positions": lambda z: z.argmax(1),
    "logsumexp of two": lambda z: z.logsumexp((1, 2)),
    "other loss": lambda z: F.multi_margin_loss(z.view(-1, V), TARGET.clamp(0)),
    "target": lambda z: F.mse_loss(torch.zeros(B, T, V), z),
    "integer": lambda z: z.long(),
    "class weights of another dtype": lambda z: F.cross_entropy(z.double().view(-1, V), TARGET, torch.ones(V).double()),
    "permute": lambda z: z.permute(2, 0, 1),
    "iteration": lambda z: torch.stack([row.sum() for row in z]),
    "numpy": lambda z: torch.from_numpy(z.detach().numpy()),
    "in place": lambda z: z.clone().div_(2),
    "bool": lambda z: z > 0,
    "to": lambda z: z.to("meta").to("meta").new_zeros(1, device="cpu"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_multiplies(name, tensors):
    both(tensors, OTHERS[name], lazy=False)


def test_multiplies_once(tensors):
    with recorded() as calls:
        logits = regfast.lazy_logits(*tensors)
        logits.max(), logits.softmax(-1), logits.tolist(), repr(logits), F.cross_entropy(logits.view(-1, V), TARGET)
    assert products(calls) == ["linear_forward"]
    assert logits.multiplied() is logits.multiplied()


def test_about_the_wrapper(tensors):
    with recorded() as calls:
        z = regfast.lazy_logits(*tensors)
        assert z.shape == z.size() == (B, T, V) and z.size(-1) == V and z.ndim == z.dim() == 3 and len(z) == B
        assert z.dtype is torch.float32 and z.device == tensors[0].device and z.requires_grad and z.numel() == B * T * V
        assert isinstance(z, Tensor) and torch.is_tensor(z) and z.is_floating_point() and not z.is_cuda
        assert z in {z} and z.layout is torch.strided
    assert not calls
    assert not z.is_leaf and z.grad_fn is not None  # the product's


def test_graph_of_the_logits(tensors):
    """Gradients of the logits themselves, where they were asked for before the loss."""
    z = regfast.lazy_logits(*tensors)
    z.retain_grad()
    F.cross_entropy(z.view(-1, V), TARGET).backward()
    dense = F.linear(*tensors)
    assert_close(z.grad, torch.autograd.grad(F.cross_entropy(dense.view(-1, V), TARGET), dense)[0])
    z = regfast.lazy_logits(*tensors)
    with torch.no_grad():
        z.max()  # is looked at without a graph first
    assert z.sum().requires_grad
    z = regfast.lazy_logits(*tensors)
    with torch.inference_mode():
        z.max()
    z.sum().backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_what_is_made_of_them_without_a_graph_has_none(context, tensors):
    z = regfast.lazy_logits(*tensors)
    with context():
        rows = z[:, 1:].float() / 2
        assert type(rows) is LazyLogits and not rows.requires_grad
        assert_close(F.cross_entropy(z.view(-1, V), TARGET), F.cross_entropy(F.linear(*tensors).view(-1, V), TARGET))
        assert torch.equal(rows.argmax(-1), F.linear(*tensors)[:, 1:].argmax(-1))
    assert not rows.max().requires_grad
    assert F.cross_entropy(z.view(-1, V), TARGET).requires_grad


def test_ordinary_where_nothing_is_recorded(tensors):
    def kind(call=lambda: regfast.lazy_logits(*tensors)):
        result = call()
        assert_close(result, F.linear(*tensors))
        return type(result)

    assert kind() is LazyLogits
    for context in (torch.no_grad(), torch.inference_mode(), WatchingMode()):
        with context:
            assert kind() is Tensor
    plain = [t.detach() for t in tensors]
    assert kind(lambda: regfast.lazy_logits(*plain)) is Tensor
    with torch.device("cpu"):
        assert kind() is LazyLogits
    torch.func.grad(lambda x: regfast.lazy_logits(x, *plain[1:]).sum())(plain[0])
    torch.func.jvp(lambda x: regfast.lazy_logits(x, *tensors[1:]), (plain[0],), (plain[0],))
    layer = regfast.LazyHead(D, V)
    assert_close(torch.jit.trace(layer, tensors[0])(plain[0]), layer(tensors[0]).multiplied())


class WatchingMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_errors_are_linears(tensors):
    x, w, b = tensors
    for call in (
        lambda f: f(x, w[:, 1:]),
        lambda f: f(x, w, b[1:]),
        lambda f: f(x, w.double()),
        lambda f: f(x, None),
        lambda f: f([1.0], w),
    ):
        with pytest.raises(Exception) as wanted:
            call(F.linear)
        with pytest.raises(wanted.type):
            call(regfast.lazy_logits)
    with pytest.raises(ValueError):
        F.cross_entropy(regfast.lazy_logits(x, w, b).view(-1, V), TARGET[1:])
    with pytest.raises(IndexError):
        F.cross_entropy(regfast.lazy_logits(x, w, b).view(-1, V), TARGET + V)
    with pytest.raises(RuntimeError):
        regfast.lazy_logits(x, w, b).view(4, V)
    with pytest.raises(IndexError):
        regfast.lazy_logits(x, w, b)[B]


def test_what_changed_in_place_is_told(tensors):
    x, w, b = tensors
    z = regfast.lazy_logits(x, w, b)
    seen = regfast.lazy_logits(x, w, b)
    seen.max()
    with torch.no_grad():
        w.mul_(2)  # as an optimizer's step
    for look in (lambda: z.max(), lambda: F.cross_entropy(z.view(-1, V), TARGET), lambda: z.argmax(-1)):
        with pytest.raises(RuntimeError, match=r"regfast\.LazyLogits: expected .* got one that was changed in place"):
            look()
    assert_close(seen.sum(), F.linear(x, w / 2, b).sum())
    z = regfast.lazy_logits(x, w, b)
    rows, copied = z[:, 1:], z.float().clone()
    z.div_(2)  # changes the rows too, and no copy
    assert_close(z.sum(), F.linear(x, w, b).sum() / 2)
    with pytest.raises(RuntimeError, match="changed in place"):
        rows.max()
    assert_close(copied.sum(), F.linear(x, w, b).sum())


def test_half_types_and_autocast(tensors):
    halves = [t.detach().bfloat16().requires_grad_() for t in tensors]
    wide = [t.detach().float() for t in halves]
    exact = F.cross_entropy(F.linear(*wide).view(-1, V), TARGET)
    z = regfast.lazy_logits(*halves)
    assert z.dtype is torch.bfloat16
    for use, dtype in (
        (lambda z: F.cross_entropy(z.view(-1, V), TARGET), torch.bfloat16),
        (lambda z: F.cross_entropy(z.float().view(-1, V), TARGET), torch.float32),
    ):
        loss = use(z)
        assert loss.dtype is use(F.linear(*halves)).dtype is dtype
        assert_close(loss.float(), exact, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=0)
    assert z._dense is None
    with torch.autocast("cpu", torch.bfloat16):
        z, dense = regfast.lazy_logits(*tensors), F.linear(*tensors)
        assert z.dtype is dense.dtype is torch.bfloat16
        loss, true = F.cross_entropy(z.view(-1, V), TARGET), F.cross_entropy(dense.view(-1, V), TARGET)
        assert loss.dtype is true.dtype and z._dense is None
        assert_close(loss, true, rtol=1e-2, atol=1e-2)
    gradients = torch.autograd.grad(F.cross_entropy(z.float().view(-1, V), TARGET), tensors)  # outside, as trainers do
    for got, wanted in zip(gradients, torch.autograd.grad(true, tensors), strict=True):
        assert got.dtype is torch.float32
        assert_close(got, wanted, rtol=5e-2, atol=5e-3)
    with torch.autocast("cpu", torch.bfloat16):  # made outside: looked at within, they are what they were
        z = regfast.lazy_logits(*[t.detach().requires_grad_() for t in tensors])
    made_outside = regfast.lazy_logits(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(made_outside.sum(-1), F.linear(*[t.double() for t in tensors]).sum(-1).float())


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 2), (1, 2)])
def test_frozen(frozen, tensors):
    for i in frozen:
        tensors[i].requires_grad_(False)
    leaves = [t for t in tensors if t.requires_grad]
    z = regfast.lazy_logits(*tensors)
    ours = torch.autograd.grad(F.cross_entropy(z.view(-1, V), TARGET), leaves)
    assert z._dense is None
    assert_close(ours, torch.autograd.grad(F.cross_entropy(F.linear(*tensors).view(-1, V), TARGET), leaves))


def test_saved_copied_printed(tensors):
    true = F.linear(*tensors).detach()
    z = regfast.lazy_logits(*tensors)
    file = io.BytesIO()
    torch.save(z.detach(), file)
    file.seek(0)
    for twin in (
        torch.load(file),
        pickle.loads(pickle.dumps(z.detach())),
        copy.deepcopy(z.detach()),
        copy.copy(z.detach()),
    ):
        assert type(twin) is Tensor
        assert_close(twin, true)
    assert str(z)[:12] == str(F.linear(*tensors))[:12] and f"{regfast.lazy_logits(*tensors).sum():.2f}"


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z * z

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_no_gradient_is_lost_in_silence(tensors):
    z = regfast.lazy_logits(*tensors)
    result = Squared.apply(z)  # asks no subclass
    with pytest.raises(RuntimeError, match=r"regfast\.LazyLogits: expected .* gradient"):
        result.sum().backward()
    Squared.apply(z.multiplied()).sum().backward()


class Cloned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, change):
        return change(z)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


# What stays lazy inside of a Function has no graph, and autograd takes it for the Function's result.
@pytest.mark.parametrize("change", [torch.clone, lambda z: z * 2, lambda z: z.reshape(-1, V), lambda z: z.float() / 3])
def test_results_of_a_function_are_not_taken_for_logits(change, tensors):
    z = Cloned.apply(regfast.lazy_logits(*tensors), change)
    other = tensors[0].square().sum()
    with pytest.raises(RuntimeError, match=r"regfast\.LazyLogits: expected .* torch\.autograd\.Function"):
        (F.cross_entropy(z.reshape(-1, V), TARGET) + other).backward()
    z = Cloned.apply(regfast.lazy_logits(*tensors), change)
    with pytest.raises(RuntimeError, match=r"regfast\.LazyLogits: expected"):
        (z.sum() + other).backward()


def test_squeeze_of_all_dimensions(tensors):
    input, w, *bias = tensors
    z = regfast.lazy_logits(input[:1], w, *bias)
    assert type(z.squeeze()) is LazyLogits and type(torch.squeeze(z)) is LazyLogits
    assert_close(z.squeeze().multiplied(), z.multiplied().squeeze())
    one = regfast.lazy_logits(input[:1], w[:1])
    assert_close(one.squeeze(), one.multiplied().squeeze())


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_head_with_backward_hooks(register, tensors):
    layer, seen = regfast.LazyHead(D, V), []
    getattr(layer, register)(lambda module, *grads: seen.append(grads))
    F.cross_entropy(layer(tensors[0]).view(-1, V), TARGET).backward()
    assert len(seen) == 1 and layer.weight.grad.any()


def test_empty_and_one_dimensional():
    w = torch.randn(V, D, requires_grad=True)
    z = regfast.lazy_logits(torch.randn(D), w)
    assert_close(F.cross_entropy(z, torch.tensor(3)), F.cross_entropy(z.multiplied(), torch.tensor(3)))
    empty = regfast.lazy_logits(torch.randn(0, T, D), w)
    assert F.cross_entropy(empty.view(-1, V), torch.zeros(0).long(), reduction="sum") == 0
    assert empty.argmax(-1).shape == (0, T)


def test_head(tensors):
    layer = nn.Linear(D, V)
    true = F.cross_entropy(layer(tensors[0]).view(-1, V), TARGET)
    layer.__class__ = regfast.LazyHead
    logits = layer(tensors[0])
    assert type(logits) is LazyLogits
    assert_close(F.cross_entropy(logits.view(-1, V), TARGET), true)
    with torch.no_grad():
        assert type(layer(tensors[0])) is Tensor
    assert type(copy.deepcopy(layer)(tensors[0])) is LazyLogits
    handle = layer.register_forward_hook(lambda module, args, out: out * 2)
    assert_close(layer(tensors[0]).multiplied(), logits.multiplied() * 2)
    handle.remove()
    scripted = torch.jit.script(layer)
    assert_close(scripted(tensors[0]), logits.multiplied())


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled(dynamic, tensors):
    """One graph, in which the logits are an ordinary tensor."""
    torch._dynamo.reset()
    layer = regfast.LazyHead(D, V)

    def step(x):
        return F.cross_entropy(layer(x).float()[:, :-1].reshape(-1, V), NEXT)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    parameters = list(layer.parameters())
    assert_close(
        torch.autograd.grad(compiled(tensors[0]), parameters), torch.autograd.grad(step(tensors[0]), parameters)
    )
    torch._dynamo.reset()


def test_under_accelerate(tensors):
    with regfast.accelerate():
        both(tensors, LOSSES["as transformers"])
        both(tensors, LOSSES["nll_loss of float"])
        both(tensors, LOSSES["log-probabilities"])
        both(tensors, LOSSES["logsumexp"])
        both(tensors, OTHERS["softmax"], lazy=False)


def test_distributed_data_parallel():
    out = fresh_process("""
        import os, socket, torch, regfast
        import torch.nn.functional as F
        from torch.nn.parallel import DistributedDataParallel

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 20)

            def forward(self, x, target=None):
                logits = self.head(self.body(x))
                return logits if target is None else {"loss": F.cross_entropy(logits, target), "logits": logits}

        x, target = torch.randn(4, 8), torch.randint(20, (4,))
        for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
            model = Model()
            true = torch.autograd.grad(model(x, target)["loss"], list(model.parameters()))
            regfast.replace(model, head="head")
            parallel = DistributedDataParallel(model, **options)
            parallel(x, target)["loss"].backward()
            torch.testing.assert_close([p.grad for p in model.parameters()], list(true))
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
        try:
            F.cross_entropy(parallel(x), target).backward()
        except RuntimeError as error:
            assert "regfast.LazyLogits: expected" in str(error), error
            print("refused in words")
        torch.distributed.destroy_process_group()
    """)
    assert "refused in words" in out
