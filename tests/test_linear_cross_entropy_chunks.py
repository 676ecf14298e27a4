"""linear_cross_entropy: chunks, ignored rows, gradients that are not asked for, same bits, the plan and its memory."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from linear_cross_entropy_cases import (
    BUDGETS,
    FLOATING,
    NAMES,
    REDUCTIONS,
    check_at_budgets,
    check_lce,
    each_reduction,
    each_target,
    logits_of,
    modes_and_budgets,
    needs_torchs,
    operands,
    regfasts,
    targets,
    torchs,
)
from torch import nn
from torch.testing import assert_close
from util import HALF, INF, NAN, class_targets, evaluate, fresh_process, measures_memory, probability_targets

import regfast

pytestmark = pytest.mark.kernels("linear_cross_entropy")

# Chunks


def budget_for(chunks, n, d, v, dtype):
    """A budget that divides n rows into so many chunks."""
    for exponent in range(1280):
        budget = int(2 ** (exponent / 32))
        if regfast.linear_cross_entropy_plan(n, d, v, dtype, memory_budget=budget).chunks == chunks:
            return budget
    raise AssertionError(f"no budget makes {chunks} chunks of {n} rows")


@each_reduction
@each_target
def test_any_number_of_chunks_gives_the_same(mode, probabilities, dtype):
    n, d, v = 150, 24, 300
    x, w, b = operands(n, d, v, dtype)
    c = torch.rand(v).to(dtype)
    eps = torch.finfo(dtype).eps
    accumulated = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for ignored in (0.5,) if probabilities else (0.0, 0.5):
        target = targets(probabilities, n, v, dtype=dtype, ignored=ignored)
        results, seeds = [], None
        for chunks in (1, 2, 5, 10):
            options = {"memory_budget": budget_for(chunks, n, d, v, dtype), "reduction": mode, "label_smoothing": 0.1}
            fn = lambda *t, options=options: regfasts(*t, **options)  # noqa: E731
            out, grads, seeds = evaluate(fn, [x, w, target, b, c], seeds)
            results.append([*out, *grads])
        for others in results[1:]:
            for a, one in zip(others, results[0], strict=True):
                # One rounding of the result apart at most, and what sums in another order differ by.
                size = one.detach().double().abs().max().item()
                distance = (a.double() - one.double()).abs().max().item()
                rounding = eps if dtype in HALF else 0
                assert distance <= (rounding + 64 * accumulated) * size


@needs_torchs
@pytest.mark.parametrize("n", [256, 1024])
def test_chunks_of_bfloat16_are_not_summed_in_bfloat16(n):
    # dW of 16 or 64 chunks is rounded once. Summed chunk by chunk in bfloat16, its error grows with their number.
    x, w, _ = operands(n, 48, 700, torch.bfloat16)
    target = class_targets((n,), 700)
    exact = torch.autograd.grad(torchs(x.double(), w.double(), target), w)[0]
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=16)
    chunked = [
        regfasts(x, w, target, memory_budget=1),
        F.linear_cross_entropy(x, w, target, options=options),
    ]
    ours, theirs = ((torch.autograd.grad(v, w)[0].double() - exact).norm() / exact.norm() for v in chunked)
    assert ours < theirs
    # Half an ulp at most, a third of half an ulp on average: what one rounding leaves.
    assert ours < 0.25 * torch.finfo(torch.bfloat16).eps


def test_mean_of_many_rows():
    # A float32 running sum of 2**21 losses loses digits; partial sums do not.
    n = 2**21
    x, w = torch.linspace(-1, 1, n)[:, None], torch.tensor([[1.0], [0.0]])
    target = torch.arange(n) % 2
    assert abs(regfasts(x, w, target).double() - torchs(x.double(), w.double(), target)) < 1e-6


# Ignored rows


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"outputs": ("loss", "logprob")}], ids=str
)
def test_ignored_rows_reach_nothing(bad, options, dtype):
    # NaN of an ignored row times a zero gradient was NaN in dW. dX of such rows is 0 without a sign of what was there.
    x, w, b = operands(60, 9, 30, dtype)
    target = class_targets((60,), 30, 0.4)
    ignored = target == -100
    wrong = torch.where(ignored[:, None], torch.tensor(bad, dtype=dtype), x.detach()).requires_grad_()
    for mode, budget in modes_and_budgets():
        results = []
        for rows in (x, wrong):
            out = regfasts(rows, w, target, b, memory_budget=budget, reduction=mode, **options)
            out = list(out) if isinstance(out, tuple) else [out]
            seeds = [torch.linspace(3, 9, o.numel()).view(o.shape).to(o) / (1 + 9 * i) for i, o in enumerate(out)]
            results.append([*out, *torch.autograd.grad(out, [rows, w, b], seeds)])
        assert all(map(torch.equal, *results))
        dx = results[1][-3]
        assert not dx[ignored].any() and dx[~ignored].any(1).all()


def test_ignored_rows_keep_the_outputs_that_do_not_need_a_target():
    x, w, b = operands(40, 7, 21)
    target = class_targets((40,), 21, 0.5)
    logits = logits_of(x, w, b)
    for budget in BUDGETS:
        got = regfasts(x, w, target, b, outputs=NAMES, reduction="none", memory_budget=budget)
        assert_close(got.lse, torch.logsumexp(logits, 1))
        assert torch.equal(got.argmax, logits.argmax(1)) and (got.entropy > 0).all()
        assert not got.loss[target == -100].any() and not got.logprob[target == -100].any()
        # argmax beside a reduced loss comes from the pass that writes the gradients.
        assert torch.equal(regfasts(x, w, target, b, outputs=("loss", "argmax")).argmax, got.argmax)


@pytest.mark.parametrize("positions", [(), (3,)], ids=str)
def test_all_ignored(positions, dtype):
    # torch's policy: the mean of nothing is NaN; none and sum are 0 with gradient 0.
    x, w, b = operands(40, 7, 21, dtype, positions)
    target = torch.full((40, *positions), 5)
    for smoothing, budget in itertools.product((0.0, 0.1), BUDGETS):
        options = {"ignore_index": 5, "label_smoothing": smoothing, "memory_budget": budget}
        assert regfasts(x, w, target, b, **options).isnan()
        for mode in ("none", "sum"):
            loss = regfasts(x, w, target, b, reduction=mode, **options)
            assert not loss.any()
            assert not any(g.any() for g in torch.autograd.grad(loss.sum() * 3, [x, w, b]))


def test_rows_and_positions_that_take_no_part():
    # The rows that take part are gathered: none of one chunk's, a part of another's, rows with some of their positions.
    for positions in ((), (3,)):
        x, w, b = operands(64, 7, 21, positions=positions)
        target = targets(False, 64, 21, positions, ignored=0.6 if positions else 0.0)
        target[16:40] = -100
        for mode in REDUCTIONS:
            check_at_budgets(x, w, target, b, torch.rand(21), reduction=mode, label_smoothing=0.1)


def test_mean_counts_valid_rows_only():
    # The mean was over all rows, and a test compared the loss with itself.
    x, w = torch.zeros(4, 3), torch.zeros(8, 3)
    target = torch.tensor([1, -100, -100, 2])
    c = torch.tensor([1, 0.5, 1.5, 1, 1, 1, 1, 1])
    for budget in BUDGETS:
        assert_close(regfasts(x, w, target, None, c, memory_budget=budget), torch.tensor(8.0).log())
        loss = regfasts(x, w, target, None, c, reduction="sum", memory_budget=budget)
        assert_close(loss, 2 * torch.tensor(8.0).log())


# Only what is asked for


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_the_gradients_that_are_asked_for(mask):
    for names, mode, budget in itertools.product(("loss", FLOATING), ("mean", "none"), BUDGETS):
        tensors = *operands(40, 7, 21), probability_targets(40, 21)
        x, w, b, target = leaves = [t.detach().requires_grad_(m) for t, m in zip(tensors, mask, strict=True)]
        out = regfasts(x, w, target, b, memory_budget=budget, outputs=names, reduction=mode)
        out = [out] if isinstance(out, torch.Tensor) else list(out)
        assert all(o.requires_grad == any(mask) for o in out)
        if any(mask):
            torch.autograd.backward(out, [torch.full_like(o, 0.5) for o in out])
        assert [t.grad is not None for t in leaves] == list(mask)
        check_lce(x, w, target, b, budget=budget, outputs=names, reduction=mode)


def test_losses_without_gradients():
    # The pass without gradients and the one with them give the same number.
    x, w, b = operands(40, 7, 21)
    target = targets(False, 40, 21)
    for mode, budget in modes_and_budgets():
        options = {"reduction": mode, "memory_budget": budget, "label_smoothing": 0.1}
        true = regfasts(x, w, target, b, **options)
        frozen = regfasts(*(t.detach() for t in (x, w)), target, b.detach(), **options)
        with torch.no_grad():
            without = regfasts(x, w, target, b, **options)
        with torch.inference_mode():
            inference = regfasts(x, w, target, b, **options)
        for value in (frozen, without, inference):
            assert not value.requires_grad
            assert_close(value, true.detach(), rtol=1e-6, atol=1e-7)
            assert_close(value, torchs(x, w, target, b, reduction=mode, label_smoothing=0.1).detach())


@pytest.mark.parametrize("frozen", [False, True])
def test_logits_are_not_saved(frozen):
    # What a graph keeps beside inputs: the gradients of a number, none for a frozen weight, nothing for more outputs.
    x, w, b = operands(300, 8, 500)
    w.requires_grad_(not frozen)
    target = class_targets((300,), 500)
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
    ):
        for names, mode in (("loss", "mean"), ("loss", "none"), (FLOATING, "mean")):
            regfasts(x, w, target, b, outputs=names, reduction=mode)
    sizes.pop(w.data_ptr(), None)
    assert sizes and max(sizes.values()) <= (300 if frozen else 500) * 8


# Same bits


@each_reduction
@each_target
def test_same_bits_on_every_run_and_with_any_number_of_threads(mode, probabilities, dtype, threads):
    n, d, v = 130, 40, 777
    x, w, b = operands(n, d, v, dtype)
    target = targets(probabilities, n, v, dtype=dtype)
    for budget in (None, budget_for(3, n, d, v, dtype)):
        options = {"memory_budget": budget, "reduction": mode, "label_smoothing": 0.1}
        results, seeds = [], None
        for count in (2, 2, 1):
            torch.set_num_threads(count)
            fn = lambda *t, options=options: regfasts(*t, **options)  # noqa: E731
            out, grads, seeds = evaluate(fn, [x, w, target, b], seeds)
            results.append([*out, *grads])
        for again in results[1:]:
            assert all(map(torch.equal, results[0], again)), f"at {budget}"


# The plan


@needs_torchs
def test_torchs_options_are_taken():
    x, w, b = operands(200, 8, 50)
    target = class_targets((200,), 50, 0.2)
    made, true = nn.LinearCrossEntropyOptions, regfasts(x, w, target, b)
    for options in (made(), *(made(batch_chunk_size=chunk, acc_policy="compact") for chunk in (1, 16, 50, 500))):
        loss = regfasts(x, w, target, b, options=options)
        assert_close(loss, true)
        assert_close(*(torch.autograd.grad(v, [x, w, b], retain_graph=v is true) for v in (loss, true)))
    module = regfast.LinearCrossEntropyLoss(8, 50, options=made(batch_chunk_size=32))
    assert "batch_chunk_size=32" in repr(module)
    assert_close(module(x, target), regfasts(x, module.linear.weight, target))


@pytest.mark.no_kernels("the plan")
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


# No rows, features or classes; one of everything; some rows; a vocabulary.
PLANNED = [(0, 5, 5), (4, 0, 5), (4, 3, 0), (1, 1, 1), (100, 40, 1000), (300, 40, 1000), (5000, 64, 30000)]


@pytest.mark.parametrize("n, d, v", PLANNED, ids=str)
@pytest.mark.no_kernels("the plan")
def test_the_plan(n, d, v, dtype):
    last = None
    for budget in (None, 2**30, 2**26, 2**22, 10**6, 2**17, 1):
        plan = regfast.linear_cross_entropy_plan(n, d, v, dtype, memory_budget=budget)
        assert plan.chunks * plan.rows_per_chunk >= n > (plan.chunks - 1) * plan.rows_per_chunk or n == 0
        assert plan.flops == 6 * n * v * d and plan.peak_bytes >= plan.rows_per_chunk * v * 4
        assert f"{plan.chunks} chunks of {plan.rows_per_chunk} rows" in str(plan)
        assert plan.reason in str(plan) and plan.path in str(plan)
        if budget is None:
            continue
        assert last is None or (plan.rows_per_chunk <= last.rows_per_chunk and plan.peak_bytes <= last.peak_bytes)
        last = plan
        if plan.peak_bytes > budget:
            # The budget is exceeded where chunks are the smallest there are, and then the reason says so.
            assert plan.rows_per_chunk <= 16 and "fit" not in plan.reason
        else:
            assert "fit" in plan.reason


@pytest.mark.no_kernels("errors")
def test_errors_of_the_plan():
    plan = regfast.linear_cross_entropy_plan
    for sizes in ((-1, 2, 3), (1, -2, 3), (1, 2, -3)):
        with pytest.raises(ValueError, match=r"regfast\.linear_cross_entropy_plan: [NDV]: expected at least 0, got -"):
            plan(*sizes, torch.float32)
    for sizes in ((2**62, 1, 1), (2**70, 0, 0), (2**30, 2**29, 5), (3, 2**29, 2**29), (2**40, 3, 2**20)):
        with pytest.raises(ValueError, match=r"N, D, V: expected matrices of less than 2\*\*58 numbers, got "):
            plan(*sizes, torch.float32)
    for sizes in ((2**57, 1, 1), (2**40, 3, 2**17), (3, 2**29, 2**28)):
        assert 0 < plan(*sizes, torch.float32).peak_bytes < 2**63
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
    def step(n, d, v, dtype, budget):
        torch.manual_seed(0)
        x, w = torch.randn(n, d).to(dtype).requires_grad_(), (torch.randn(v, d) / 8).to(dtype).requires_grad_()
        b, target = torch.zeros(v, dtype=dtype, requires_grad=True), torch.randint(v, (n,))
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        regfast.linear_cross_entropy(x, w, target, linear_bias=b, memory_budget=budget).backward()
        return status("VmHWM") - before
    n, d, v = 700, 32, 50000
    for dtype, budget in ((torch.float32, 2**24), (torch.bfloat16, 2**26), (torch.float32, None)):
        step(40, 8, 50, dtype, budget)
        grads = ((n + v) * d + v) * 4  # float32 until backward rounds them
        plan = regfast.linear_cross_entropy_plan(n, d, v, dtype, memory_budget=budget)
        print(step(n, d, v, dtype, budget) - grads, plan.peak_bytes)
"""


@measures_memory
@pytest.mark.no_kernels("another process")
def test_peak_memory_is_what_the_plan_says():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this kernel does not reset the high-water mark")
    # With its threshold given, malloc returns what is freed, and nothing is kept of large results, so that no call
    # finds memory of the one before.
    for line in fresh_process(PEAK, MALLOC_MMAP_THRESHOLD_="65536", REGFAST_POOL="0").splitlines():
        used, planned = map(int, line.split())
        allowed = max(0.25 * planned, 12 * 2**20)
        assert abs(used - planned) <= allowed, f"{used / 2**20:.1f} MiB used, {planned / 2**20:.1f} MiB planned"


@pytest.mark.no_kernels("asks for plans alone")
def test_without_a_budget_chunks_of_a_small_weight_fit_the_caches():
    plan = regfast.linear_cross_entropy_plan(65536, 784, 10, torch.float32)
    assert plan.chunks > 1 and plan.peak_bytes < 16 << 20 and "cache" in plan.reason
    given = regfast.linear_cross_entropy_plan(65536, 784, 10, torch.float32, memory_budget=1 << 30)
    assert given.chunks == 1 and "all logits fit" in given.reason
    large = regfast.linear_cross_entropy_plan(65536, 784, 10000, torch.float32)
    assert "cache" not in large.reason
