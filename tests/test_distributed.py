"""Vocabulary-parallel losses on real processes, against a single process in float64 (regfast.reference)."""

import copy
import itertools
import random
import re
from functools import partial
from pathlib import Path

import pytest
import ranks as here
import torch
import torch.distributed as dist
from util import INF, NAN, assert_as_good, class_targets, lay_out, measures_memory, probability_targets, spiky

import regfast
from regfast import reference
from regfast._paths import recorded

if not dist.is_available():
    pytest.skip("this build of PyTorch has no distributed", allow_module_level=True)

from regfast.distributed import (
    VocabParallelCrossEntropyLoss,
    VocabParallelLinearCrossEntropyLoss,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)

NAMES = ("loss", "lse", "entropy", "logprob", "argmax")
SIZES = (1, 2, 4)


# What ranks run


def division(rng: random.Random, classes: int, ranks: int, kind: str) -> list[slice]:
    """Where the classes of each rank are."""
    if kind == "even":
        cuts = [classes * r // ranks for r in range(1, ranks)]
    elif kind == "empty":  # on the first and the last rank, if there are others
        cuts = sorted(rng.choices((0, classes), k=ranks - 1))
    else:
        cuts = sorted(rng.randrange(classes + 1) for _ in range(ranks - 1))
    edges = [0, *cuts, classes]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def draw_options(rng: random.Random, classes: int, dtype: torch.dtype) -> tuple[dict, torch.Tensor | None]:
    """Options of cross_entropy, and a weight of each class."""
    options = {
        "reduction": rng.choice(("mean", "sum", "none")),
        "label_smoothing": rng.choice((0.0, 0.0, 0.2, 1.0)),
        "z_loss": rng.choice((0.0, 0.1)),
        "softcap": rng.choice((None, 4.0)),
        "logit_scale": rng.choice((None, 0.7)),
        "outputs": rng.choice((("loss",), NAMES, tuple(rng.sample(NAMES, rng.randrange(1, 5))))),
    }
    if options["reduction"] == "mean" and rng.random() < 0.3:
        options["normalizer"] = rng.choice((3, torch.tensor(17)))
    weight = torch.rand(classes).to(dtype) if rng.random() < 0.5 else None
    return options, weight


def together(outputs) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def gradients(outputs: list[torch.Tensor], inputs: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """For upstream gradients that are the same on every rank and in every dtype."""
    generator = torch.Generator().manual_seed(7)
    roots = [o for o in outputs if o.requires_grad]
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in roots]
    return list(torch.autograd.grad(roots, inputs, grads, materialize_grads=True)) if roots else []


def compare(ours: list, theirs: list, exact: list, what: str) -> None:
    assert len(ours) == len(theirs) == len(exact)
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        if a.dtype == torch.float64:
            assert a.shape == c.shape, (what, i)
            # Smoothed and weighted losses are sums over the classes, terms of both signs.
            torch.testing.assert_close(
                a, c, rtol=1e-12, atol=1e-12, equal_nan=True, msg=lambda m, i=i: f"{what} {i}: {m}"
            )
        else:
            magnitude = c.double().abs().max().clamp(min=1) if c.numel() and c.is_floating_point() else None
            assert_as_good(a, b, c, f"{what} {i}", magnitude)


def leaf(t: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return (t.detach().clone() if dtype is None else t.detach().to(dtype, copy=True)).requires_grad_()


def whole_and_part(target: torch.Tensor, places: slice, dtype: torch.dtype | None):
    """Targets of a single process, and of a rank; leaves if they are probabilities."""
    if not target.is_floating_point():
        return target, target
    return leaf(target, dtype), leaf(target[:, places])


def logits_cases(size: int, dtype: torch.dtype, first: int, count: int) -> None:
    group = here.groups[size]
    rank = dist.get_rank(group)
    for seed in range(first, first + count):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        classes = rng.choice((3, 40, 150, 4500))
        shape = rng.choice(((5, classes), (5, classes), (2, classes, 3), (0, classes)))
        places = division(rng, classes, size, rng.choice(("even", "uneven", "empty")))[rank]
        options, weight = draw_options(rng, classes, dtype)
        x = spiky(*shape, dtype=dtype)
        rows = (shape[0], *shape[2:])
        if rng.random() < 0.4:
            target = probability_targets(*shape, dtype=dtype)
        else:
            options["ignore_index"] = rng.choice((-100, 0, classes - 1))
            target = class_targets(rows, classes, 0.3, options["ignore_index"])
        what = f"seed {seed}, {size} ranks, {shape}, {places}, {options}"
        results = []
        for type in (None, dtype, torch.float64):
            if type is None:
                _, part = whole_and_part(target, places, None)
                logits = leaf(lay_out(x[:, places], rng.choice(("contiguous", "transposed"))))
                logits = logits.detach().requires_grad_()
                w = None if weight is None else weight[places]
                outputs = vocab_parallel_cross_entropy(logits, part, w, group=group, **options)
            else:
                part, _ = whole_and_part(target, places, type)
                logits = leaf(x, type)
                w = None if weight is None else weight.to(type)
                outputs = reference.cross_entropy(logits, part, w, **options)
            outputs = together(outputs)
            inputs = [logits, part] if part.is_floating_point() else [logits]
            grads = gradients(outputs, inputs, dtype)
            results.append(outputs + (grads if type is None else [g[:, places] for g in grads]))
        if dtype != torch.float64:
            results[1] = [r.detach() for r in results[1]]
        compare(*results, what)


def linear_cases(size: int, dtype: torch.dtype, first: int, count: int) -> None:
    group = here.groups[size]
    rank = dist.get_rank(group)
    for seed in range(first, first + count):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        classes, features, rows = rng.choice((5, 40, 300)), rng.choice((1, 7)), rng.choice((4, 36, 100))
        places = division(rng, classes, size, rng.choice(("even", "uneven", "empty")))[rank]
        options, weight = draw_options(rng, classes, dtype)
        sequence_parallel = rng.random() < 0.4
        mine = slice(rank * rows // size, (rank + 1) * rows // size) if sequence_parallel else slice(None)
        x, w, b = spiky(rows, features), spiky(classes, features), spiky(classes)
        x, w, b = (t.to(dtype) for t in (x, w, b))
        wants = [rng.random() < 0.8 for _ in range(3)]
        if rng.random() < 0.3:
            target = probability_targets(rows, classes, dtype=dtype)
        else:
            target = class_targets((rows,), classes, 0.3)
        what = (
            f"seed {seed}, {size} ranks, {(rows, features, classes)}, {places}, {sequence_parallel}, {wants}, {options}"
        )
        results = []
        for type in (None, dtype, torch.float64):
            if type is None:
                _, part = whole_and_part(target, places, None)
                inputs = [leaf(x[mine]), leaf(w[places]), leaf(b[places])]
                class_weight = None if weight is None else weight[places]
            else:
                part, _ = whole_and_part(target, places, type)
                inputs = [leaf(x, type), leaf(w, type), leaf(b, type)]
                class_weight = None if weight is None else weight.to(type)
            for t, wanted in zip(inputs, wants, strict=True):
                t.requires_grad_(wanted)
            if type is None:
                outputs = vocab_parallel_linear_cross_entropy(
                    inputs[0], inputs[1], part, linear_bias=inputs[2], weight=class_weight, group=group,
                    memory_budget=rng.choice((1, None)), sequence_parallel=sequence_parallel, **options,
                )  # fmt: skip
            else:
                outputs = reference.linear_cross_entropy(
                    inputs[0], inputs[1], part, linear_bias=inputs[2], weight=class_weight, **options
                )
            outputs = together(outputs)
            needed = [t for t in (*inputs, part) if t.requires_grad]
            grads = gradients(outputs, needed, dtype)
            if type is not None and grads:
                cut = [mine, places, places, (slice(None), places)]
                cut = [c for c, t in zip(cut, (*inputs, part), strict=True) if t.requires_grad]
                grads = [g[c] for g, c in zip(grads, cut, strict=True)]
            results.append(outputs + grads)
        compare(*results, what)


def resident(key: str) -> int:
    return 1024 * int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text()).group(1))


def memory_case() -> None:
    """Nothing of the size of a rank's logits beyond their gradient, and not even that where they are multiplied."""
    group = here.groups[4]
    classes, target = 16384, class_targets((256,), 4 * 16384)
    logits = torch.randn(256, classes)
    hidden, weight = torch.randn(256, 16), torch.randn(classes, 16)
    for call, inputs, most in (
        (vocab_parallel_cross_entropy, [logits], 1.25),
        (partial(vocab_parallel_linear_cross_entropy, memory_budget=1 << 20), [hidden, weight], 0.4),
    ):
        for count in (16, 256):  # once for what a first call loads
            leaves = [leaf(inputs[0][:count]), *map(leaf, inputs[1:])]
            regfast.memory.release()
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
            before = resident("VmRSS")
            call(*leaves, target[:count], group=group, label_smoothing=0.1, z_loss=0.1).backward()
            peak = resident("VmHWM") - before
        assert peak < most * logits.nbytes, (peak, logits.nbytes)


def hostile_cases() -> None:
    """What a single process of ours has: infinities, NaN, ties, ignored rows whatever is in them, and none left."""
    group, rank = here.groups[4], dist.get_rank()
    classes = 64
    places = division(random.Random(0), classes, 4, "even")[rank]
    base = spiky(6, classes, dtype=torch.float64)
    target = torch.tensor([0, 63, -100, 20, 40, -100])
    masked = base.clone()
    masked[:, 16:32] = -INF  # all of a rank's
    tied = base.clone()
    tied[:, [5, 20, 60]] = 50.0
    tied[1, :] = 0.0
    tied[2, 5], tied[2, 20] = -0.0, 0.0
    tied[2, [i for i in range(classes) if i not in (5, 20)]] = -1.0
    rubbish = base.clone()
    rubbish[2], rubbish[5, 3], rubbish[5, 50] = NAN, INF, -INF
    infinite = base.clone()
    infinite[0, 40], infinite[1, 17], infinite[1, 50], infinite[3, :] = INF, NAN, INF, -INF
    large = 1e4 + base
    cases = {"masked": masked, "tied": tied, "rubbish": rubbish, "infinite": infinite, "large": large}
    for name, x in cases.items():
        for dtype in (torch.float64, torch.float32):
            for options in ({}, {"outputs": NAMES}, {"z_loss": 0.1, "reduction": "sum"}):
                results = []
                for part in (slice(None), places):
                    logits = leaf(x[:, part], dtype)
                    call = regfast.cross_entropy
                    if part is places:
                        call = lambda *args, **options: vocab_parallel_cross_entropy(*args, group=group, **options)  # noqa: E731
                    outputs = together(call(logits, target, **options))
                    loss = outputs[0]
                    loss.backward(torch.full_like(loss, 1.5))
                    results.append([*outputs, logits.grad if part is places else logits.grad[:, places]])
                for i, (a, b) in enumerate(zip(*results, strict=True)):
                    what = f"{name} {dtype} {options} {i}: "
                    torch.testing.assert_close(b, a, equal_nan=True, msg=lambda m, what=what: what + m)
    # Smoothed over classes at -inf, which a softcap makes finite and to which no target need give anything.
    masked[:, 0] = -INF
    chances = probability_targets(6, classes, dtype=torch.float64)
    chances[:, :40] = 0
    for options in ({}, {"softcap": 4.0}, {"softcap": 4.0, "logit_scale": -0.5}):
        for t in (target, chances):
            part = t if t is target else t[:, places]
            expected = regfast.cross_entropy(masked, t, label_smoothing=0.1, **options)
            got = vocab_parallel_cross_entropy(masked[:, places], part, group=group, label_smoothing=0.1, **options)
            torch.testing.assert_close(got, expected)
            assert got.isfinite() == bool(options)
    none = torch.full((6,), -100)
    for fn, x in (
        (lambda x, **options: vocab_parallel_cross_entropy(x, none, group=group, **options), base[:, places]),
        (
            lambda x, **options: vocab_parallel_linear_cross_entropy(
                x, torch.ones(16, classes, dtype=torch.float64), none, group=group, **options
            ),
            base,
        ),
    ):
        logits = leaf(x)
        assert fn(logits).isnan() and fn(logits, reduction="sum") == 0
        fn(logits).backward()
        assert not logits.grad.any()
    hidden, weight = leaf(torch.randn(0, 5)), leaf(torch.randn(16, 5))  # no rows at all
    vocab_parallel_linear_cross_entropy(hidden, weight, torch.randn(0, 16), group=group).backward()
    assert not weight.grad.any()


def half_cases() -> None:
    """bfloat16: as good as one process that has all classes, which rounds its logits where ours stay in float32."""
    group, rank = here.groups[4], dist.get_rank()
    places = division(random.Random(3), 200, 4, "uneven")[rank]
    x, w, target = spiky(64, 24).bfloat16(), spiky(200, 24, size=1).bfloat16(), class_targets((64,), 200, 0.2)
    results = []
    for type in (None, torch.bfloat16, torch.float64):
        inputs = [leaf(x, type), leaf(w if type else w[places], type)]
        if type is None:
            loss = vocab_parallel_linear_cross_entropy(*inputs, target, group=group, memory_budget=1)
        else:
            loss = reference.linear_cross_entropy(*inputs, target)
        grads = gradients([loss], inputs, torch.bfloat16)
        results.append([loss, grads[0], grads[1] if type is None else grads[1][places]])
    compare(*results, "linear")


def same_bits_case() -> bytes:
    """dX, to be compared between ranks; and that it is the same in another run."""
    rank = dist.get_rank()
    hidden, weight, target = torch.randn(200, 16), torch.randn(4 * 30, 16), class_targets((200,), 120, 0.2)
    bits = []
    for _ in range(2):
        for budget in (1, None):
            x, w = leaf(hidden), leaf(weight[30 * rank : 30 * rank + 30])
            loss = vocab_parallel_linear_cross_entropy(
                x, w, target, reduction="none" if budget else "mean", memory_budget=budget, label_smoothing=0.1
            )
            loss.sum().backward()
            bits.append((x.grad.numpy().tobytes(), w.grad.numpy().tobytes(), loss.detach().numpy().tobytes()))
    assert bits[:2] == bits[2:]
    return bits[0][0] + bits[1][0] + bits[0][2] + bits[1][2]


def options_cases() -> None:
    """inplace_backward, dtypes of results, autocast, checkpoints, retained graphs, modules, no gradients."""
    group, rank = here.groups[2], dist.get_rank(here.groups[2])
    places = slice(10 * rank, 10 * rank + 10)
    x, target = spiky(6, 20), class_targets((6,), 20, 0.3)
    true = leaf(x)
    expected = regfast.cross_entropy(true, target, label_smoothing=0.1)
    expected.backward()

    source = leaf(x[:, places])
    logits = source * 1
    memory = logits.data_ptr()
    vocab_parallel_cross_entropy(logits, target, group=group, label_smoothing=0.1, inplace_backward=True).backward()
    torch.testing.assert_close(source.grad, true.grad[:, places])
    torch.testing.assert_close(logits.detach(), true.grad[:, places])
    assert logits.data_ptr() == memory and logits._version == 1
    with pytest.raises(RuntimeError, match=r"regfast\.vocab_parallel_cross_entropy: inplace_backward: expected"):
        vocab_parallel_cross_entropy(leaf(x[:, places]), target, group=group, inplace_backward=True)

    module = VocabParallelCrossEntropyLoss(group=group, label_smoothing=0.1)
    logits = leaf(x[:, places])
    loss = module(logits, target)
    for _ in range(2):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(logits.grad, 2 * true.grad[:, places])
    torch.testing.assert_close(module(logits, target, normalizer=7), 7**-1 * expected * (target != -100).sum())

    half = x[:, places].bfloat16()
    assert vocab_parallel_cross_entropy(half, target, group=group).dtype == torch.bfloat16
    assert vocab_parallel_cross_entropy(half, target, group=group, loss_dtype=torch.float32).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert vocab_parallel_cross_entropy(half, target, group=group).dtype == torch.float32
        hidden, weight = torch.randn(6, 5), torch.randn(20, 5)
        ours = vocab_parallel_linear_cross_entropy(hidden, weight[places], target, group=group)
        torch.testing.assert_close(ours, regfast.linear_cross_entropy(hidden, weight, target), rtol=2e-2, atol=2e-2)
        assert ours.dtype == torch.float32

    # Copies, of an averaged model say, share the group.
    module = VocabParallelCrossEntropyLoss(torch.rand(10), group=group)
    other = copy.deepcopy(torch.nn.Sequential(module))[0]
    assert other.group is group and other.weight is not module.weight
    assert torch.equal(other(logits, target), module(logits, target))

    # A head as a module: its state is this rank's part of a whole head's. Twice backward, or through a checkpoint.
    whole = regfast.LinearCrossEntropyLoss(5, 20, bias=True)
    head = VocabParallelLinearCrossEntropyLoss(5, 20, group=group, bias=True)
    assert [tuple(p.shape) for p in head.parameters()] == [(10, 5), (10,)]
    head.load_state_dict({name: t[places] for name, t in whole.state_dict().items()})
    hidden = leaf(torch.randn(6, 5))
    true, packed = leaf(hidden), leaf(hidden)
    whole(true, target).backward()
    loss = head(hidden, target)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(hidden.grad, 2 * true.grad)
    torch.testing.assert_close(head.linear.weight.grad, 2 * whole.linear.weight.grad[places])
    head.zero_grad()
    torch.utils.checkpoint.checkpoint(head, packed, target, use_reentrant=False).backward()
    torch.testing.assert_close(packed.grad, true.grad)
    torch.testing.assert_close(head.linear.bias.grad, whole.linear.bias.grad[places])
    with torch.no_grad():
        torch.testing.assert_close(head(hidden, target), whole(true, target))
    with torch.inference_mode():
        torch.testing.assert_close(head(hidden, target), whole(true, target))


def compiled_case() -> None:
    """Compiled code calls it between its graphs."""
    group, rank = here.groups[2], dist.get_rank(here.groups[2])
    places, target = slice(10 * rank, 10 * rank + 10), class_targets((6,), 20, 0.3)
    hidden, weight = torch.randn(6, 5), torch.randn(20, 5)

    def step(x, w):
        logits = torch.nn.functional.linear(x.tanh(), w)
        return 2 * vocab_parallel_cross_entropy(logits, target, group=group, z_loss=0.1)

    results = []
    for call in (step, torch.compile(step, backend="eager")):
        w = leaf(weight[places])
        loss = call(hidden, w)
        loss.backward()
        results.append((loss.detach(), w.grad))
    torch.testing.assert_close(*results)


def kernels_case() -> None:
    """Nothing of it is the composite, and the gradient is the kernels'."""
    group, rank = here.groups[2], dist.get_rank(here.groups[2])
    with recorded() as calls:
        logits = leaf(torch.randn(5, 300))
        vocab_parallel_cross_entropy(logits, torch.randint(600, (5,)), group=group, z_loss=0.1).backward()
    assert [(call.op, call.path) for call in calls] == [
        ("cross_entropy_forward", "kernels"), ("cross_entropy_backward", "kernels"),
    ], (rank, calls)  # fmt: skip


def raises(error: type[Exception], call, *words: str) -> None:
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    for word in ("regfast.vocab_parallel_", "expected", "got", *words):
        assert word in message, f"{word!r} is not in {message!r}"


def error_cases() -> None:
    """Errors that all ranks have alike."""
    rank = dist.get_rank()
    group = here.groups[4]
    x, target = torch.randn(6, 5), torch.randint(20, (6,))
    hidden, weight = torch.randn(6, 3), torch.randn(5, 3)

    def logits(x=x, target=target, *args, **options):
        return lambda: vocab_parallel_cross_entropy(x, target, *args, group=group, **options)

    def linear(x=hidden, w=weight, target=target, **options):
        return lambda: vocab_parallel_linear_cross_entropy(x, w, target, group=group, **options)

    for call in (logits, linear):
        # On one rank only, and on another row than elsewhere.
        for bad in (20, -1, 1 << 40):
            classes = target.clone()
            if rank == 2:
                classes[4] = bad
            raises(IndexError, call(target=classes), "classes from 0 to 19", "rank 2, first in row 4")
        classes = target.clone()
        classes[rank] = 99
        raises(IndexError, call(target=classes), "ranks 0, 1, 2, 3, first in row 0")
        raises(RuntimeError, call(z_loss=0.1 if rank == 1 else 0.0), "others on rank 1 than on rank 0", "DETAIL")
        raises(
            RuntimeError, call(outputs="loss" if rank else ("loss", "lse")), "others on ranks 1, 2, 3 than on rank 0"
        )
        differing = {"normalizer": (2, torch.tensor(3)), "loss_dtype": (None, torch.float64), "z_loss": (0.0, 0.5)}
        for name, values in differing.items():
            raises(RuntimeError, call(**{name: values[rank == 1]}), "others on rank 1 than on rank 0")
        # Of the same sum, also of each multiplied by its row's number.
        classes = target.clone()
        classes[0], classes[1] = (3, 5) if rank else (5, 4)
        raises(RuntimeError, call(target=classes), "target: expected the same classes", "ranks 1, 2, 3 than on rank 0")
        # Of one value, whatever kind of number.
        call(z_loss=(1, 1.0, torch.tensor(1.0), True)[rank], normalizer=(2, torch.tensor(2))[rank % 2])()
        for name in ("label_smoothing", "z_loss", "softcap", "logit_scale"):
            raises(TypeError, call(**{name: "1"}), name, "str")
        raises(TypeError, call(z_loss=None), "z_loss", "NoneType")
        raises(TypeError, call(weight=[1.0]), "weight", "list")
        raises(RuntimeError, call(loss_dtype=torch.int64), "loss_dtype", "int64")
        raises(TypeError, call(normalizer=torch.tensor(1j)), "normalizer", "complex64")
        raises(ValueError, call(reduction="max"), "reduction", "'max'")
        raises(ValueError, call(outputs=("loss", "loss")), "outputs")
        raises(ValueError, call(normalizer=3, reduction="sum"), "reduction", "'sum'")
        raises(TypeError, call(normalizer="3"), "normalizer", "str")
        raises(TypeError, call(ignore_index=1.5), "ignore_index", "float")
        raises(TypeError, call(target=[1, 2]), "target", "list")
        raises(RuntimeError, call(label_smoothing=1.5), "label_smoothing", "1.5")
        raises(RuntimeError, call(softcap=-1.0), "softcap", "-1.0")
        raises(RuntimeError, call(target=target[:5]), "target", "(6,)", "(5,)")
        raises(RuntimeError, call(target=target.bool()), "target", "torch.bool")
        raises(RuntimeError, call(weight=torch.ones(20)), "weight", "5 classes", "(20,)")
        raises(RuntimeError, call(weight=torch.ones(5, requires_grad=True)), "weight", "without gradient")
        raises(NotImplementedError, call(x.long() if call is logits else hidden.long()), "input", "int64")
        meta = (x if call is logits else hidden).to("meta")
        weights = {} if call is logits else {"w": weight.to("meta")}
        raises(NotImplementedError, call(meta, target=target.to("meta"), **weights), "input", "meta")
    raises(RuntimeError, linear(w=weight[:, :2]), "linear_weight", "(C, 3)", "(5, 2)")
    raises(RuntimeError, linear(w=weight.double()), "linear_weight", "float32", "float64")
    raises(RuntimeError, linear(linear_bias=torch.ones(4)), "linear_bias", "(5,)", "(4,)")
    raises(ValueError, linear(memory_budget=0), "memory_budget", "0")
    raises(TypeError, linear(memory_budget=1.5), "memory_budget", "float")
    raises(TypeError, linear(sequence_parallel=1), "sequence_parallel", "int")
    raises(TypeError, linear(linear_bias=3), "linear_bias", "int")
    raises(TypeError, logits(inplace_backward=1), "inplace_backward", "int")
    raises(RuntimeError, linear(sequence_parallel=True), "target", "(24,)", "(6,)")
    raises(RuntimeError, linear(hidden[0], sequence_parallel=True, target=target[0]), "one row")
    raises(RuntimeError, logits(x[:, :0]), "a class on some rank")
    raises(RuntimeError, linear(w=weight[:0]), "a class on some rank")
    if rank:
        outside = dist.GroupMember.NON_GROUP_MEMBER
        raises(RuntimeError, lambda: vocab_parallel_cross_entropy(x, target, group=outside), "group", "this process")

    # Derivatives that there are none of.
    for call, tensor in ((logits, x), (linear, hidden)):
        needs = leaf(tensor)
        (first,) = torch.autograd.grad(call(needs)(), needs, retain_graph=True)
        assert not first.requires_grad
        total = call(needs, reduction="none")().sum()
        again = partial(torch.autograd.grad, total, needs, create_graph=True)
        raises(NotImplementedError, again, "create_graph=True")
        batch = torch.ones(2, dtype=tensor.dtype)
        raises(NotImplementedError, partial(torch.autograd.grad, total, needs, batch, is_grads_batched=True), "a batch")
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(tensor, torch.ones_like(tensor))
            raises(NotImplementedError, call(dual), "forward mode")
        raises(NotImplementedError, partial(torch.func.grad(lambda t, call=call: call(t)()), tensor), "torch.func")


def mesh_case() -> None:
    """Data parallel on one dimension of a mesh, vocabulary parallel on the other."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocabulary"))
    data, vocabulary = (mesh.get_local_rank(name) for name in mesh.mesh_dim_names)
    x, w, target = spiky(12, 7, dtype=torch.float64), spiky(30, 7, dtype=torch.float64), class_targets((12,), 30, 0.4)
    true = [leaf(x), leaf(w)]
    expected = reference.linear_cross_entropy(*true, target, label_smoothing=0.1)
    expected.backward()
    rows, places = slice(6 * data, 6 * data + 6), slice(11 * vocabulary, 11 + 19 * vocabulary)
    for linear in (False, True):
        mine = [leaf(x[rows]), leaf(w[places])]
        options = {"group": mesh["vocabulary"], "label_smoothing": 0.1, "normalizer": (target != -100).sum()}
        if linear:
            loss = vocab_parallel_linear_cross_entropy(*mine, target[rows], **options)
        else:
            loss = vocab_parallel_cross_entropy(mine[0] @ mine[1].T, target[rows], **options)
        loss.backward()
        # The product outside of the loss gives a part of dX alone.
        if not linear:
            dist.all_reduce(mine[0].grad, group=mesh.get_group("vocabulary"))
        dist.all_reduce(mine[1].grad, group=mesh.get_group("data"))
        total = loss.detach().clone()
        dist.all_reduce(total, group=mesh.get_group("data"))
        torch.testing.assert_close(total, expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine[0].grad, true[0].grad[rows], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine[1].grad, true[1].grad[places], rtol=1e-12, atol=1e-12)
    raises(ValueError, lambda: vocab_parallel_cross_entropy(x, target, group=mesh), "group", "one dimension")
    turned = DeviceMesh("cpu", [1, 0, 2, 3])
    raises(ValueError, lambda: vocab_parallel_cross_entropy(x, target, group=turned), "group", "ascend")


# What pytest runs


@pytest.mark.parametrize("size", SIZES)
def test_logits(ranks, size):
    ranks(logits_cases, size, torch.float64, 100 * size, 40)
    ranks(logits_cases, size, torch.float32, 1000 * size, 10)
    ranks(logits_cases, size, torch.bfloat16, 2000 * size, 10)


@pytest.mark.parametrize("size", SIZES)
def test_linear(ranks, size):
    ranks(linear_cases, size, torch.float64, 100 * size, 30)
    ranks(linear_cases, size, torch.float32, 1000 * size, 10)


@pytest.mark.parametrize(
    "case",
    [
        hostile_cases,
        half_cases,
        options_cases,
        compiled_case,
        kernels_case,
        error_cases,
        mesh_case,
    ],
)
def test_on_four_ranks(ranks, case):
    ranks(case)


@measures_memory
def test_memory(ranks):
    ranks(memory_case)


def test_bits_are_the_same_on_all_ranks(ranks):
    first, *others = ranks(same_bits_case)
    assert others == [first] * 3


def test_without_processes():
    with pytest.raises(RuntimeError, match=r"regfast\.vocab_parallel_cross_entropy: group: expected torch.distributed"):
        vocab_parallel_cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]))
