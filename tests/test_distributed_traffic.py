"""What the vocabulary-parallel losses send, for every set of options and outputs, and what runs while it travels."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import ranks as here
import torch
import torch.distributed as dist
from util import class_targets, probability_targets

if not dist.is_available():
    pytest.skip("this build of PyTorch has no distributed", allow_module_level=True)

from regfast.distributed import chunks, groups, vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from regfast.reference import OUTPUTS

ROWS, FEATURES, CLASSES = 128, 3, 5  # classes: of each rank
NO_TRAFFIC = {"z_loss": 0.1, "softcap": 5.0, "logit_scale": 0.5}  # what sends nothing of its own


@contextmanager
def counted():
    """The bytes of each collective of torch.distributed, by its name."""
    sent: list[tuple[str, int]] = []

    def counting(name, call):
        def counted_call(tensor, *args, **kwargs):
            sent.append((name, tensor.nbytes))
            return call(tensor, *args, **kwargs)

        return counted_call

    names = ("all_reduce", "broadcast", "all_gather", "all_gather_object", "barrier", "all_to_all", "gather", "scatter")
    of_rows = {name: counting(name, getattr(groups, name)) for name in ("_gather", "_reduce_scatter")}
    of_all = {name: counting(name, getattr(dist, name)) for name in names}
    with patch.multiple(dist, **of_all), patch.multiple(groups, **of_rows):
        yield sent


def sets_of_options() -> list[tuple[set[str], bool, bool, bool]]:
    """Outputs, and whether there are class weights, smoothing and probabilities."""
    outputs = [set(c) for n in range(1, 6) for c in itertools.combinations(OUTPUTS, n)]
    return [(o, *flags) for o in outputs for flags in itertools.product((False, True), repeat=3)]


def numbers(names: set[str], weighted: bool, smoothed: bool, probabilities: bool, linear: bool, wide: bool):
    """The table of docs/distributed.md: numbers of a row in each collective, those of float32 that argmax widens as
    two."""
    argmax, entropy, smoothed = "argmax" in names, "entropy" in names, smoothed and "loss" in names
    of_target, both = bool({"loss", "logprob"} & names), {"loss", "logprob"} <= names
    maxima = 2 if argmax and not wide else 1
    if probabilities:
        sums = 1 + 2 * of_target + (both and (2 if weighted else int(smoothed))) + entropy
    else:
        sums = 1 + of_target + (weighted and of_target) + (both and smoothed) + entropy
        if sums == 5 and linear:  # which knows in time whose class weight it is
            maxima, sums = maxima + (2 if argmax and not wide else 1), 4
    return [maxima, sums] + [1] * (argmax and wide)


def beyond(names: set[str], weighted: bool, smoothed: bool, probabilities: bool, linear: bool) -> bool:
    """The sets that need more than four sums, as docs/distributed.md has them."""
    if not {"loss", "logprob"} <= names:
        return False
    if probabilities:
        return weighted or (smoothed and "entropy" in names)
    return weighted and smoothed and "entropy" in names and not linear


def every_set_case(dtype: torch.dtype) -> None:
    group, rank = here.groups[2], dist.get_rank(here.groups[2])
    item = 8 if dtype == torch.float64 else 4
    places = slice(CLASSES * rank, CLASSES * rank + CLASSES)
    x, w = torch.randn(ROWS, FEATURES).to(dtype), torch.randn(2 * CLASSES, FEATURES).to(dtype)[places]
    logits, weight = x @ w.T, torch.rand(CLASSES).to(dtype)
    chances, classes = probability_targets(ROWS, 2 * CLASSES, dtype=dtype)[:, places], class_targets((ROWS,), 10, 0.2)
    for names, weighted, smoothed, probabilities in sets_of_options():
        for linear in (False, True):
            flags = (weighted, smoothed, probabilities, linear)
            options = {"outputs": tuple(names), "label_smoothing": 0.1 if smoothed else 0.0, "group": group}
            options |= {"weight": weight if weighted else None} | NO_TRAFFIC
            target = chances if probabilities else classes
            with torch.no_grad(), counted() as sent:
                if linear:
                    kept = {"sequence_parallel": False, "memory_budget": 1 << 20}
                    vocab_parallel_linear_cross_entropy(x, w, target, **kept, **options)
                else:
                    vocab_parallel_cross_entropy(logits, target, **options)
            if linear:  # its header, which does not grow with the rows
                assert sent.pop(0)[1] <= 2 * 4 * 8
            assert {name for name, _ in sent} == {"all_reduce"}
            rows = ROWS
            if linear and not probabilities and names <= {"loss", "logprob"}:
                rows = int((classes != -100).sum())  # the others take no part
            # What comes besides does not grow with the rows.
            found = [nbytes // rows for _, nbytes in sent]
            wide = dtype == torch.float64
            assert found == [item * n for n in numbers(names, *flags, wide)], (names, flags, found)
            assert (max(found) > 4 * item) == beyond(names, *flags), (names, flags, found)
            assert max(found) <= 6 * item and sum(found) <= 8 * item, (names, flags, found)
            assert len(found) == 2 + ("argmax" in names and wide)


def gradients_case() -> None:
    """None of it in backward, beside dX."""
    group, rank = here.groups[4], dist.get_rank()
    target = class_targets((ROWS,), 4 * CLASSES)
    logits = torch.randn(ROWS, 4 * CLASSES)[:, rank * CLASSES : (rank + 1) * CLASSES].requires_grad_()
    loss = vocab_parallel_cross_entropy(logits, target, group=group)
    with counted() as sent:
        loss.backward()
    assert sent == []
    hidden, weight = torch.randn(4096, FEATURES).requires_grad_(), torch.randn(CLASSES, FEATURES).requires_grad_()
    target = class_targets((4096,), 4 * CLASSES)
    for reduction in ("mean", "none"):
        with counted() as sent:
            loss = vocab_parallel_linear_cross_entropy(
                hidden, weight, target, group=group, memory_budget=1 << 16, reduction=reduction
            )
            loss.sum().backward()
        assert {name for name, _ in sent} == {"all_reduce"}
        assert sum(nbytes for _, nbytes in sent) // 4096 == 4 + 8 + 4 * FEATURES, sent


def sequence_parallel_case() -> None:
    """Input is gathered once, dX scattered: each rank gives and gets parts."""
    rows = 256
    hidden, weight = torch.randn(rows // 4, FEATURES).requires_grad_(), torch.randn(CLASSES, FEATURES).requires_grad_()
    with counted() as sent:
        loss = vocab_parallel_linear_cross_entropy(
            hidden, weight, class_targets((rows,), 4 * CLASSES), memory_budget=1, sequence_parallel=True
        )
        loss.backward()
    of_each = {name: sum(nbytes for n, nbytes in sent if n == name) for name, _ in sent}
    assert of_each.keys() == {"all_reduce", "_gather", "_reduce_scatter"}
    # What the collectives write: all rows of input, and this rank's of dX.
    assert of_each["_gather"] == 4 * FEATURES * rows and of_each["_reduce_scatter"] == 4 * FEATURES * rows // 4


@contextmanager
def recorded():
    """Products, and where each collective is started and where it is waited for, in their order."""
    events: list[tuple[str, int]] = []
    count: dict[str, int] = {}

    def event(what):
        count[what] = count.get(what, 0) + 1
        events.append((what, count[what] - 1))

    def product(name, call):
        def recorded_product(*args):
            event("product")
            return call(*args)

        return recorded_product

    start = groups.Group._start

    def recorded_start(self, what, run):
        wait = start(self, what, run)
        event(f"start {what}")

        def recorded_wait():
            event(f"wait {what}")
            return wait()

        return recorded_wait

    products = {name: product(name, getattr(chunks, name)) for name in ("_product", "_add_product")}
    reduce = dist.all_reduce

    def asynchronous(*args, async_op, **kwargs):
        assert async_op
        return reduce(*args, async_op=async_op, **kwargs)

    with (
        patch.multiple(chunks, **products),
        patch.object(groups.Group, "_start", recorded_start),
        patch.object(dist, "all_reduce", asynchronous),
    ):
        yield events


def overlap_case() -> None:
    """Between the start of a collective of a chunk and the wait for it there are products of another chunk, but for the
    first and the last chunk, which have none before or behind them."""
    group, rows = here.groups[4], 64
    hidden, weight = torch.randn(rows, FEATURES).requires_grad_(), torch.randn(CLASSES, FEATURES).requires_grad_()
    for reduction in ("mean", "none"):
        with recorded() as events:
            loss = vocab_parallel_linear_cross_entropy(
                hidden, weight, class_targets((rows,), 4 * CLASSES), group=group, memory_budget=1, reduction=reduction
            )
            loss.sum().backward()

        def between(what, i, events=events):
            a, b = events.index((f"start all_reduce of {what}", i)), events.index((f"wait all_reduce of {what}", i))
            return sum(name == "product" for name, _ in events[a:b])

        count = rows // 16
        assert sum(name == "wait all_reduce of sums" for name, _ in events) == count
        products = 2 if reduction == "mean" else 0  # of the last chunk's gradients; without them in forward, of none
        assert [between("maxima", i) for i in range(count)] == [0] + [products] * (count - 1)
        assert [between("sums", i) for i in range(count)] == [1] * (count - 1) + [0]  # the next chunk's logits
        # dW of the same chunk, both gradients of the next one, and the logits of that or, in forward, of the one after.
        of_dx = [4] * (count - 2) + [3 if reduction == "mean" else 4, 1]
        assert [between("the gradient of input", i) for i in range(count)] == of_dx


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_bytes_of_every_set_of_options(ranks, dtype):
    ranks(every_set_case, dtype)


@pytest.mark.parametrize("case", [gradients_case, sequence_parallel_case, overlap_case])
def test_traffic(ranks, case):
    ranks(case)
