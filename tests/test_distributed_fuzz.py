"""Random calls of the vocabulary-parallel losses, every option crossed with every other, on 1, 2 and 4 real processes,
against a single process in float64 (regfast.reference). Each group has other cases at the same time, so that what one
sends to another's ranks shows.

    python tests/test_distributed_fuzz.py 600 7   # seconds, and the first seed
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
import time
from dataclasses import dataclass, field, replace

import pytest
import ranks as here
import torch
import torch.distributed as dist
from test_distributed import division
from torch import Tensor
from util import INF, NAN, assert_as_good, class_targets, lay_out, probability_targets, spiky

if not dist.is_available():
    pytest.skip("this build of PyTorch has no distributed", allow_module_level=True)

from regfast import reference
from regfast.distributed import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy

DTYPES = (torch.float64, torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int64, torch.int32, torch.int16, torch.uint8)
NORMALIZERS = (3, 0.5, -2.5, 0, INF, NAN, torch.tensor(17), torch.tensor([4.0], dtype=torch.bfloat16))
LAYOUTS = ("contiguous", "contiguous", "transposed", "strided", "misaligned")


@dataclass
class Case:
    """A call of a single process: tensors by their names, which dimension of them is divided, and options."""

    linear: bool
    dtype: torch.dtype
    tensors: dict[str, Tensor] = field(default_factory=dict)
    acc: torch.dtype = torch.float32  # what it is computed in
    by_class: dict[str, int] = field(default_factory=dict)
    wants: list[str] = field(default_factory=list)
    options: dict[str, object] = field(default_factory=dict)
    of_ranks: dict[str, object] = field(default_factory=dict)  # what a single process has not
    classes: int = 1

    def names(self) -> list[str]:
        """Of the outputs."""
        outputs = self.options["outputs"]
        return [outputs] if isinstance(outputs, str) else list(outputs)

    def text(self) -> str:
        tensors = {k: (str(t.dtype).removeprefix("torch."), *t.shape) for k, t in self.tensors.items()}
        return f"linear={self.linear} {tensors} wants={self.wants} {self.options} {self.of_ranks}"


def draw_options(rng: random.Random, names: tuple[str, ...]) -> dict[str, object]:
    outputs = tuple(rng.sample(names, rng.randint(1, 5))) if rng.random() < 0.6 else ("loss",)
    options: dict[str, object] = {
        "reduction": rng.choice(("mean", "sum", "none")),
        "label_smoothing": rng.choice((0.0, 0.0, 0.1, 0.5, 1.0)),
        "z_loss": rng.choice((0.0, 0.0, 0.1)),
        "softcap": rng.choice((None, None, 4.0)),
        "logit_scale": rng.choice((None, None, 0.7, -1.5, 0.0)),
        "outputs": outputs[0] if len(outputs) == 1 and rng.random() < 0.5 else outputs,
        "loss_dtype": rng.choice((None, None, None, torch.float32, torch.float64, torch.bfloat16)),
    }
    if options["reduction"] == "mean" and rng.random() < 0.4:
        options["normalizer"] = rng.choice(NORMALIZERS)
    return options


def draw(rng: random.Random, ranks: int) -> Case:
    linear = rng.random() < 0.5
    case = Case(linear, rng.choice(DTYPES), options=draw_options(rng, reference.OUTPUTS))
    case.classes = c = rng.choice((1, 2, 3, 17, 40, 150, 1030))
    options, tensors = case.options, case.tensors
    n, d = rng.choice((0, 1, 4, 20, 36)), rng.choice((1, 2, 7))
    if linear:
        sequence_parallel = n % ranks == 0 and rng.random() < 0.3
        lead: tuple[int, ...] = rng.choice(((n,), (n,), (n, 2), () if not sequence_parallel else (n,)))
        shape, dim = (*lead, c), len(lead)
        tensors["input"] = lay_out(spiky(*lead, d), rng.choice(LAYOUTS)).to(case.dtype)
        tensors["linear_weight"] = lay_out(spiky(c, d), rng.choice(LAYOUTS)).to(case.dtype)
        if rng.random() < 0.5:
            tensors["linear_bias"] = spiky(c).to(case.dtype)
        case.of_ranks = {
            "sequence_parallel": sequence_parallel,
            "memory_budget": rng.choice((None, 1, 1 << 12, 1 << 15)),
        }
    else:
        shape = rng.choice(((c,), (n, c), (n, c), (n, c, 3), (n, c, 2, 2)))
        dim = 1 if len(shape) > 1 else 0
        lead = shape[:dim] + shape[dim + 1 :]
        tensors["input"] = spiky(*shape).to(case.dtype)
        case.of_ranks = {"inplace_backward": rng.random() < 0.2}
    if rng.random() < 0.35:
        chances = spiky(*shape, dtype=torch.float64).softmax(dim) if rng.random() < 0.7 else spiky(*shape)
        tensors["target"] = chances.to(case.dtype if rng.random() < 0.7 else rng.choice(DTYPES))
    else:
        options["ignore_index"] = rng.choice((-100, 0, c - 1, 5))
        kind = rng.choice(INTEGERS if c <= 200 and options["ignore_index"] >= 0 else (torch.int64, torch.int32))
        ignored = rng.choice((0.0, 0.3, 0.3, 1.0))
        tensors["target"] = class_targets(lead, c, ignored, int(str(options["ignore_index"]))).to(kind)
    if rng.random() < 0.4:
        weight = torch.rand(c) + 0.1
        if rng.random() < 0.3:
            weight[torch.rand(c) < 0.5] = 0
        wide = tensors["target"].is_floating_point() and rng.random() < 0.3
        tensors["weight"] = weight.to(rng.choice(DTYPES) if wide else case.dtype)
    scaled = options["logit_scale"] is None or float(str(options["logit_scale"])) > 0
    if rng.random() < 0.15 and c > 1 and not linear and not options["label_smoothing"] and scaled:
        tensors["input"].select(dim, rng.randrange(c)).fill_(-INF)  # masked; its rows may have it as their class
    probable = tensors["target"].is_floating_point()
    if torch.float64 in (case.dtype, *(tensors[k].dtype for k in ("target", "weight") if probable and k in tensors)):
        case.acc = torch.float64
    case.by_class = {"linear_weight": 0, "linear_bias": 0, "weight": 0}
    case.by_class |= {} if linear else {"input": dim}
    case.by_class |= {"target": dim} if probable else {}
    floating = [k for k, t in tensors.items() if t.is_floating_point() and k != "weight"]
    case.wants = [k for k in floating if rng.random() < 0.8]
    return case


def rows_of(case: Case, group: object) -> slice:
    """Of the input's dimension 0, which of a rank's are its own."""
    if not case.of_ranks.get("sequence_parallel"):
        return slice(None)
    rank, size, n = dist.get_rank(group), dist.get_world_size(group), len(case.tensors["input"])
    return slice(rank * n // size, (rank + 1) * n // size)


def cut(case: Case, name: str, t: Tensor, places: slice, group: object) -> Tensor:
    if name in case.by_class:
        return t[(*([slice(None)] * case.by_class[name]), places)]
    return t[rows_of(case, group)] if name == "input" else t


def evaluate(case: Case, tensors: dict[str, Tensor], ranks: dict[str, object] | None, seed: int) -> list[Tensor]:
    """Outputs, and gradients of what is wanted. Upstream gradients are the same in every dtype and on every rank."""
    leaves = {k: t.detach().requires_grad_() if k in case.wants else t for k, t in tensors.items()}
    given = dict(leaves)
    options = dict(case.options)
    if ranks is None:
        call = reference.linear_cross_entropy if case.linear else reference.cross_entropy
        if case.linear and leaves["target"].is_floating_point():
            options.pop("ignore_index", None)
    else:
        call = vocab_parallel_linear_cross_entropy if case.linear else vocab_parallel_cross_entropy
        options |= ranks
    if options.get("inplace_backward") and "input" in case.wants:
        given["input"] = given["input"] * 1
    outputs = call(**given, **options)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    roots, grads = [], []
    for output, name in zip(outputs, case.names(), strict=True):
        upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        if rng.random() < 0.2:
            upstream = torch.full((), 0.5, dtype=torch.float64).expand(output.shape)
        used = rng.random() < 0.85 and (name in ("loss", "logprob") or case.wants != ["target"])
        if output.requires_grad and used:
            roots.append(output)
            grads.append(upstream.to(output.dtype))
    wanted = [leaves[k] for k in case.wants]
    if not roots or not wanted:
        return outputs
    return outputs + list(torch.autograd.grad(roots, wanted, grads, materialize_grads=True))


def transformed(z: Tensor, case: Case) -> Tensor:
    scale, cap = case.options["logit_scale"], case.options["softcap"]
    z = z if scale is None else z * scale
    return z if cap is None else cap * (z / cap).tanh()


def agree(ours: Tensor, theirs: Tensor, exact: Tensor, acc: torch.dtype, terms: float, what: str) -> None:
    """Finite where the true result is, and as good, or as the size of what it sums up allows; not finite elsewhere,
    whichever infinity or NaN it is."""
    assert ours.shape == exact.shape, f"{what}: {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype}, expected {theirs.dtype}"
    if not ours.is_floating_point():
        assert torch.equal(ours, exact), what
        return
    finite = exact.to(ours.dtype).isfinite()
    assert torch.equal(ours.isfinite(), finite), f"{what}: {ours}, expected {exact}"
    if not finite.any():
        return
    magnitude = exact[finite].double().abs().max().clamp(min=max(1.0, terms))
    if acc == torch.float32 and ours.dtype == torch.float64:
        ours, theirs = ours.float(), theirs.float()
    if ours.dtype == torch.float64:
        size = 1 + magnitude.item()
        torch.testing.assert_close(
            ours[finite], exact[finite], rtol=1e-12, atol=1e-12 * size, msg=lambda m: f"{what}: {m}"
        )
    else:
        assert_as_good(ours[finite], theirs[finite], exact[finite].double(), what, magnitude)


def check(rng: random.Random, seed: int, size: int) -> None:
    group = here.groups[size]
    torch.manual_seed(seed)
    case = draw(rng, size)
    what = f"seed {seed}, {size} ranks: {case.text()}"
    places = division(rng, case.classes, size, rng.choice(("even", "uneven", "empty")))[dist.get_rank(group)]
    mine = {k: cut(case, k, t, places, group) for k, t in case.tensors.items()}
    ours = evaluate(case, mine, {**case.of_ranks, "group": group}, seed)
    theirs = evaluate(case, case.tensors, None, seed)
    wide = {k: t.double() if t.is_floating_point() else t for k, t in case.tensors.items()}
    exact = evaluate(case, wide, None, seed)
    names = case.names()
    each = replace(case, wants=[], options=case.options | {"reduction": "none", "outputs": "loss", "normalizer": None})
    terms = evaluate(each, wide, None, seed)[0].detach().abs().nan_to_num(0, 0, 0).sum().item()
    logits = wide["input"]
    if case.linear:
        logits = reference.linear(logits, wide["linear_weight"], wide.get("linear_bias"))
    largest = transformed(logits, case).abs().nan_to_num(0, 0, 0).max().item() if logits.numel() else 0.0
    target = wide["target"]
    if target.is_floating_point() and target.numel():  # which need be no distribution; its logarithms are no smaller
        largest = max(largest, math.log(case.classes))
        mass = target.abs().sum(case.by_class["target"])
        largest *= max(1.0, mass.max().item())
        terms += largest * mass.numel()
    if case.options["reduction"] == "mean" and "normalizer" not in case.options:
        terms /= max(1, case.tensors["target"].numel())
    assert len(ours) == len(theirs) == len(exact), what
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        of_output = i < len(names)
        name = names[i] if of_output else f"gradient of {case.wants[i - len(names)]}"
        if name == "argmax" and case.linear:
            z = transformed(logits, case)
            found = z.gather(-1, a.unsqueeze(-1)).squeeze(-1)
            assert (found >= z.amax(-1) - 1e-3 * (1 + z.abs().amax(-1))).all() if z.numel() else True, f"{what} {name}"
            continue
        if not of_output:
            b, c = (cut(case, case.wants[i - len(names)], t, places, group) for t in (b, c))
        size = terms if name == "loss" else largest  # of what goes into it
        agree(a.detach(), b.detach(), c.detach(), case.acc, size, f"{what} {name}")


def run_cases(size: int, first: int, count: int, seconds: float = INF) -> int:
    """So many cases, or as many as there is time for. Each group of the size has cases of its own."""
    offset = 500_000 * (dist.get_rank() // size)
    end = time.monotonic() + seconds
    wrong: list[str] = []  # by values, which are looked at when nobody waits for this rank
    for i in range(count):
        seed = first + i
        if seconds < INF:  # one clock for all, since all have to come
            now = torch.tensor([time.monotonic()])
            dist.all_reduce(now, dist.ReduceOp.MAX)
            if now.item() > end:
                count = i
                break
        try:
            check(random.Random(seed + offset), seed + offset, size)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)
    return count


def mesh_cases(first: int, count: int) -> None:
    """Rows on one dimension of a 2 x 2 mesh, classes on the other: the parts of a loss with one normalizer add up to
    that of a single process, gradients of the weight over the rows' ranks too."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "classes"))
    of_rows, of_classes = mesh["rows"].get_group(), mesh["classes"].get_group()
    for seed in range(first, first + count):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        classes, rows = rng.choice((5, 40, 300)), rng.choice((6, 21))
        dtype = rng.choice((torch.float64, torch.float32))
        x, w, b = spiky(rows, 5), spiky(classes, 5), spiky(classes)
        x, w, b = (t.to(dtype) for t in (x, w, b))
        weight = (torch.rand(classes) + 0.1).to(dtype) if rng.random() < 0.5 else None
        target = class_targets((rows,), classes, rng.choice((0.0, 0.4, 1.0)))
        if rng.random() < 0.4:
            target = probability_targets(rows, classes, dtype=dtype)
        options = {k: rng.choice(v) for k, v in {"label_smoothing": (0.0, 0.2), "softcap": (None, 4.0)}.items()}
        options["normalizer"] = rng.choice((7, torch.tensor(11.5)))
        split = slice(0, rows // 3) if dist.get_rank(of_rows) == 0 else slice(rows // 3, rows)
        places = division(rng, classes, 2, rng.choice(("even", "uneven", "empty")))[dist.get_rank(of_classes)]
        results = []
        for type in (dtype, torch.float64):
            leaves = [t.to(type).requires_grad_() for t in (x.clone(), w.clone(), b.clone())]
            t = target.to(type) if target.is_floating_point() else target
            more = {"weight": None if weight is None else weight.to(type), "linear_bias": leaves[2]}
            loss = reference.linear_cross_entropy(*leaves[:2], t, **more, **options)
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        mine = [x[split].clone(), w[places].clone(), b[places].clone()]
        leaves = [t.requires_grad_() for t in mine]
        t = target[split, places] if target.is_floating_point() else target[split]
        more = {"weight": None if weight is None else weight[places], "linear_bias": leaves[2]}
        loss = vocab_parallel_linear_cross_entropy(*leaves[:2], t, group=mesh["classes"], **more, **options)
        found = [loss.detach().clone(), *torch.autograd.grad(loss, leaves)]
        for i in (0, 2, 3):
            dist.all_reduce(found[i], group=of_rows)
        for i, part in enumerate((..., split, places, places)):
            theirs, exact = (r[i][part] if i else r[i] for r in results)
            agree(found[i], theirs, exact, dtype, 0.0, f"seed {seed}: {rows} rows, {classes} classes, {options}, {i}")


@pytest.mark.parametrize("size, count", [(1, 60), (2, 120), (4, 120)])
def test_cases(ranks, size, count):
    ranks(run_cases, size, 1_000_000 * size, count)


def test_meshes(ranks):
    ranks(mesh_cases, 0, 20)


if __name__ == "__main__":
    import test_distributed_fuzz as itself  # as the ranks know it

    seconds, first = (float(a) for a in [*sys.argv[1:], 60, 1][:2])
    processes = here.Ranks()
    done, begin = 0, time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):
        while time.monotonic() - begin < seconds:
            for size in (1, 2, 4):
                done += processes(itself.run_cases, size, int(first) * 1_000_000 + done, 100, 20.0)[0] * 4 // size
            print(f"{done} calls in {time.monotonic() - begin:.0f} s", flush=True)
    processes.close()
