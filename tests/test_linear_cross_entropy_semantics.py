"""linear_cross_entropy: errors, empty inputs, graphs, derivatives, compilers, autocast, module, options, plan."""

import copy
import itertools
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_linear_cross_entropy import FLOATING, NAMES, REDUCTIONS, needs_torchs, operands, regfasts, torchs
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap
from torch.library import opcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from util import HALF, assert_same_error, class_targets, fresh_process, probability_targets, spiky

import regfast
from regfast import reference

ops = torch.ops.regfast
OPTIONS = getattr(nn, "LinearCrossEntropyOptions", None)
LOSS, LSE, ENTROPY, LOGPROB, ARGMAX = (1 << bit for bit in range(5))


# Errors

X, W, T = torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4, dtype=torch.int64)
P = torch.full((4, 5), 0.2)
K = torch.ones(5, 2, 3)  # K-dimensional weights
ERRORS = {
    "class above": ("target", (X, W, T + 5), {}),
    "class below": ("target", (X, W, T - 1), {}),
    "class with smoothing": ("target", (X, W, T + 7), {"label_smoothing": 0.1, "reduction": "none"}),
    "class with weight": ("target", (X, W, T + 5), {"weight": torch.ones(5)}),
    "class of one sample": ("target", (X[0], W, torch.tensor(9)), {}),
    "class with more dimensions": ("target", (X, K, torch.full((4, 2), 7)), {}),
    "class with another ignore_index": ("target", (X, W, T - 100), {"ignore_index": 2}),
    "batch": ("target", (X, W, T[:3]), {}),
    "target of two dimensions": ("target", (X, W, T.view(2, 2)), {}),
    "target shape": ("target", (X, K, torch.zeros(4, 3, dtype=torch.int64)), {}),
    "int32": ("target", (X, W, T.int()), {}),
    "bool": ("target", (X, W, T.bool()), {}),
    "float classes": ("target", (X, W, T.float()), {}),
    "integer probabilities": ("target", (X, W, torch.zeros(4, 5, dtype=torch.int64)), {}),
    "probabilities of other classes": ("target", (X, W, torch.rand(4, 6)), {}),
    "input of three dimensions": ("input", (X[None], W, T), {}),
    "input without dimensions": ("input", (torch.tensor(1.0), W, T), {}),
    "weights of one dimension": ("linear_weight", (X, W[0], T), {}),
    "features": ("linear_weight", (X, torch.ones(5, 4), T), {}),
    "one sample of a K-dimensional loss": ("input", (X[0], K, T[:2]), {}),
    "bias shape": ("linear_bias", (X, W, T), {"linear_bias": torch.ones(4)}),
    "bias of K dimensions": (
        "linear_bias",
        (X, K, torch.zeros(4, 2, dtype=torch.int64)),
        {"linear_bias": torch.ones(5)},
    ),
    "weights dtype": ("linear_weight", (X, W.double(), T), {}),
    "bias dtype": ("linear_bias", (X, W, T), {"linear_bias": torch.ones(5).double()}),
    "weight too short": ("weight", (X, W, T), {"weight": torch.ones(4)}),
    "weight of two dimensions": ("weight", (X, W, T), {"weight": torch.ones(5, 1)}),
    "weight dtype": ("weight", (X, W, T), {"weight": torch.ones(5).double()}),
    "weight dtype for bf16": ("weight", (X.bfloat16(), W.bfloat16(), T), {"weight": torch.ones(5)}),
    "weight with gradient": (
        "weight",
        (X.clone().requires_grad_(), W, T),
        {"weight": torch.ones(5, requires_grad=True)},
    ),
    "reduction": ("reduction", (X, W, T), {"reduction": "median"}),
    "label_smoothing": ("label_smoothing", (X, W, T), {"label_smoothing": 1.5}),
    "ignore_index for probabilities": ("ignore_index", (X, W, P), {"ignore_index": 0}),
    "-100 for probabilities": ("ignore_index", (X, W, P), {"ignore_index": -100}),
    "no tensor for weights": ("linear_weight", (X, None, T), {}),
}


@needs_torchs
@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_torchs_and_say_more(case):
    argument, arguments, options = ERRORS[case]
    if case == "no tensor for weights":
        with pytest.raises(TypeError, match=r"regfast\.linear_cross_entropy: linear_weight: expected .*, got NoneType"):
            regfast.linear_cross_entropy(*arguments)
        return
    assert_same_error(
        lambda: regfast.linear_cross_entropy(*arguments, **options),
        lambda: F.linear_cross_entropy(*arguments, **options),
        "linear_cross_entropy",
        f": {argument}: expected",
    )


@pytest.mark.parametrize(
    "option",
    [
        {"outputs": "prob"},
        {"outputs": ()},
        {"outputs": ("loss", "loss")},
        {"memory_budget": 0},
        {"memory_budget": -5},
        {"softcap": 0.0},
        {"softcap": -1.0},
        {"filter_eps": -1e-9},
    ],
    ids=str,
)
def test_errors_of_further_options(option):
    (name,) = option
    for leaf in (X, X.clone().requires_grad_()):
        with pytest.raises(ValueError, match=rf"regfast\.linear_cross_entropy: {name}: expected .*, got "):
            regfast.linear_cross_entropy(leaf, W, T, **option)


def test_an_error_computes_nothing_and_leaves_the_next_call_alone():
    # The bad class is the last of many chunks: it is refused before the first of them is computed.
    x, w, b = operands(2000, 1, 3)
    target = class_targets((2000,), 3)
    target[-1] = 3
    seen = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with seen, pytest.raises(IndexError, match=r"Target 3 is out of bounds"):
        regfasts(x, w, target, b, memory_budget=1)
    assert not {"aten::mm", "aten::addmm", "aten::narrow"} & {event.key for event in seen.key_averages()}
    assert all(t.grad is None for t in (x, w, b))
    target[-1] = 2
    assert_close(regfasts(x, w, target, b), torchs(x, w, target, b))


# Without elements


@pytest.mark.parametrize("n, d, v", [(0, 3, 5), (4, 0, 5), (0, 0, 5), (4, 3, 1)], ids=str)
@pytest.mark.parametrize("positions", [(), (2,), (0,)], ids=str)
def test_no_rows_no_features_one_class(n, d, v, positions):
    x, w, b = operands(n, d, v, positions=positions)
    for mode, target in itertools.product(
        REDUCTIONS, (torch.zeros(n, *positions, dtype=torch.int64), torch.full((n, v, *positions), 1.0 / v))
    ):
        ours, theirs = (fn(x, w, target, b, reduction=mode) for fn in (regfasts, torchs))
        assert_close(ours, theirs, equal_nan=True)
        seed = torch.full_like(ours, 1.5)
        assert_close(*(torch.autograd.grad(loss, [x, w, b], seed) for loss in (ours, theirs)), equal_nan=True)


# Graphs


@pytest.mark.parametrize(
    "names, mode", [("loss", "mean"), ("loss", "sum"), ("loss", "none"), (FLOATING, "mean")], ids=str
)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_second_backward_through_a_retained_graph(names, mode, half):
    # The first backward gives its gradients away. The user may write on them; the second must not see it.
    x, w, b = operands(40, 7, 21, torch.bfloat16 if half else torch.float32)
    target = probability_targets(40, 21, dtype=x.dtype).requires_grad_()
    for scale, budget in itertools.product((1.0, -2.5), (None, 1)):
        out = regfasts(x, w, target, b, outputs=names, reduction=mode, memory_budget=budget)
        out = [out] if isinstance(out, torch.Tensor) else list(out)
        seeds = [torch.full_like(o, scale) for o in out]
        first = torch.autograd.grad(out, [x, w, b, target], seeds, retain_graph=True)
        kept = [g.clone() for g in first]
        for g in first:
            g.fill_(1e6)
        second = torch.autograd.grad(out, [x, w, b, target], seeds, retain_graph=True)
        third = torch.autograd.grad(out, [x, w, b, target], [2 * s for s in seeds])
        tolerance = {"rtol": 2**-7, "atol": 1e-4} if half else {"rtol": 1e-5, "atol": 1e-6}
        assert_close(second, tuple(kept), **tolerance)
        assert_close(third, tuple(2 * g for g in kept), **tolerance)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(out, [x, w, b, target], seeds)


def test_gradients_accumulate_in_leaves_and_only_there():
    # .grad of the first step is ours to keep, so the second step's sum must not be written into what a graph still has.
    x, w, b = operands(40, 7, 21)
    target = class_targets((40,), 21, 0.3)
    loss = regfasts(x, w, target, b)
    loss.backward(retain_graph=True)
    once = [t.grad.clone() for t in (x, w, b)]
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close([t.grad for t in (x, w, b)], [3 * g for g in once])


@pytest.mark.parametrize("seed", [0.0, 1.0, -3.0, 1e-4])
def test_a_scalar_grad_output(seed):
    x, w, b = operands(40, 7, 21)
    target = class_targets((40,), 21, 0.3)
    for mode in ("mean", "sum"):
        ours, true = (
            torch.autograd.grad(fn(x, w, target, b, reduction=mode), [x, w, b], torch.tensor(seed))
            for fn in (regfasts, torchs)
        )
        assert_close(ours, true, rtol=1e-4, atol=1e-6)


def test_inputs_are_not_changed(dtype):
    for probabilities, mode, names in itertools.product((False, True), REDUCTIONS, ("loss", NAMES)):
        x, w, b = operands(40, 7, 21, dtype)
        c = torch.rand(21).to(dtype)
        target = probability_targets(40, 21, dtype=dtype) if probabilities else class_targets((40,), 21, 0.3)
        every = [x, w, b, c, target]
        before = [t.detach().clone() for t in every]
        out = regfasts(x, w, target, b, c, reduction=mode, outputs=names, memory_budget=1, filter_eps=1e-3)
        out = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        torch.autograd.backward(out, [torch.full_like(o, 0.3) for o in out])
        assert all(t._version == 0 and torch.equal(t.detach(), old) for t, old in zip(every, before, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    x, w, b = operands(40, 7, 21)
    target = class_targets((40,), 21, 0.3)
    for mode in ("mean", "none"):
        fn = lambda *t, mode=mode: regfasts(t[0].tanh(), t[1], target, t[2], reduction=mode, memory_budget=1)  # noqa: E731
        values = [fn(x, w, b), checkpoint(fn, x, w, b, use_reentrant=reentrant)]
        results = [torch.autograd.grad(v.sum(), [x, w, b]) for v in values] if not reentrant else []
        if reentrant:  # which works with .backward() alone
            for value in values:
                value.sum().backward()
                results.append([t.grad for t in (x, w, b)])
                x.grad = w.grad = b.grad = None
        assert_close(*results)


def test_logits_are_not_saved():
    # What a graph keeps beside inputs: the gradients of a number, nothing for more outputs.
    x, w, b = operands(300, 8, 500)
    target = class_targets((300,), 500)
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
    ):
        for names, mode in (("loss", "mean"), ("loss", "none"), (FLOATING, "mean")):
            regfasts(x, w, target, b, outputs=names, reduction=mode)
    assert sizes and max(sizes.values()) <= 500 * 8


# Derivatives, in float64

CLASSES = class_targets((4,), 6, 0.3)
CLASSES[0] = 2
WEIGHT = torch.rand(6, dtype=torch.float64) + 0.1
PIXELS = class_targets((3, 2), 5, 0.2)
CASES = {
    **{
        f"classes {mode}": (
            lambda m, x, w, b, mode=mode: m(x, w, CLASSES, linear_bias=b, weight=WEIGHT, reduction=mode),
            lambda: operands(4, 3, 6, torch.float64),
        )
        for mode in REDUCTIONS
    },
    "pixels": (
        lambda m, x, w, b: m(x, w, PIXELS, linear_bias=b, label_smoothing=0.1, z_loss=0.2),
        lambda: operands(3, 3, 5, torch.float64, (2,)),
    ),
    "probabilities": (
        lambda m, x, w, b, t: m(x, w, t, linear_bias=b, label_smoothing=0.2, weight=WEIGHT),
        lambda: [*operands(4, 3, 6, torch.float64), probability_targets(4, 6, dtype=torch.float64).requires_grad_()],
    ),
    "one sample": (
        lambda m, x, w: m(x, w, torch.tensor(2), softcap=3.0),
        lambda: operands(None, 3, 5, torch.float64)[:2],
    ),
    "everything": (
        lambda m, x, w, b: m(
            x, w, CLASSES, linear_bias=b, weight=WEIGHT, z_loss=0.2, softcap=3.0, logit_scale=0.7, outputs=FLOATING
        ),
        lambda: operands(4, 3, 6, torch.float64),
    ),
}
cases = pytest.mark.parametrize("name", CASES)


def bound(name, module=regfast):
    fn, make = CASES[name]

    def call(*arguments):
        result = fn(module.linear_cross_entropy, *arguments)
        return result if isinstance(result, torch.Tensor) else tuple(result)

    return call, make()


def scalar(fn):
    """A weighted sum of all outputs, so that no grad_output is all ones."""

    def call(*arguments):
        parts = fn(*arguments)
        parts = (parts,) if isinstance(parts, torch.Tensor) else parts
        return sum(
            (p * torch.arange(1.0, 1 + p.numel()).to(p).view(p.shape)).sum() * (1 + i) for i, p in enumerate(parts)
        )

    return call


def close(ours, true):
    assert_close(ours, true, rtol=1e-9, atol=1e-11)


@cases
def test_first_and_second_derivatives(name):
    fn, arguments = bound(name)
    assert torch.autograd.gradcheck(fn, arguments, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(fn, arguments, atol=1e-4)
    plain, _ = bound(name, reference)
    results = []
    for f in (fn, plain):
        first = torch.autograd.grad(scalar(f)(*arguments), arguments, create_graph=True)
        assert all(g.requires_grad for g in first)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), arguments)])
    close(*results)


@cases
def test_forward_mode_and_transforms(name):
    torch.manual_seed(6)
    fn, arguments = bound(name)
    plain, _ = bound(name, reference)
    arguments = tuple(a.detach() for a in arguments)
    tangents = tuple(torch.randn_like(a) for a in arguments)
    close(jvp(fn, arguments, tangents), jvp(plain, arguments, tangents))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, t) for a, t in zip(arguments, tangents, strict=True)]
        for ours, true in zip(*(r if isinstance(r, tuple) else (r,) for r in (fn(*duals), plain(*duals))), strict=True):
            close(forward_ad.unpack_dual(ours).tangent, forward_ad.unpack_dual(true).tangent)
    every = tuple(range(len(arguments)))
    close(grad(scalar(fn), every)(*arguments), grad(scalar(plain), every)(*arguments))
    close(jacrev(fn, every)(*arguments), jacrev(plain, every)(*arguments))
    batches = [torch.stack([a, a * 0.5, a - 0.1]) for a in arguments]
    ours = vmap(fn)(*batches)
    each = [fn(*sample) for sample in zip(*batches, strict=True)]
    close(
        ours, torch.stack(each) if isinstance(ours, torch.Tensor) else tuple(map(torch.stack, zip(*each, strict=True)))
    )
    per_sample = torch.stack([grad(scalar(fn))(*sample) for sample in zip(*batches, strict=True)])
    close(vmap(grad(scalar(fn)))(*batches), per_sample)


# Compilers


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@cases
def test_full_graph(name):
    fn, arguments = bound(name)
    ours, plain = torch.compile(scalar(fn), fullgraph=True, backend="aot_eager"), scalar(fn)
    assert_close(ours(*arguments), plain(*arguments))
    assert_close(*(torch.autograd.grad(f(*arguments), arguments, torch.tensor(1.7)) for f in (ours, plain)))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("options", [{}, {"outputs": FLOATING, "reduction": "none"}], ids=["loss", "everything"])
def test_dynamic_shapes_compile_once(options):
    graphs, counts = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def fn(x, w, t):
        out = regfast.linear_cross_entropy(x, w, t, label_smoothing=0.1, **options)
        return out if isinstance(out, torch.Tensor) else sum((o * (1 + i)).sum() for i, o in enumerate(out))

    ours = torch.compile(fn, fullgraph=True, backend=backend, dynamic=True)
    for n, d, v in ((5, 7, 9), (8, 3, 4), (40, 33, 65)):
        x, w, _ = operands(n, d, v)
        target = class_targets((n,), v, 0.3)
        values = [f(x, w, target) for f in (ours, fn)]
        assert_close(*values)
        assert_close(*(torch.autograd.grad(value, [x, w], torch.tensor(-1.5)) for value in values))
        counts.append(len(graphs))
    assert counts == counts[:1] * 3


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(9, 8)
        self.loss = regfast.LinearCrossEntropyLoss(8, 7, bias=True, label_smoothing=0.1)

    def forward(self, x, target):
        return self.loss(self.body(x), target)


def test_export(tmp_path):
    model, rows = Head(), torch.export.Dim("rows", min=2)
    example = spiky(12, 9), class_targets((12,), 7, 0.2)
    program = torch.export.export(model, example, dynamic_shapes=({0: rows}, {0: rows}))
    torch.export.save(program, tmp_path / "head.pt2")
    loaded = torch.export.load(tmp_path / "head.pt2")
    for n in (12, 5):
        x, target = spiky(n, 9), class_targets((n,), 7, 0.2)
        assert_close(program.module()(x, target), model(x, target))
        assert_close(loaded.module()(x, target), model(x, target))


def test_meta_tensors_and_fake_results_have_the_right_shapes():
    x, w, b = operands(6, 5, 4, positions=(3,))
    for target, mode, names in itertools.product(
        (class_targets((6, 3), 4), probability_targets(6, 4, 3)), REDUCTIONS, ("loss", NAMES)
    ):
        real = regfasts(x, w, target, b, outputs=names, reduction=mode)
        meta = regfasts(
            *(t.detach().to("meta").requires_grad_() for t in (x, w)),
            target.to("meta"),
            b.detach().to("meta"),
            outputs=names,
            reduction=mode,
        )
        for ours, true in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (meta, real)), strict=True):
            assert (ours.shape, ours.dtype, ours.stride()) == (true.shape, true.dtype, true.stride())
            assert ours.is_meta and ours.requires_grad == true.requires_grad


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize(
    "mode, outputs", [(m, o) for m in (0, 1) for o in (LOSS, LSE | ENTROPY | LOGPROB | ARGMAX, LOSS | ARGMAX)]
)
def test_opcheck(mode, outputs, requires_grad):
    x, w, b = (t.detach().requires_grad_(requires_grad) for t in operands(20, 4, 6, positions=(2,)))
    options = (-100, mode, 0.1, 0.2, None, 0.7, outputs, 1, 0.0, None)
    opcheck(ops.linear_cross_entropy.default, (x, w, class_targets((20, 2), 6, 0.2), b, torch.rand(6), *options))
    target = probability_targets(20, 6, 2).requires_grad_(requires_grad)
    opcheck(ops.linear_cross_entropy.default, (x, w, target, None, None, *options))


@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
def test_opcheck_of_forward_and_backward(probabilities, dtype):
    tests = ("test_schema", "test_faketensor")
    x, w, b = (t.detach() for t in operands(20, 4, 6, dtype))
    target = probability_targets(20, 6, dtype=dtype) if probabilities else class_targets((20,), 6, 0.2)
    saved = (x, w, target, b, torch.rand(6).to(dtype), -100, 1, 0.1, 0.2, None, 0.5)
    opcheck(ops.linear_cross_entropy_forward.default, (*saved, 31, 1, None), test_utils=tests)
    for mask in ([True, True, True, probabilities], [False, True, False, False]):
        opcheck(
            ops.linear_cross_entropy_forward_backward.default, (*saved, True, 1, 1e-4, None, mask), test_utils=tests
        )
        seeds = (torch.tensor(0.7).to(dtype), *(spiky(20, dtype=dtype) for _ in range(3)))
        opcheck(ops.linear_cross_entropy_backward.default, (*seeds, *saved, 1, 0.0, mask), test_utils=tests)


# Autocast


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("given_dtype", [torch.float32, *HALF], ids=str)
def test_autocast_has_the_dtypes_of_linear_and_cross_entropy(half, given_dtype):
    x, w, b = (t.detach().requires_grad_() for t in operands(40, 9, 21, given_dtype))
    w, b = w.detach().float().requires_grad_(), b.detach().float().requires_grad_()
    classes, probabilities = class_targets((40,), 21, 0.3), probability_targets(40, 21).requires_grad_()
    for target, mode, c in itertools.product((classes, probabilities), REDUCTIONS, (None, torch.rand(21))):
        leaves = [t for t in (x, w, b, target) if t.requires_grad]
        results = []
        for fn in (regfasts, torchs):
            with torch.autocast("cpu", dtype=half):
                loss = fn(x, w, target, b, c, reduction=mode)
            seed = torch.linspace(-1, 2, loss.numel()).view(loss.shape).to(loss)
            results.append((loss, *torch.autograd.grad(loss, leaves, seed)))
        for ours, true in zip(*results, strict=True):
            assert ours.dtype == true.dtype
            eps = torch.finfo(half).eps
            size = max(1.0, true.detach().abs().max().item())
            assert_close(ours.double(), true.double(), rtol=16 * eps, atol=8 * eps * size)


# The module

MODULES = {
    "plain": {},
    "bias": {"bias": True},
    "K-dimensional": {"bias": True, "out_features": (2, 3)},
    "options": {"weight": torch.rand(5), "reduction": "sum", "ignore_index": 3, "label_smoothing": 0.1},
}


@needs_torchs
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES.keys())
def test_the_module_is_torchs(options):
    ours, theirs = regfast.LinearCrossEntropyLoss(7, 5, **options), nn.LinearCrossEntropyLoss(7, 5, **options)
    assert isinstance(ours, nn.LinearCrossEntropyLoss) and repr(ours) == repr(theirs)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    ours.load_state_dict(theirs.state_dict())
    x = spiky(6, 7).requires_grad_()
    target = class_targets((6, *options.get("out_features", ())), 5, 0.2, options.get("ignore_index", -100))
    values = []
    for module in (ours, theirs, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        loss = module(x, target)
        values.append([loss, *torch.autograd.grad(loss, [x, *module.parameters()], torch.tensor(0.7))])
    for other in values[1:]:
        assert_close(other, values[0])


def test_the_module_passes_every_further_option():
    options = {
        "z_loss": 0.1,
        "softcap": 5.0,
        "logit_scale": 0.5,
        "outputs": ("lse", "loss"),
        "loss_dtype": torch.float64,
    }
    module = regfast.LinearCrossEntropyLoss(7, 5, memory_budget=1, filter_eps=1e-6, reduction="none", **options)
    x, target = spiky(40, 7), class_targets((40,), 5, 0.2)
    true = regfasts(x, module.linear.weight, target, reduction="none", **options)
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        got = twin(x, target)
        assert got._fields == ("lse", "loss") and got.loss.dtype == torch.float64
        assert_close(tuple(got), tuple(true))
    half = regfast.LinearCrossEntropyLoss(7, 5, weight=torch.rand(5), dtype=torch.bfloat16).to(torch.bfloat16)
    assert half(x.bfloat16(), target).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match=r"regfast\.LinearCrossEntropyLoss: weight: expected .*, got"):
        regfast.LinearCrossEntropyLoss(7, 5, weight=torch.rand(4))
    with pytest.raises(RuntimeError, match=r"regfast\.LinearCrossEntropyLoss: label_smoothing: expected .*, got"):
        regfast.LinearCrossEntropyLoss(7, 5, label_smoothing=-0.1)


@pytest.mark.parametrize("mode", REDUCTIONS)
def test_weights_tied_with_an_embedding(mode):
    # The shared gradient sums the lookup's and the head's over several backwards.
    embedding, head = nn.Embedding(30, 8), regfast.LinearCrossEntropyLoss(8, 30, reduction=mode, memory_budget=1)
    head.linear.weight = embedding.weight
    assert len({id(p) for p in (*embedding.parameters(), *head.parameters())}) == 1
    true = embedding.weight.detach().clone().requires_grad_()
    for step in range(3):
        tokens, target = torch.randint(30, (50,)), class_targets((50,), 30, 0.2)
        head(embedding(tokens).tanh(), target).sum().mul(1 + step).backward()
        loss = F.cross_entropy(F.embedding(tokens, true).tanh() @ true.T, target, reduction=mode)
        loss.sum().mul(1 + step).backward()
        assert_close(embedding.weight.grad, true.grad, rtol=1e-4, atol=1e-5)


# Options and the plan


@needs_torchs
def test_torchs_options_are_taken():
    x, w, b = operands(200, 8, 50)
    target = class_targets((200,), 50, 0.2)
    true = regfasts(x, w, target, b)
    for options in (OPTIONS(), *(OPTIONS(batch_chunk_size=chunk, acc_policy="compact") for chunk in (1, 16, 50, 500))):
        loss = regfasts(x, w, target, b, options=options)
        assert_close(loss, true)
        assert_close(*(torch.autograd.grad(v, [x, w, b], retain_graph=v is true) for v in (loss, true)))
    module = regfast.LinearCrossEntropyLoss(8, 50, options=OPTIONS(batch_chunk_size=32))
    assert "batch_chunk_size=32" in repr(module)
    assert_close(module(x, target), regfasts(x, module.linear.weight, target))


def test_batch_chunk_size_is_the_rows_of_a_chunk(dtype):
    name = str(dtype).removeprefix("torch.")
    for chunk, d, v in itertools.product((1, 16, 50, 128, 1000), (8, 700), (50, 3000)):
        budget = regfast._C.linear_cross_entropy_budget(chunk, d, v, name)
        plan = regfast.linear_cross_entropy_plan(100_000, d, v, dtype, memory_budget=budget)
        rounded = -(-chunk // 16) * 16
        # In equal parts, so perhaps a little less.
        assert rounded - 16 <= plan.rows_per_chunk <= rounded and plan.rows_per_chunk >= min(16, chunk)
        fewer = regfast.linear_cross_entropy_plan(100_000, d, v, dtype, memory_budget=int(budget * 0.9) - 64)
        assert fewer.rows_per_chunk < rounded or rounded == 16


@pytest.mark.parametrize(
    "n, d, v", [(0, 5, 5), (1, 1, 1), (100, 40, 1000), (300, 40, 1000), (5000, 64, 30000)], ids=str
)
def test_the_plan(n, d, v, dtype):
    small = regfast.linear_cross_entropy_plan(100, 8, 50, dtype)
    assert small.chunks == 1 and small.rows_per_chunk == 100 and "1 chunk" in str(small)
    last = None
    for budget in (None, 2**30, 2**26, 2**22, 10**6, 2**17, 1):
        plan = regfast.linear_cross_entropy_plan(n, d, v, dtype, memory_budget=budget)
        assert plan.chunks * plan.rows_per_chunk >= n > (plan.chunks - 1) * plan.rows_per_chunk or n == 0
        assert plan.flops == 6 * n * v * d and plan.peak_bytes >= plan.rows_per_chunk * v * 4
        assert str(plan.chunks) in str(plan) and plan.reason in str(plan) and plan.path
        if budget is None:
            continue
        assert last is None or (plan.rows_per_chunk <= last.rows_per_chunk and plan.peak_bytes <= last.peak_bytes)
        last = plan
        if plan.peak_bytes > budget:
            # The budget is exceeded where chunks are the smallest there are, and then the reason says so.
            assert plan.rows_per_chunk <= 16 and "fit" not in plan.reason
        else:
            assert "fit" in plan.reason


def test_errors_of_the_plan():
    plan = regfast.linear_cross_entropy_plan
    for sizes in ((-1, 2, 3), (1, -2, 3), (1, 2, -3)):
        with pytest.raises(ValueError, match=r"regfast\.linear_cross_entropy_plan: [NDV]: expected at least 0, got -"):
            plan(*sizes, torch.float32)
    for budget in (0, -1):
        with pytest.raises(ValueError, match=rf"memory_budget: expected .* got {budget}"):
            plan(1, 2, 3, torch.float32, memory_budget=budget)
    for arguments in ((torch.int64,), (torch.complex64,), (torch.float32, "meta")):
        with pytest.raises(NotImplementedError, match=r"regfast\.linear_cross_entropy_plan: expected .*, got"):
            plan(1, 2, 3, *arguments)


PEAK = """
    import torch, regfast
    from pathlib import Path
    def status(name):
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
    def step(n, d, v, dtype):
        torch.manual_seed(0)
        x, w = torch.randn(n, d).to(dtype).requires_grad_(), (torch.randn(v, d) / 8).to(dtype).requires_grad_()
        b, target = torch.zeros(v, dtype=dtype, requires_grad=True), torch.randint(v, (n,))
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        regfast.linear_cross_entropy(x, w, target, linear_bias=b, memory_budget={budget}).backward()
        return status("VmHWM") - before
    step(40, 8, 50, {dtype})
    n, d, v = {size}
    grads = ((n + v) * d + v) * 4  # float32 until backward rounds them
    plan = regfast.linear_cross_entropy_plan(n, d, v, {dtype}, memory_budget={budget})
    print(step(n, d, v, {dtype}) - grads, plan.peak_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads memory from Linux's /proc")
@pytest.mark.parametrize(
    "dtype, budget", [(torch.float32, None), (torch.float32, 2**24), (torch.bfloat16, None)], ids=str
)
def test_peak_memory_is_what_the_plan_says(dtype, budget):
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this kernel does not reset the high-water mark")
    size = (2048, 64, 50000) if budget is None else (512, 64, 50000)
    used, planned = map(int, fresh_process(PEAK.format(dtype=dtype, budget=budget, size=size)).split())
    allowed = max(0.25 * planned, 12 * 2**20)
    assert abs(used - planned) <= allowed, f"{used / 2**20:.1f} MiB used, {planned / 2**20:.1f} MiB planned"
