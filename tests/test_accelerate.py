"""accelerate(): torch's functions take ours where that is faster, and are themselves again afterwards."""

import functools
import importlib
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.overrides import TorchFunctionMode
from util import fresh_process

import regfast
from regfast._paths import recorded

module = sys.modules["regfast.accelerate"]
NAMES = [(place, name) for place, name, _ in module._PLACES]
ids = [f"{place.__name__}.{name}" for place, name in NAMES]
ORIGINALS = [getattr(place, name, None) for place, name in NAMES]  # linear_cross_entropy is there since torch 2.13


@pytest.fixture(autouse=True)
def restored():
    yield
    regfast.restore()
    assert all(getattr(place, name, None) is torchs for (place, name), torchs in zip(NAMES, ORIGINALS, strict=True))
    assert not {"softmax", "log_softmax", "logsumexp"} & set(vars(Tensor))


def ops(call) -> set[str]:
    """The ops of regfast whose kernels a call runs."""
    with recorded() as calls:
        call()
    return {c.op.removesuffix("_forward").removesuffix("_forward_backward") for c in calls}


X, W, B = torch.randn(128, 512), torch.randn(256, 512), torch.randn(256)
T, P = torch.randint(512, (128,)), torch.rand(128, 512).softmax(1)
# Each function, its arguments, and the op that they come to.
CALLS = {
    "linear": (lambda: F.linear(X, W, B), "linear"),
    "linear by name": (lambda: F.linear(input=X, weight=W), "linear"),
    "nn.Linear": (lambda: nn.Linear(512, 256)(X), "linear"),
    "F.softmax": (lambda: F.softmax(X, dim=-1), "softmax"),
    "F.log_softmax": (lambda: F.log_softmax(X, 1, dtype=torch.float64), "softmax"),
    "nn.Softmax": (lambda: nn.Softmax(0)(X), "softmax"),
    "torch.softmax": (lambda: torch.softmax(X, dim=0), "softmax"),
    "torch.log_softmax": (lambda: torch.log_softmax(input=X, dim=-1), "softmax"),
    "torch.special.softmax": (lambda: torch.special.softmax(X, 1), "softmax"),
    "torch.logsumexp": (lambda: torch.logsumexp(X, -1, True), "logsumexp"),
    "Tensor.softmax": (lambda: X.softmax(-1), "softmax"),
    "Tensor.log_softmax": (lambda: X.log_softmax(1), "softmax"),
    "Tensor.logsumexp": (lambda: X.logsumexp(dim=1), "logsumexp"),
    "F.cross_entropy": (lambda: F.cross_entropy(X, T, label_smoothing=0.1), "cross_entropy"),
    "F.cross_entropy by name": (lambda: F.cross_entropy(input=X, target=P, reduction="sum"), "cross_entropy"),
    "nn.CrossEntropyLoss": (lambda: nn.CrossEntropyLoss(torch.ones(512))(X, T), "cross_entropy"),
    "F.mse_loss": (lambda: F.mse_loss(X, P), "mse_loss"),
    "nn.MSELoss": (lambda: nn.MSELoss()(X, P), "mse_loss"),
}
if hasattr(F, "linear_cross_entropy"):
    CALLS["F.linear_cross_entropy"] = (lambda: F.linear_cross_entropy(X, W, T % 256), "linear_cross_entropy")


@pytest.mark.parametrize("name", CALLS)
def test_takes_ours(name, monkeypatch):
    monkeypatch.setitem(module.LINEAR, torch.float32, (1 << 10, 1 << 40))
    for table in (module.SOFTMAX, module.CROSS_ENTROPY, module.MSE_LOSS):
        monkeypatch.setitem(table, torch.float32, 1 << 10)
    call, op = CALLS[name]
    torch.manual_seed(0)
    assert ops(call) == set()
    true = (torch.manual_seed(0), call())[1]
    with regfast.accelerate():
        assert {o.split("_forward")[0] for o in ops(call)} == {op}
        torch.manual_seed(0)
        torch.testing.assert_close(call(), true, rtol=1e-5, atol=1e-4)
    assert ops(call) == set()


class Sub(Tensor):
    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Mode(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def big():
    return torch.randn(256, 512)


def test_leaves_to_torch_what_is_not_plain():
    target = torch.randint(512, (256,))
    with regfast.accelerate():
        assert ops(lambda: F.cross_entropy(big(), target)) == {"cross_entropy"}
        x = big().as_subclass(Sub)
        assert ops(lambda: F.cross_entropy(x, target)) == set()
        assert module._TORCHS[id(F.cross_entropy)] in Sub.seen
        x.softmax(1), F.softmax(x, 1), torch.softmax(x, 1), F.mse_loss(big(), x)
        theirs = module._TORCHS
        assert {theirs[id(f)] for f in (Tensor.softmax, F.softmax, torch.softmax, F.mse_loss)} <= set(Sub.seen)
        assert not any(id(f) in theirs for f in Sub.seen)
        with Mode() as mode:
            assert ops(lambda: F.cross_entropy(big(), target)) == set()
        assert module._TORCHS[id(F.cross_entropy)] in mode.seen
        with torch.device("cpu"):  # a mode too, but it watches nothing
            assert ops(lambda: F.cross_entropy(big(), target)) == {"cross_entropy"}
        assert ops(lambda: vmap(F.cross_entropy)(torch.randn(2, 256, 512), target.expand(2, -1))) == set()
        assert ops(lambda: grad(F.cross_entropy)(big(), target)) == set()
        assert ops(lambda: jvp(lambda x: F.cross_entropy(x, target), (big(),), (big(),))) == set()
        assert ops(lambda: F.cross_entropy(big().to("meta"), target.to("meta"))) == set()
        graph = torch.fx.symbolic_trace(nn.Linear(3, 4))
        nodes = torch.fx.symbolic_trace(lambda x: F.cross_entropy(x, target)).graph.nodes
        assert any(node.target is module._TORCHS[id(F.cross_entropy)] for node in nodes)
        assert graph(torch.randn(2, 3)).shape == (2, 4)


def test_small_calls_and_odd_arguments_are_torchs():
    x = torch.randn(4, 8)
    with regfast.accelerate():
        assert ops(lambda: F.softmax(x, 1)) == ops(lambda: F.cross_entropy(x, torch.zeros(4).long())) == set()
        assert ops(lambda: torch.logsumexp(big(), 1, out=torch.empty(256))) == set()
        assert ops(lambda: torch.logsumexp(big(), (0, 1))) == set()
        assert ops(lambda: torch.logsumexp(big(), axis=1)) == set()
        assert ops(lambda: big().T.contiguous().T.softmax(1)) == {"softmax"}
        assert ops(lambda: F.mse_loss(big().T, big().T)) == set()  # measured to be slower
        assert ops(lambda: F.softmax(torch.randint(9, (512, 512)), 1, dtype=torch.float32)) == set()
        assert torch.equal(torch.softmax(big().long() * 0, 0, dtype=torch.float32)[0, 0], torch.tensor(1 / 256))
        for wrong in (
            lambda: F.cross_entropy(big()),
            lambda: F.cross_entropy(big(), torch.zeros(256).long(), nonsense=1),
            lambda: torch.softmax(big()),
            lambda: torch.softmax(big(), "x", "y"),
            lambda: F.linear(big()),
            lambda: big().softmax(),
        ):
            with pytest.raises((TypeError, RuntimeError)):
                wrong()


def test_linear_follows_its_table_and_autocast(monkeypatch):
    small, x = nn.Linear(8, 8), torch.randn(64, 64)
    layer = nn.Linear(64, 64)
    monkeypatch.setitem(module.LINEAR, torch.bfloat16, (1 << 10, 1 << 20))
    monkeypatch.delitem(module.LINEAR, torch.float32, raising=False)
    with regfast.accelerate():
        assert ops(lambda: small(x[:, :8])) == ops(lambda: layer(x)) == set()
        with torch.autocast("cpu", torch.bfloat16):
            assert ops(lambda: layer(x)) == {"linear"}
            assert layer(x).dtype is torch.bfloat16
        layer.bfloat16()
        assert ops(lambda: layer(x.bfloat16())) == {"linear"}
        assert ops(lambda: layer(x.bfloat16().repeat(100, 1))) == set()  # beyond the table's end


def test_gradients():
    x, target = big().requires_grad_(), torch.randint(512, (256,))

    def step():
        loss = (
            F.cross_entropy(torch.log_softmax(x, 1) * 3, target)
            + F.mse_loss(x, torch.ones_like(x))
            + x.logsumexp(1).sum()
        )
        return torch.autograd.grad(loss * 1.7, x)[0]

    true = step()
    with regfast.accelerate():
        assert ops(step) >= {"cross_entropy", "mse_loss", "softmax", "logsumexp"}
        torch.testing.assert_close(step(), true)


def test_names_imported_before_and_after():
    before = types.ModuleType("imported_before")
    exec("from torch.nn.functional import cross_entropy, linear\nfrom torch import softmax as s", before.__dict__)
    sys.modules["imported_before"] = before
    try:
        regfast.accelerate()
        assert before.cross_entropy is F.cross_entropy is not ORIGINALS[3]
        assert before.s is torch.softmax and before.linear is F.linear
        after = types.ModuleType("imported_after")
        exec("from torch.nn.functional import cross_entropy", after.__dict__)
        sys.modules["imported_after"] = after
        held = F.cross_entropy
        regfast.restore()
        assert before.cross_entropy is after.cross_entropy is F.cross_entropy
        assert before.s is torch.softmax and module._OURS[id(before.s)]
        assert ops(lambda: held(big(), torch.zeros(256).long())) == set()  # nobody can take it from a variable
    finally:
        for name in ("imported_before", "imported_after"):
            sys.modules.pop(name, None)


def test_nested_entered_again_and_restored_from_within():
    outer = regfast.accelerate()
    with regfast.accelerate() as inner:
        assert inner is not outer
    assert module._active
    with outer, outer:
        pass
    assert not module._active
    with outer:
        assert module._active
        regfast.restore()
        assert not module._active
    assert not module._active
    outer.restore()
    with pytest.raises(ZeroDivisionError), regfast.accelerate():
        1 / 0  # noqa: B018
    assert not module._active


def test_decorator():
    @regfast.accelerate()
    def call(x, *, depth=0):
        """Words."""
        assert module._active
        return call(x, depth=depth - 1) if depth else ops(lambda: F.softmax(x, 1))

    assert not module._active
    assert call.__doc__ == "Words."
    assert call(big(), depth=2) == {"softmax"}
    assert not module._active


def test_threads():
    target, wrong = torch.zeros(256).long(), []
    barrier = threading.Barrier(4)

    def work(seed):
        try:
            barrier.wait()
            for _ in range(5):
                with regfast.accelerate():
                    if F.cross_entropy is ORIGINALS[3]:
                        wrong.append("torch's own within a block")
                    F.cross_entropy(big(), target)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not module._active


def test_what_others_have_put_there_is_left(monkeypatch):
    theirs = functools.partial(F.cross_entropy)
    monkeypatch.setattr(F, "cross_entropy", theirs)
    with regfast.accelerate():
        assert F.cross_entropy is theirs
    monkeypatch.undo()
    handle = regfast.accelerate()
    ours = F.cross_entropy
    F.cross_entropy = wrapped = lambda *a, **k: ours(*a, **k)  # over ours, and still there when ours has ended
    handle.restore()
    assert F.cross_entropy is wrapped
    assert ops(lambda: wrapped(big(), torch.zeros(256).long())) == set()
    F.cross_entropy = ORIGINALS[3]


def test_compiled():
    """One graph, ours in it while it lasts, and torch's before and after."""
    torch._dynamo.reset()
    target = torch.randint(512, (256,))
    layer = nn.Linear(512, 512)

    def step(x):
        return F.cross_entropy(F.softmax(layer(x), dim=1), target) + torch.logsumexp(x, 1).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = big().requires_grad_()
    true = torch.autograd.grad(step(x), x)[0]
    for _ in range(2):
        assert ops(lambda: compiled(x)) == set()
        with regfast.accelerate():
            assert ops(lambda: compiled(x)) >= {"cross_entropy", "softmax", "logsumexp"}
            torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], true)
    dynamic = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    with regfast.accelerate():
        torch.testing.assert_close(dynamic(x), step(x))
    torch._dynamo.reset()


def test_dynamo_first_loaded_while_ours_are_there():
    out = fresh_process("""
        import torch, regfast
        import torch.nn.functional as F
        def step(x, t):
            return F.cross_entropy(torch.softmax(x, 1), t)
        x, t = torch.randn(256, 512), torch.randint(512, (256,))
        compiled = torch.compile(step, fullgraph=True, backend="eager")
        from regfast._paths import recorded
        with regfast.accelerate():
            with recorded() as calls:
                inside = compiled(x, t)
            assert {c.op.split("_forward")[0] for c in calls} == {"softmax", "cross_entropy"}, calls
        with recorded() as calls:
            torch.testing.assert_close(inside, compiled(x, t))
        assert not calls
        print("same")
    """)
    assert out.strip() == "same"


@pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")
def test_scripts_traces_and_exports_are_torchs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(512, 512)

        def forward(self, x, t):
            z = torch.softmax(self.layer(x), 1)
            return F.cross_entropy(F.log_softmax(z, dim=1), t) + F.mse_loss(x, z)

    model, arguments = Model(), (big(), torch.randint(512, (256,)))
    true = model(*arguments)
    with regfast.accelerate():
        assert ops(lambda: model(*arguments)) >= {"cross_entropy"}
        scripted = torch.jit.script(model)
        traced = torch.jit.trace(model, arguments)
        exported = [torch.export.export(model, arguments, strict=strict) for strict in (False, True)]
    for graph in (str(scripted.inlined_graph), str(traced.inlined_graph), *(str(e.graph) for e in exported)):
        assert "regfast::" not in graph and "ops.regfast" not in graph
    for call in (scripted, traced, *(e.module() for e in exported)):
        torch.testing.assert_close(call(*arguments), true)


def test_imports_of_torch_itself_keep_their_functions():
    import torch._refs as refs

    with regfast.accelerate():
        for name, value in vars(importlib.import_module("torch._refs.nn.functional")).items():
            assert id(value) not in module._TORCHS, name
        assert refs.softmax is not torch.softmax


def test_what_a_size_alone_leaves_to_torch():
    """The question that C++ answers before any other, on both sides of each limit."""
    is_left = sys.modules["regfast._C"].is_left
    x, table = torch.ones(4, 8), {torch.float32: 32, torch.bfloat16: 1}
    assert not is_left(table, x) and is_left(table, x[1:]) and is_left({torch.float32: 33}, x)
    assert is_left(table, x.double()) and is_left(table, x.long()) and not is_left(table, x[:1].bfloat16())
    assert not is_left(table, x, None) and is_left(table, x[1:], nn.Parameter(x), None)
    products = {torch.float32: (4 * 8 * 5, 1)}
    for rows in (4, 5):
        assert is_left(products, x, torch.ones(rows, 8)) == (rows == 4)
    assert not is_left({torch.float32: (256, 1)}, x, torch.ones(8))

    class Mine(torch.Tensor):
        pass

    for others in ((x.as_subclass(Mine),), (x[1:], x.as_subclass(Mine)), (None,), (3,), (x[1:], "x"), ()):
        assert not is_left(table, *others)
    assert not is_left([], x[1:]) and not is_left()
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_left(table, x[1:])
    with torch.utils._device.DeviceContext("cpu"):
        assert not is_left(table, x[1:])
