"""linear_cross_entropy's CUDA kernels, on a GPU where there is one and emulated: values and gradients against float64
for every option and several chunks, sums over chunks, same bits, and what a call must not do."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from linear_cross_entropy_cases import (
    FLOATING,
    NAMES,
    REDUCTIONS,
    check_lce,
    combination,
    combined,
    logits_of,
    needs_torchs,
    operands,
    regfasts,
    torchs,
)
from on_cuda import PRODUCTS, WAITS, on, placed, seen
from torch import nn
from torch.testing import assert_close
from util import HALF, INF, LAYOUTS, NAN, Pool, class_targets, evaluate, lay_out, probability_targets

import regfast

pytestmark = pytest.mark.kernels("linear_cross_entropy")

ops = torch.ops.regfast
ROWS = 131  # in two chunks, of 128 rows and the rest, at a budget of one byte: the emulator takes its time for each row


def targets_of(kind, n, v, positions=(), dtype=torch.float32, ignored=0.2):
    if kind == "classes":
        return class_targets((n, *positions), v, ignored)
    return probability_targets(n, v, *positions, dtype=dtype).requires_grad_()


# Values and gradients


@pytest.mark.parametrize("mode", ("mean", "none"))
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_values_and_gradients(cuda_device, mode, kind, dtype):
    pool = Pool(dtype)
    for n, d, v in [(1, 1, 1), (5, 3, 1), (1, 17, 33), (19, 30, 129), (ROWS, 8, 19)]:
        x, w, b = operands(n, d, v, dtype)
        tensors = on(cuda_device, x, w, targets_of(kind, n, v, dtype=dtype), b)
        budget = 1 if n == ROWS else None
        check_lce(*tensors, budget=budget, reduction=mode, pool=pool, what=f"{n} {d} {v} {budget}")
    pool.check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_of_any_layout(cuda_device, layout, dtype):
    x, w, b = (lay_out(t.detach(), layout).requires_grad_() for t in operands(ROWS, 7, 11, dtype))
    for mode, bias in (("mean", b), ("none", None)):
        check_lce(*on(cuda_device, x, w, class_targets((ROWS,), 11, 0.2), bias), budget=1, reduction=mode, terms=1.0)


@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize("mode", REDUCTIONS)
def test_options_together(cuda_device, kind, mode):
    # The reduced loss of classes has its gradients from forward, the others from backward. Each pair of choices occurs.
    for i, (weighted, smoothing, z_loss, cap, positions, dtype) in enumerate(
        [
            (False, 0.0, 0.0, None, (), torch.float32),
            (True, 0.1, 0.0, None, (2,), torch.bfloat16),
            (True, 0.0, 0.1, None, (), torch.float16),
            (False, 0.1, 0.1, None, (2,), torch.float32),
            (True, 0.0, 0.0, 4.0, (2,), torch.float32),
            (False, 0.1, 0.0, 4.0, (), torch.float16),
            (False, 0.0, 0.1, 4.0, (2,), torch.bfloat16),
            (True, 0.1, 0.1, 4.0, (), torch.float64),
        ]
    ):
        x, w, b = operands(ROWS, 6, 9, dtype, positions)
        c = torch.rand(9).to(dtype) if weighted else None
        tensors = on(cuda_device, x, w, targets_of(kind, ROWS, 9, positions, dtype), b if i % 3 else None, c)
        options = {"label_smoothing": smoothing, "z_loss": z_loss, "softcap": cap, "logit_scale": 0.7 if cap else None}
        check_lce(*tensors, budget=1, reduction=mode, **options)


@pytest.mark.parametrize("names", ["lse", "entropy", ("loss", "argmax"), NAMES[::-1]], ids=str)
def test_outputs(cuda_device, names, dtype):
    for kind, positions, mode in (("classes", (2,), "mean"), ("classes", (), "none"), ("probabilities", (2,), "none")):
        x, w, b = operands(ROWS, 6, 9, dtype, positions)
        tensors = on(cuda_device, x, w, targets_of(kind, ROWS, 9, positions, dtype), b)
        # The logits of half types are rounded as F.linear's are, after which the largest may be another.
        compared = names if dtype not in HALF else [name for name in NAMES if name in names and name != "argmax"]
        if compared:
            check_lce(*tensors, budget=1, outputs=compared, reduction=mode, softcap=6.0)
        if "argmax" in names:
            chosen = regfasts(*tensors, outputs="argmax", memory_budget=1)
            exact = logits_of(*(t.detach().double() for t in (*tensors[:2], tensors[3])))
            largest = exact.gather(1, chosen.unsqueeze(1)).squeeze(1)
            assert (exact.amax(1) - largest <= torch.finfo(dtype).eps * exact.abs().amax(1)).all()
    got = regfasts(*tensors, outputs=names)
    for name, value in zip(names, got, strict=True) if isinstance(names, tuple) else [(names, got)]:
        assert value.shape == (() if name == "loss" else (ROWS, 2))
        assert value.dtype == (torch.int64 if name == "argmax" else dtype)


@pytest.mark.parametrize("positions", [(1,), (2, 3)], ids=str)
def test_more_dimensions(cuda_device, positions):
    for n, v, kind, mode in itertools.product((7, ROWS), (1, 5), ("classes", "probabilities"), ("none", "mean")):
        if n < ROWS or (v, mode) == (5, "mean"):
            x, w, b = operands(n, 4, v, positions=positions)
            check_lce(*on(cuda_device, x, w, targets_of(kind, n, v, positions), b), budget=1, reduction=mode)


@pytest.mark.parametrize("half", HALF, ids=str)
def test_half_input_with_float32_probabilities(cuda_device, half):
    # The cross-entropy is computed in float32, beside the panel of the half type that the products take.
    for mode, positions, grad in (("mean", (), False), ("sum", (2,), True), ("none", (), True), ("none", (2,), False)):
        x, w, b = operands(ROWS, 6, 9, half, positions)
        target = probability_targets(ROWS, 9, *positions).requires_grad_(grad)
        tensors = on(cuda_device, x, w, target, b)
        options = {"reduction": mode, "label_smoothing": 0.1}
        out, grads, seeds = evaluate(lambda *t, o=options: regfasts(*t, memory_budget=1, **o), tensors, None)
        exact, true_grads, _ = evaluate(lambda *t, o=options: torchs(*t, **o), tensors, seeds, torch.float64)
        assert [out[0].dtype, *(g.dtype for g in grads)] == [torch.float32] + [
            t.dtype for t in tensors if t.requires_grad
        ]
        for ours, true in zip((*out, *grads), (*exact, *true_grads), strict=True):
            assert (ours.double() - true).abs().max() <= 2 * torch.finfo(half).eps * true.abs().max()


@pytest.mark.parametrize("loss_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_loss_dtype(cuda_device, loss_dtype, dtype):
    x, w, b = operands(ROWS, 6, 9, dtype)
    tensors = on(cuda_device, x, w, class_targets((ROWS,), 9, 0.3), b)
    for mode, names in (("none", FLOATING), ("mean", "loss")):
        check_lce(*tensors, budget=1, outputs=names, loss_dtype=loss_dtype, reduction=mode)


def test_one_sample_without_batch(cuda_device, dtype):
    x, w, b = operands(None, 13, 37, dtype)
    for mode, names in itertools.product(REDUCTIONS, ("loss", FLOATING)):
        for target in (torch.tensor(5), probability_targets(37, dtype=dtype).requires_grad_()):
            check_lce(*on(cuda_device, x, w, target, b), outputs=names, reduction=mode)


def test_uint8_targets(cuda_device):
    x, w, b = operands(ROWS, 6, 200)
    target = torch.randint(200, (ROWS,), dtype=torch.uint8)
    for mode in ("mean", "none"):
        check_lce(*on(cuda_device, x, w, target, b), budget=1, ignore_index=int(target[0]), reduction=mode)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(cuda_device, layout):
    for mode, positions in (("mean", ()), ("none", ()), ("mean", (2, 2))):
        n = ROWS if mode == "mean" else 9
        x, w, b = (lay_out(t.detach(), layout).requires_grad_() for t in operands(n, 5, 9, positions=positions))
        c = lay_out(torch.rand(9), layout)
        classes = torch.stack([class_targets((n, *positions), 9, 0.3), torch.full((n, *positions), 10**9)], -1)
        probabilities = lay_out(probability_targets(n, 9, *positions), layout).requires_grad_()
        for target in (classes[..., 0], probabilities):
            check_lce(*placed(cuda_device, x, w, target, b, c), budget=1, reduction=mode, terms=1.0)


@pytest.mark.parametrize("n, d, v", [(0, 3, 5), (4, 0, 5), (0, 0, 5), (4, 3, 1)], ids=str)
@pytest.mark.parametrize("positions", [(), (2,), (0,)], ids=str)
def test_no_rows_no_features_one_class(cuda_device, n, d, v, positions):
    for mode, kind, names in itertools.product(REDUCTIONS, ("classes", "probabilities"), ("loss", FLOATING)):
        x, w, b = operands(n, d, v, positions=positions)
        tensors = on(cuda_device, x, w, targets_of(kind, n, v, positions, ignored=0), b)
        results = []
        for fn in (regfasts, torchs):
            out = fn(*tensors, outputs=names, reduction=mode)
            out = list(out) if isinstance(out, tuple) else [out]
            leaves = [t for t in tensors if t.requires_grad]
            results.append([*out, *torch.autograd.grad(out, leaves, [torch.full_like(o, 1.5) for o in out])])
        assert_close(*results, equal_nan=True)


@settings(max_examples=30)
@given(drawn=combination(140, 12, 20, 2))
def test_any_combination(cuda_device, drawn):
    tensors, options = combined(**drawn)
    check_lce(*placed(cuda_device, *tensors), **options)


# Chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_chunks_gives_the_same(cuda_device, dtype):
    n, d, v = 260, 7, 10
    x, w, b = operands(n, d, v, dtype)
    eps = torch.finfo(dtype).eps
    accumulated = torch.finfo(torch.float32).eps
    for kind, mode in itertools.product(("classes", "probabilities"), REDUCTIONS):
        tensors = on(cuda_device, x, w, targets_of(kind, n, v, dtype=dtype, ignored=0.4), b)
        results, seeds = [], None
        for budget in (1, 10**6):  # three chunks, one
            options = {"reduction": mode, "memory_budget": budget}
            fn = lambda *t, options=options: regfasts(*t, **options)  # noqa: E731
            out, grads, seeds = evaluate(fn, tensors, seeds)
            results.append([*out, *grads])
        for others in results[1:]:
            for a, one in zip(others, results[0], strict=True):
                size = one.detach().double().abs().max().item()
                distance = (a.double() - one.double()).abs().max().item()
                assert distance <= ((eps if dtype in HALF else 0) + 64 * accumulated) * size


@needs_torchs
def test_chunks_of_bfloat16_are_not_summed_in_bfloat16(cuda_device):
    # dW of all chunks is rounded once. Summed chunk by chunk in bfloat16, its error grows with their number.
    n, d, v, chunk = 1280, 12, 30, 128
    x, w, target = on(cuda_device, *operands(n, d, v, torch.bfloat16)[:2], class_targets((n,), v))
    double = w.detach().double().requires_grad_()
    exact = torch.autograd.grad(torchs(x.detach().double(), double, target), double)[0]
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    ours = torch.autograd.grad(regfasts(x, w, target, memory_budget=1), w)[0]
    theirs = torch.autograd.grad(F.linear_cross_entropy(x, w, target, options=options), w)[0]
    mine, other = ((g.double() - exact).norm() / exact.norm() for g in (ours, theirs))
    assert regfast.linear_cross_entropy_plan(n, d, v, x.dtype, "cuda", memory_budget=1).chunks == 10 and mine < other


@pytest.mark.parametrize("half", HALF, ids=str)
def test_the_mean_of_many_rows_keeps_small_gradients(cuda_device, half):
    # Those of single rows, of about 1 / (rows V), are below what a half type has: they are summed before the division.
    n, d, v = 1024, 3, 9
    x, w = (torch.randn(*s).to(half).requires_grad_() for s in ((n, d), (v, d)))
    target = class_targets((n,), v)
    x, w, target = on(cuda_device, x, w, target)
    double = w.detach().double().requires_grad_()
    exact = torch.autograd.grad(torchs(x.detach().double(), double, target), double)[0]
    ours = torch.autograd.grad(regfasts(x, w, target, memory_budget=1), w)[0]
    assert (ours.double() - exact).norm() <= 2 * torch.finfo(half).eps * exact.norm()


def test_all_ignored(cuda_device, dtype):
    for positions, smoothing in itertools.product([(), (3,)], (0.0, 0.1)):
        x, w, b = operands(ROWS, 4, 9, dtype, positions)
        x, w, target, b = on(cuda_device, x, w, torch.full((ROWS, *positions), 5), b)
        for mode in REDUCTIONS:
            loss = regfasts(x, w, target, b, ignore_index=5, label_smoothing=smoothing, reduction=mode, memory_budget=1)
            assert loss.isnan() if mode == "mean" else not loss.any()
            grads = torch.autograd.grad(loss, [x, w, b], torch.full_like(loss, 3))
            assert not any(g.any() for g in grads), mode


@pytest.mark.parametrize("bad", [NAN, INF])
def test_ignored_rows_have_no_gradient_and_no_loss(cuda_device, bad):
    # Unlike the CPU's, these kernels multiply such rows by the zeros of their gradient, so that dW is not spared.
    x, w, b = operands(ROWS, 5, 9)
    target = class_targets((ROWS,), 9, 0.4)
    ignored = target == -100
    wrong = torch.where(ignored[:, None], torch.tensor(bad), x.detach()).requires_grad_()
    for mode in REDUCTIONS:
        results = []
        for rows in (x, wrong):
            rows, *rest = on(cuda_device, rows, w, target, b)
            loss = regfasts(rows, *rest, memory_budget=1, reduction=mode)
            results.append([loss, *torch.autograd.grad(loss, [rows, rest[2]], torch.full_like(loss, 0.7))])
        assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))
        assert not results[1][1][ignored].any()


# Graphs


@pytest.mark.parametrize("names, mode", [("loss", "mean"), ("loss", "none"), (FLOATING, "sum")], ids=str)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_second_backward_through_a_retained_graph(cuda_device, names, mode, half):
    x, w, b = operands(ROWS, 5, 11, torch.bfloat16 if half else torch.float32)
    x, w, target, b = on(cuda_device, x, w, class_targets((ROWS,), 11, 0.2), b)
    out = regfasts(x, w, target, b, outputs=names, reduction=mode, memory_budget=1)
    out = [out] if isinstance(out, torch.Tensor) else list(out)
    results = []
    for scale in (1.0, -2.5):
        grads = torch.autograd.grad(out, [x, w, b], [torch.full_like(o, scale) for o in out], retain_graph=True)
        results.append([g / scale for g in grads])
        for g in grads:
            g.fill_(1e6)  # they are given away
    assert_close(*results, **({"rtol": 2**-6, "atol": 2e-2} if half else {"rtol": 1e-5, "atol": 1e-5}))


def test_inputs_are_not_changed(cuda_device, dtype):
    for kind, mode, names in itertools.product(("classes", "probabilities"), ("mean", "none"), ("loss", NAMES)):
        x, w, b = operands(9, 5, 9, dtype)
        every = on(cuda_device, x, w, targets_of(kind, 9, 9, dtype=dtype), b, torch.rand(9).to(dtype))
        before = [t.detach().clone() for t in every]
        out = regfasts(*every, reduction=mode, outputs=names, memory_budget=1)
        out = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        torch.autograd.backward(out, [torch.full_like(o, 0.3) for o in out])
        assert all(t._version == 0 and torch.equal(t.detach(), old) for t, old in zip(every, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_on_every_run(cuda_device, dtype):
    x, w, b = operands(ROWS, 9, 17, dtype)
    for kind, mode in itertools.product(("classes", "probabilities"), REDUCTIONS):
        tensors = on(cuda_device, x, w, targets_of(kind, ROWS, 17, dtype=dtype), b)
        results, seeds = [], None
        for _ in range(2):
            fn = lambda *t, mode=mode: regfasts(*t, reduction=mode, memory_budget=1, label_smoothing=0.1)  # noqa: E731
            out, grads, seeds = evaluate(fn, tensors, seeds)
            results.append([*out, *grads])
        assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


# Only what is asked for, and nothing that a GPU would have to be waited for


def calls(device, mode, kind, mask, names="loss"):
    """The ops below autograd, where the emulator's tensors are no longer known to be the CPU's."""
    x, w, b = (t.detach() for t in operands(ROWS, 5, 9))
    target = targets_of(kind, ROWS, 9).detach()
    c = torch.rand(9)
    saved = (*on(device, x, w, target, b, c), -100, REDUCTIONS.index(mode), 0.1, 0.2, None, 0.5)
    up = torch.randn(ROWS, device=device)
    total = up if mode == "none" else up[0]
    yield "forward", lambda: ops.linear_cross_entropy_forward(*saved, 31 if names != "loss" else 1, 1, None)
    if mode != "none":
        yield (
            "forward_backward",
            lambda: ops.linear_cross_entropy_forward_backward(*saved, True, 1, 0.0, None, mask[:3]),
        )
    ups = (total, up, up, up) if names != "loss" else (total, None, None, None)
    yield "backward", lambda: ops.linear_cross_entropy_backward(*ups, *saved, 1, 0.0, mask)


@pytest.mark.parametrize("mode", REDUCTIONS)
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_nothing_waits_for_the_device(cuda_device, mode, kind):
    for names in ("loss", FLOATING):
        for what, call in calls(cuda_device, mode, kind, [True, True, True, kind != "classes"], names):
            assert not WAITS & seen(call).keys(), what


def test_frozen_inputs_cost_no_product(cuda_device):
    # In each of two chunks one for the logits, by ATen or not, and ATen's for each gradient of x and w.
    for mask in itertools.product([False, True], repeat=3):
        products = {}
        for what, call in calls(cuda_device, "mean", "classes", [*mask, False]):
            counts = seen(call)
            products[what] = sum(counts.get(name, 0) for name in PRODUCTS)
        logits = products.pop("forward")
        assert logits in (0, 2) and products.keys() == {"forward_backward", "backward"}
        assert set(products.values()) == {logits + 2 * (mask[0] + mask[1])}, mask


def test_only_the_gradients_that_are_asked_for(cuda_device):
    for *mask, (names, mode) in itertools.product(*[[False, True]] * 4, [("loss", "mean"), (FLOATING, "none")]):
        x, w, b = operands(9, 4, 9)
        tensors = on(cuda_device, *(t.detach() for t in (x, w, probability_targets(9, 9), b)))
        tensors = [t.requires_grad_(wanted) for t, wanted in zip(tensors, mask, strict=True)]
        if any(mask):
            check_lce(*tensors, budget=1, outputs=names, reduction=mode)
        else:
            out = regfasts(*tensors, outputs=names, reduction=mode)
            assert not any(o.requires_grad for o in (out if isinstance(out, tuple) else (out,)))


# The plan


@pytest.mark.parametrize("n, d, v", [(0, 5, 5), (1, 1, 1), (100, 40, 1000), (5000, 64, 30000)], ids=str)
@pytest.mark.no_kernels("the plan")
def test_the_plan(n, d, v, dtype):
    last = None
    for budget in (2**40, 2**30, 2**26, 2**22, 10**6, 1):
        plan = regfast.linear_cross_entropy_plan(n, d, v, dtype, "cuda", memory_budget=budget)
        assert plan.chunks * plan.rows_per_chunk >= n > (plan.chunks - 1) * plan.rows_per_chunk or n == 0
        assert plan.rows_per_chunk % 128 == 0 or plan.chunks == 1
        assert plan.flops == 6 * n * v * d and plan.peak_bytes >= plan.rows_per_chunk * v * dtype.itemsize
        assert last is None or plan.rows_per_chunk <= last.rows_per_chunk
        assert ("fit" in plan.reason) == (plan.peak_bytes <= budget) and plan.reason in str(plan)
        assert plan.peak_bytes <= budget or plan.rows_per_chunk <= 128
        last = plan


@pytest.mark.no_kernels("the plan")
def test_the_plans_default_is_a_share_of_the_devices_memory(monkeypatch):
    plan = regfast.linear_cross_entropy_plan
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy_plan: memory_budget: expected .*, got None"):
        plan(10, 2, 3, torch.float32, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("", (), {"total_memory": 80 * 2**30}))
    whole = plan(8192, 4096, 131072, torch.bfloat16, "cuda")
    assert whole.chunks == 1 and whole == plan(8192, 4096, 131072, torch.bfloat16, "cuda", memory_budget=80 * 2**25)
    assert plan(8192, 4096, 131072, torch.float32, "cuda").chunks == 2


@pytest.mark.no_kernels("the plan")
def test_batch_chunk_size_is_the_rows_of_a_chunk(dtype):
    name = str(dtype).removeprefix("torch.")
    for chunk, v in itertools.product((1, 128, 200, 1000), (50, 3000)):
        budget = regfast._C.linear_cross_entropy_budget(chunk, 8, v, name, cuda=True)
        rounded = -(-chunk // 128) * 128
        for less, rows in ((0, rounded), (1, max(128, rounded - 128))):
            plan = regfast.linear_cross_entropy_plan(10**6, 8, v, dtype, "cuda", memory_budget=budget - less)
            assert plan.chunks == -(-(10**6) // rows)
