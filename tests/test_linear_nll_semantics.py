"""linear_nll: errors, empty inputs, graphs, what is kept in memory, same bits, the module."""

import copy
import io
import itertools
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from linear_nll_cases import REDUCTIONS, each_family, each_reduction, operands, ours, scales, targets, torchs
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from util import HALF, class_targets, evaluate, fresh_process, measures_memory, probability_targets, spiky

import regfast

pytestmark = pytest.mark.kernels("linear_nll", "linear_cross_entropy")

SIZES = [(4, 3), (40, 3), (4, 20)]  # one pass with lanes along rows, one pass, products; 40 rows
each_size = pytest.mark.parametrize("d, v", SIZES)

# Errors

X, W, T, B = torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4, 5), torch.ones(5)
# What is wrong, its arguments, and parts of what was expected and of what came.
ERRORS = {
    "features": ("input", {"input": torch.ones(4, 2)}, "last dimension 3", "[4, 2]"),
    "input without dimensions": ("input", {"input": torch.tensor(1.0)}, "last dimension 3", "[]"),
    "integer input": ("input", {"input": X.long()}, "floating", "Long"),
    "weight of one dimension": ("weight", {"weight": torch.ones(3)}, "2 dimensions", "[3]"),
    "weight of three": ("weight", {"weight": torch.ones(5, 1, 3)}, "2 dimensions", "[5, 1, 3]"),
    "weight dtype": ("weight", {"weight": W.double()}, "Float as input has", "Double"),
    "bias shape": ("bias", {"bias": torch.ones(4)}, "[5]", "[4]"),
    "bias of two dimensions": ("bias", {"bias": torch.ones(5, 1)}, "[5]", "[5, 1]"),
    "bias dtype": ("bias", {"bias": B.half()}, "Float as input has", "Half"),
    "target without its last dimension": ("target", {"target": torch.ones(4)}, "[4, 5]", "[4]"),
    "transposed target": ("target", {"target": T.T}, "[4, 5]", "[5, 4]"),
    "target that would broadcast": ("target", {"target": torch.ones(4, 1)}, "[4, 5]", "[4, 1]"),
    "complex target": ("target", {"target": T.cfloat()}, "real", "ComplexFloat"),
    "target elsewhere": ("target", {"target": T.to("meta")}, "cpu as input is on", "meta"),
    "weights of samples and outputs": ("sample_weight", {"sample_weight": T}, "each row, shape [4]", "[4, 5]"),
    "one weight for all samples": ("sample_weight", {"sample_weight": torch.ones(1)}, "each row, shape [4]", "[1]"),
    "weights' dtype": ("sample_weight", {"sample_weight": torch.ones(4).long()}, "a floating point type", "Long"),
    "sigma of two dimensions": ("sigma", {"sigma": T + 1}, "[] or [5]", "[4, 5]"),
    "sigma of one": ("sigma", {"sigma": torch.ones(1)}, "[] or [5]", "[1]"),
    "pos_weight's dtype": (
        "pos_weight",
        {"pos_weight": torch.ones(5).int(), "family": "bernoulli"},
        "a floating point type",
        "Int",
    ),
    "pos_weight's shape": ("pos_weight", {"pos_weight": X[0], "family": "bernoulli"}, "[] or [5]", "[3]"),
}
VALUE_ERRORS = {
    "family": ("family", {"family": "gamma"}, "gaussian, bernoulli, poisson, categorical", "'gamma'"),
    "squared": ("family", {"family": "squared"}, "one of", "'squared'"),
    "reduction": ("reduction", {"reduction": "median"}, "none, mean, sum", "'median'"),
    "reduction's type": ("reduction", {"reduction": None}, "none, mean, sum", "None"),
    "zero sigma": ("sigma", {"sigma": 0.0}, "a positive number", "0.0"),
    "negative sigma": ("sigma", {"sigma": -1}, "a positive number", "-1"),
    "infinite sigma": ("sigma", {"sigma": float("inf")}, "a positive number", "inf"),
    "sigma that is no number": ("sigma", {"sigma": float("nan")}, "a positive number", "nan"),
    "sigma in words": ("sigma", {"sigma": "learned"}, "a positive number or a tensor", "'learned'"),
    "sigma of poisson": ("sigma", {"sigma": 1.0, "family": "poisson"}, "None for family poisson", "1.0"),
    "pos_weight of gaussian": ("pos_weight", {"pos_weight": B}, "None for family gaussian", "tensor"),
    "full bernoulli": ("full", {"full": True, "family": "bernoulli"}, "no constant", "True"),
}
NO_TENSORS = ("input", "weight", "target", "bias", "sample_weight", "pos_weight")


def wrong_call(changes):
    return regfast.linear_nll(**{"input": X, "weight": W, "target": T, "bias": B, "family": "gaussian"} | changes)


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.no_kernels("errors")
def test_errors_say_what_was_expected_and_what_came(case, requires_grad):
    argument, changes, expected, got = ERRORS[case]
    with pytest.raises((RuntimeError, NotImplementedError)) as error:
        wrong_call(({"bias": B.clone().requires_grad_()} if requires_grad else {}) | changes)
    message = str(error.value)
    assert f"regfast.linear_nll: {argument}: expected" in message
    assert expected in message.partition(": expected")[2] and got in message.partition(", got ")[2]


@pytest.mark.parametrize("case", VALUE_ERRORS)
@pytest.mark.no_kernels("errors")
def test_errors_of_options(case):
    argument, changes, expected, got = VALUE_ERRORS[case]
    with pytest.raises(ValueError) as error:
        wrong_call(changes)
    message = str(error.value)
    assert f"regfast.linear_nll: {argument}: expected" in message and expected in message
    assert got in message.partition(", got ")[2]


@pytest.mark.parametrize("name", NO_TENSORS)
@pytest.mark.no_kernels("errors")
def test_what_is_no_tensor(name):
    changes = {name: [[1.0]]} | ({"family": "bernoulli"} if name == "pos_weight" else {})
    with pytest.raises(TypeError, match=rf"regfast\.linear_nll: {name}: expected a Tensor, got list"):
        wrong_call(changes)
    if name != "pos_weight":
        with pytest.raises(TypeError, match=rf"regfast\.linear_mse_loss: {name}: expected a Tensor, got list"):
            regfast.linear_mse_loss(**{"input": X, "weight": W, "target": T} | {name: [[1.0]]})


@pytest.mark.no_kernels("errors")
def test_a_column_against_a_row_is_an_error():
    # Where F.mse_loss makes N x N residuals of (N, 1) and (N,) and warns, if it is heard.
    x, w, y = spiky(6, 2), spiky(1, 2), spiky(6)
    with pytest.raises(RuntimeError, match=r"regfast\.linear_mse_loss: target: expected .*\[6, 1\], got \[6\]"):
        regfast.linear_mse_loss(x, w, y)
    with pytest.raises(RuntimeError, match=r"regfast\.linear_mse_loss: target: expected .*\[6\], got"):
        regfast.linear_mse_loss(x.flatten()[:2], spiky(6, 2), y[:, None])


# Without elements


@each_family
@pytest.mark.parametrize("n, d, v", [(0, 3, 2), (0, 3, 20), (4, 0, 2), (4, 0, 20), (0, 0, 2), (4, 3, 0)], ids=str)
def test_no_rows_no_features_no_outputs(family, n, d, v):
    x, w, b = operands((n,), d, v)
    scale = scales(family, v)[-1]
    for weights, mode in itertools.product((None, torch.rand(n)), REDUCTIONS):
        results = []
        for fn in (ours, torchs):
            loss = fn(x, w, targets(family, n, v), b, scale, weights, family=family, reduction=mode)
            leaves = [x, w, b] + ([scale] if scale is not None and scale.requires_grad else [])
            results.append([loss, *torch.autograd.grad(loss, leaves, torch.full_like(loss, 1.5))])
            torch.manual_seed(0)
        if n:
            assert_close([r.shape for r in results[0]], [r.shape for r in results[1]])
        if n == 0 or v == 0:
            assert_close(*results, equal_nan=True)
            assert mode != "mean" or results[0][0].isnan()


# Graphs


@each_family
@each_size
@each_reduction
def test_second_backward_through_a_retained_graph(family, d, v, mode, dtype):
    # The first backward gives its gradients away. The user may write on them; the second must not see it.
    x, w, b = operands((40,), d, v, dtype)
    for scale in (1.0, -2.5):
        loss = ours(x, w, targets(family, 40, v, dtype=dtype), b, family=family, reduction=mode)
        seed = torch.full_like(loss, scale)
        first = torch.autograd.grad(loss, [x, w, b], seed, retain_graph=True)
        kept = [g.clone() for g in first]
        for g in first:
            g.fill_(1e3)
        second = torch.autograd.grad(loss, [x, w, b], seed, retain_graph=True)
        third = torch.autograd.grad(loss, [x, w, b], 2 * seed)
        tolerance = {"rtol": 2**-7, "atol": 1e-3} if dtype in HALF else {"rtol": 1e-5, "atol": 1e-4}
        assert_close(second, tuple(kept), **tolerance)
        assert_close(third, tuple(2 * g for g in kept), **tolerance)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, [x, w, b], seed)


def test_gradients_accumulate_in_leaves_and_only_there():
    # .grad of the first step is ours to keep, so the second step's sum must not be written into what a graph still has.
    x, w, b = operands((40,), 4, 3)
    sigma = torch.rand(3).add(0.5).requires_grad_()
    loss = ours(x, w, targets("gaussian", 40, 3), b, sigma, family="gaussian")
    loss.backward(retain_graph=True)
    once = [t.grad.clone() for t in (x, w, b, sigma)]
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close([t.grad for t in (x, w, b, sigma)], [3 * g for g in once])


@each_family
@each_size
def test_inputs_are_not_changed(family, d, v, dtype):
    for mode, scale in itertools.product(REDUCTIONS, scales(family, v, dtype)):
        t, weights = targets(family, 40, v, dtype=dtype), torch.rand(40).to(dtype)
        every = [*operands((40,), d, v, dtype), t, weights, *([scale] if isinstance(scale, torch.Tensor) else [])]
        before = [tensor.detach().clone() for tensor in every]
        loss = ours(*every[:2], t, every[2], scale, weights, family=family, reduction=mode)
        loss.backward(torch.full_like(loss, 0.3))
        for tensor, old in zip(every, before, strict=True):
            assert tensor._version == 0 and torch.equal(tensor.detach(), old)


@each_family
@each_size
@each_reduction
def test_losses_without_gradients_are_the_same(family, d, v, mode):
    x, w, b = operands((40,), d, v)
    t = targets(family, 40, v)
    true = ours(x, w, t, b, family=family, reduction=mode)
    frozen = ours(x.detach(), w.detach(), t, b.detach(), family=family, reduction=mode)
    with torch.no_grad():
        without = ours(x, w, t, b, family=family, reduction=mode)
    with torch.inference_mode():
        inference = ours(x, w, t, b, family=family, reduction=mode)
    for value in (frozen, without, inference):
        assert not value.requires_grad
        assert_close(value, true.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    x, w, b = operands((40,), 4, 3)
    t = targets("poisson", 40, 3)
    for mode in ("mean", "none"):
        results = []
        fn = lambda *v, mode=mode: ours(v[0].tanh(), v[1], t, v[2], family="poisson", reduction=mode)  # noqa: E731
        for value in (fn(x, w, b), checkpoint(fn, x, w, b, use_reentrant=reentrant)):
            value.sum().backward()
            results.append([leaf.grad for leaf in (x, w, b)])
            x.grad = w.grad = b.grad = None
        assert_close(*results)


def test_one_tensor_in_several_places():
    # An autoencoder with its own rows as weights: the gradient is the sum of both places'.
    x, t = spiky(12, 5, dtype=torch.float64).requires_grad_(), spiky(12, 12, dtype=torch.float64)
    for mode in ("mean", "none"):
        seed = torch.randn(12, 12) if mode == "none" else torch.tensor(1.3)
        losses = [fn(x, x, t, family="squared", reduction=mode) for fn in (ours, torchs)]
        assert_close(*(torch.autograd.grad(loss, x, seed.double()) for loss in losses))


# Memory


@each_family
@each_size
@pytest.mark.parametrize("mode, frozen", list(itertools.product(REDUCTIONS, (False, True))))
def test_predictions_are_not_saved(family, d, v, mode, frozen):
    # What a graph keeps beside input and target is no larger than a weight, and nothing at all of a frozen input.
    n = 300
    x, w, b = operands((n,), d, v)
    x.requires_grad_(not frozen)
    t, kept = targets(family, n, v), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda s: kept.setdefault(s.data_ptr(), s) is None or s, lambda s: s):
        loss = ours(x, w, t, b, family=family, reduction=mode)
    assert {x.data_ptr(), t.data_ptr()} <= set(kept)
    others = [s.numel() for s in kept.values() if s.data_ptr() not in (x.data_ptr(), t.data_ptr())]
    assert max(others, default=0) <= v * d
    loss.backward(torch.ones_like(loss))
    assert (x.grad is None) == frozen


PEAK = """
    import torch, regfast
    from pathlib import Path
    def status(name):
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
    def step(n, d, v, dtype, **options):
        x, w, y = torch.randn(n, d).to(dtype), torch.zeros(v, d, dtype=dtype, requires_grad=True), torch.rand(n, v)
        y, b = y.to(dtype), torch.zeros(v, dtype=dtype, requires_grad=True)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        regfast.linear_nll(x, w, y, b, **options).backward()
        return status("VmHWM") - before
    f32, bf16 = torch.float32, torch.bfloat16
    for family in ("gaussian", "bernoulli", "poisson"):
        for n, d, v, dtype in ((120_000, 4, 256, f32), (120_000, 4, 256, bf16), (4 * 10**6, 4, 8, f32)):
            step(40, d, v, dtype, family=family)
            print(v, step(n, d, v, dtype, family=family))
"""


@measures_memory
@pytest.mark.no_kernels("another process")
def test_peak_memory_has_no_room_for_all_predictions():
    # 117 MiB of them. A chunk's take what linear_cross_entropy's take; a few outputs' none at all.
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this kernel does not reset the high-water mark")
    budget = regfast.linear_cross_entropy_plan(10**7, 4, 256, torch.float32).peak_bytes
    for line in fresh_process(PEAK, MALLOC_MMAP_THRESHOLD_="65536").splitlines():
        outputs, used = map(int, line.split())
        allowed = (budget if outputs > 8 else 0) + 12 * 2**20
        assert used <= allowed, f"{outputs} outputs: {used / 2**20:.1f} MiB used, {allowed / 2**20:.1f} allowed"


# Same bits


@each_family
@each_reduction
@pytest.mark.parametrize("n, d, v", [(9000, 4, 3), (9000, 40, 3), (1000, 4, 20), (130, 300, 77)], ids=str)
def test_same_bits_on_every_run_and_with_any_number_of_threads(family, mode, n, d, v, dtype, threads):
    x, w, b = operands((n,), d, v, dtype)
    t, weights, scale = targets(family, n, v, dtype=dtype), torch.rand(n).to(dtype), scales(family, v, dtype)[-1]
    results, seeds = [], None
    for count in (2, 2, 1):
        torch.set_num_threads(count)
        fn = lambda *tensors: ours(*tensors, family=family, reduction=mode)  # noqa: E731
        out, grads, seeds = evaluate(fn, [x, w, t, b, scale, weights], seeds)
        results.append([*out, *grads])
    for again in results[1:]:
        assert all(map(torch.equal, results[0], again))


# Classes


@each_reduction
def test_categorical_is_linear_cross_entropy(mode, dtype):
    x, w, b = operands((40,), 7, 9, dtype)
    for target in (class_targets((40,), 9), class_targets((40,), 9, 0.3), probability_targets(40, 9, dtype=dtype)):
        options = {"family": "categorical", "reduction": mode}
        got = regfast.linear_nll(x, w, target, b, **options)
        true = regfast.linear_cross_entropy(x, w, target, linear_bias=b, reduction=mode)
        assert torch.equal(got, true)
        seed = torch.randn_like(true)
        assert all(map(torch.equal, *(torch.autograd.grad(v, [x, w, b], seed) for v in (got, true))))
        # Weights of one change nothing, ignored rows or not; others are those of each row.
        tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 1e-6}
        ones = regfast.linear_nll(x, w, target, b, sample_weight=torch.ones(40, dtype=dtype), **options)
        assert_close(ones, true, **tolerance)
        weights = torch.rand(40).to(dtype)
        got = regfast.linear_nll(x, w, target, b, sample_weight=weights, **options)
        each = regfast.linear_cross_entropy(x, w, target, linear_bias=b, reduction="none").double() * weights
        kept = weights.double() * (target != -100 if target.dim() == 1 else 1)
        wanted = {"none": each, "sum": each.sum(), "mean": each.sum() / kept.sum()}[mode]
        assert_close(got, wanted.to(dtype), **tolerance)


@pytest.mark.no_kernels("errors")
def test_errors_of_classes():
    x, w = spiky(4, 3), spiky(5, 3)
    for weights in (torch.ones(1), torch.ones(4, 5), torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match=r"regfast\.linear_nll: sample_weight: expected one .*\(4,\), got"):
            regfast.linear_nll(x, w, torch.tensor([0, 1, 2, 3]), family="categorical", sample_weight=weights)


# The module


MODULES = [
    {"family": "gaussian"},
    {"family": "gaussian", "sigma": 0.7, "full": False, "reduction": "sum"},
    {"family": "gaussian", "sigma": torch.tensor([0.5, 0.6, 0.7]), "eps": 0.3},
    {"family": "gaussian", "sigma": "learned"},
    {"family": "bernoulli", "pos_weight": torch.tensor([1.0, 2.0, 3.0]), "bias": False},
    {"family": "poisson", "full": True, "reduction": "none", "loss_dtype": torch.float64},
    {"family": "categorical"},
]
each_module = pytest.mark.parametrize("options", MODULES, ids=str)


def module_arguments(options):
    family = options["family"]
    target = class_targets((40,), 3) if family == "categorical" else targets(family, 40, 3)
    return spiky(40, 7), target, torch.rand(40)


@each_module
def test_the_module_is_the_function_of_its_layer(options):
    torch.manual_seed(1)
    module = regfast.LinearNLLLoss(7, 3, **options)
    torch.manual_seed(1)
    layer = nn.Linear(7, 3, options.get("bias", True))
    assert_close(list(module.linear.parameters()), list(layer.parameters()), rtol=0, atol=0)
    given = {name: value for name, value in options.items() if name != "bias" and value is not None}
    if isinstance(given.get("sigma"), str):
        assert torch.equal(module.sigma, torch.ones(3))
        given["sigma"] = torch.ones(3)
    x, target, weights = module_arguments(options)
    for extra in ((), (weights,)):
        true = regfast.linear_nll(
            x, module.linear.weight, target, module.linear.bias, **given, sample_weight=extra[0] if extra else None
        )
        assert torch.equal(module(x, target, *extra), true)


@each_module
def test_copies_and_state_of_the_module(options):
    module = regfast.LinearNLLLoss(7, 3, **options)
    x, target, weights = module_arguments(options)
    true = module(x, target, weights)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    twins = copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(stream, weights_only=False)
    for twin in twins:
        assert repr(twin) == repr(module)
        assert torch.equal(twin(x, target, weights), true)
    fresh = regfast.LinearNLLLoss(7, 3, **options)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x, target, weights), true)
    learned = isinstance(options.get("sigma"), str)
    assert ("log_sigma" in module.state_dict()) == learned
    assert {name for name, _ in module.named_parameters()} == (
        {"linear.weight"}
        | ({"linear.bias"} if options.get("bias", True) else set())
        | ({"log_sigma"} if learned else set())
    )
    assert f"family={options['family']}" in repr(module) and "Linear(in_features=7" in repr(module)
    wide = copy.deepcopy(module).double()
    assert wide(x.double(), target, weights.double()).dtype == torch.float64
    assert all(t.dtype == torch.float64 for t in wide.state_dict().values())


def test_factory_arguments_of_the_module():
    half = regfast.LinearNLLLoss(7, 3, dtype=torch.bfloat16, family="gaussian", sigma="learned")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    loss = half(spiky(40, 7, dtype=torch.bfloat16), spiky(40, 3, dtype=torch.bfloat16))
    loss.backward()
    assert loss.dtype == torch.bfloat16 and all(p.grad.dtype == torch.bfloat16 for p in half.parameters())
    meta = regfast.LinearNLLLoss(7, 3, device="meta", family="gaussian", sigma="learned")
    assert meta(torch.empty(4, 7, device="meta"), torch.empty(4, 3, device="meta")).shape == ()
    with pytest.warns(UserWarning, match="zero-element"):
        assert regfast.LinearNLLLoss(0, 3, family="gaussian", sigma="learned").log_sigma.shape == (3,)


@pytest.mark.parametrize(
    "name, options",
    [
        ("family", {"family": "gamma"}),
        ("sigma", {"family": "gaussian", "sigma": "fixed"}),
        ("sigma", {"family": "gaussian", "sigma": -1.0}),
        ("sigma", {"family": "poisson", "sigma": "learned"}),
        ("pos_weight", {"family": "poisson", "pos_weight": torch.ones(3)}),
        ("full", {"family": "categorical", "full": True}),
        ("reduction", {"family": "poisson", "reduction": "median"}),
    ],
    ids=str,
)
@pytest.mark.no_kernels("errors")
def test_errors_of_the_module(name, options):
    with pytest.raises(ValueError, match=rf"regfast\.LinearNLLLoss: {name}: expected .*, got "):
        regfast.LinearNLLLoss(7, 3, **options)


def test_a_learned_sigma_becomes_the_noise():
    # Maximum likelihood: sigma^2 is the mean squared residual, of each output.
    noise, x = torch.tensor([0.3, 1.0, 2.0]), torch.randn(2000, 4)
    y = x @ torch.randn(4, 3) + 0.5 + noise * torch.randn(2000, 3)
    module = regfast.LinearNLLLoss(4, 3, family="gaussian", sigma="learned")
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = module(x, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    residuals = (y - module.linear(x)).detach()
    assert_close(module.sigma.detach(), residuals.square().mean(0).sqrt(), rtol=1e-3, atol=0)
    assert_close(module.sigma.detach(), noise, rtol=0.05, atol=0)
    least_squares = torch.linalg.lstsq(torch.cat([x, torch.ones(2000, 1)], 1), y).solution
    assert_close(module.linear.weight.detach(), least_squares[:4].T, rtol=1e-2, atol=1e-3)
    # The log-likelihood of that maximum in closed form.
    wanted = (module.sigma.log() + 0.5 * torch.log(torch.tensor(2 * torch.pi)) + 0.5).mean()
    assert_close(module(x, y), wanted, rtol=1e-4, atol=1e-5)


def test_a_model_trains_as_with_torch():
    results = []
    for regfasts in (True, False):
        torch.manual_seed(1)
        module = regfast.LinearNLLLoss(6, 2, family="poisson")
        x, y = spiky(64, 6, size=1) / 3, torch.poisson(torch.rand(64, 2) * 3)
        optimizer, losses = torch.optim.SGD(module.parameters(), lr=0.1), []
        for _ in range(30):
            optimizer.zero_grad()
            loss = module(x, y) if regfasts else F.poisson_nll_loss(module.linear(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results.append(torch.tensor(losses))
    assert_close(*results)
