"""A linear classifier's rows in chunks: while one chunk's statistics travel, the next one's logits and the last one's
gradients are multiplied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .gradients import slice_gradient
from .groups import Group, Vocabulary, refuse_second_derivatives
from .rows import Options, Saved, bad_targets, sum_type
from .slices import Slice

_LEAST_ROWS = 16  # a product of fewer reads the weight for too little arithmetic
_SLACK = 65 / 64  # budgets are powers of two, as panels often are: a few numbers beside two of these cost a chunk more
_product = torch.ops.regfast._product.default  # in the type of the sums
_add_product = torch.ops.regfast._add_product_.default


@dataclass(frozen=True)
class Chunks:
    """A call of the op: rows of input, this rank's weight, and what has to be known to go through them in chunks."""

    group: Group
    vocabulary: Vocabulary
    options: Options
    x: Tensor  # (N, D), or this rank's rows of it
    w: Tensor  # (C, D)
    bias: Tensor | None
    target: Tensor  # (N) classes or (N, C) probabilities
    weight: Tensor | None
    kept: Tensor | None  # rows that take part, where not all do
    sequence_parallel: bool
    budget: int

    @property
    def rows(self) -> int:
        return len(self.target) if self.kept is None else len(self.kept)

    @property
    def type(self) -> torch.dtype:
        return sum_type(self.x.dtype)

    def all(self) -> list[tuple[int, int]]:
        """Equal parts of the rows (of each rank's rows, where these are gathered), as many on all ranks; at least one,
        even of no rows, so that there is a message that tells of bad targets."""
        ranks = self.group.size if self.sequence_parallel else 1
        numbers = 2 * max(self.vocabulary.sizes) + 3 * self.x.shape[1]  # of a row: two panels, input, two gradients
        most = max(_LEAST_ROWS, int(self.budget * _SLACK) // max(1, numbers * self.type.itemsize))
        count = max(1, -(-self.rows // most))
        step = max(1, -(-self.rows // (count * ranks)))
        return [(at, min(at + step, self.rows // ranks)) for at in range(0, max(1, self.rows // ranks), step)]

    def places(self, begin: int, end: int) -> slice | Tensor:
        """Which rows are in a chunk, of all."""
        if self.sequence_parallel:
            each = self.rows // self.group.size
            ranks = torch.arange(self.group.size, device=self.x.device)
            return (ranks[:, None] * each + torch.arange(begin, end, device=self.x.device)).flatten()
        return slice(begin, end) if self.kept is None else self.kept[begin:end]

    def start_input(self, begin: int, end: int) -> Callable[[], Tensor]:
        """Starts to gather the input's rows of a chunk, where they lie on several ranks."""
        if self.sequence_parallel:
            return self.group.gather_rows(self.x[begin:end], "all_gather of input")
        rows = self.x[self.places(begin, end)]
        return lambda: rows

    def logits(self, x: Tensor) -> Tensor:
        return _product(x, self.w.t(), self.bias)

    def whose_targets_count(self) -> Tensor | None:
        """Of class targets whether each row of this rank's input is not ignored."""
        if self.target.is_floating_point():
            return None
        counted = self.target != self.options.ignore_index
        if not self.sequence_parallel:
            return counted
        each = len(self.x)
        return counted[self.group.rank * each : (self.group.rank + 1) * each]


class _Gradients:
    """Gradients of a call, to which each chunk adds. They are none of the size of the logits but a target's."""

    def __init__(self, p: Chunks, wants: tuple[bool, ...], dx_type: torch.dtype) -> None:
        self.p = p
        x, self.wants_w, bias, target = wants
        # Rows that take no part have no gradient.
        self.x: Any = p.x.new_zeros(p.x.shape, dtype=dx_type) if x else None
        self.w: Any = None
        self.bias: Any = p.x.new_zeros(len(p.w), dtype=torch.float64) if bias else None
        self.target: Any = p.target.new_zeros(p.target.shape) if target else None
        self._last: Callable[[], None] | None = None

    def add(self, begin: int, end: int, x: Tensor, g: Tensor, of_target: Any) -> None:
        """Multiplies a chunk's gradient of the logits; the sum of dX over the ranks is awaited with the next chunk."""
        p = self.p
        waits = None
        if self.x is not None:
            dx = _product(g, p.w, None)
            if p.sequence_parallel:
                waits = p.group.scatter_rows(dx, "reduce_scatter of the gradient of input")
            else:
                waits = p.group.reduce(dx, dist.ReduceOp.SUM, "all_reduce of the gradient of input")
        if self.wants_w and self.w is None:
            self.w = _product(g.t(), x, None)
        elif self.wants_w:
            _add_product(self.w, g.t(), x)
        if self.bias is not None:
            self.bias += g.sum(0, dtype=torch.float64)
        places = p.places(begin, end)
        if self.target is not None:
            self.target[places] = of_target.to(self.target.dtype)
        self.finish()
        if waits is not None:
            here = slice(begin, end) if p.sequence_parallel else places

            def finish() -> None:
                self.x[here] = waits().to(self.x.dtype)

            self._last = finish

    def finish(self) -> None:
        if self._last is not None:
            self._last()
        self._last = None


def _forward(p: Chunks, wants: tuple[bool, ...] | None) -> Any:
    """Outputs of all rows, what each chunk saves, the rows' weights in the mean, and with ``wants`` the gradients of
    the sum of losses."""
    gradients = None if wants is None else _Gradients(p, wants, p.type)
    saved: list[Saved] = []
    results: dict[str, Tensor] = {}
    counts = p.x.new_zeros(len(p.target), dtype=p.type)
    chunks = p.all()

    def finish(chunk: tuple[int, int], x: Tensor, part: Slice) -> None:
        tail = part.receive_sums()
        if chunk[0] == 0:
            p.group.check_targets(tail, p.vocabulary)
        places = p.places(*chunk)
        for name, rows in part.results.items():
            results.setdefault(name, rows.new_zeros(len(p.target)))[places] = rows
        counts[places] = part.saved.row_weights()
        if gradients is None:
            saved.append(part.saved)
            return
        g, _ = slice_gradient(
            {"loss": torch.ones_like(part.results["loss"])}, part.logits, part.probabilities, part.weight, part.saved,
            p.options, p.vocabulary, in_place=True,
        )  # fmt: skip
        assert g is not None
        gradients.add(*chunk, x, g, None)

    last: Any = None
    rows_of: Any = p.start_input(*chunks[0])
    for i, chunk in enumerate(chunks):
        x, next_rows = rows_of(), None if i + 1 == len(chunks) else p.start_input(*chunks[i + 1])
        target = p.target[p.places(*chunk)]
        target = target.to(p.type) if target.is_floating_point() else target
        part = Slice(p.group, p.logits(x), target, p.weight, p.options, p.vocabulary)
        part.send_maxima(None)
        if last is not None:
            finish(*last)
        part.receive_maxima()
        tail = None
        if i == 0:
            whole = None if p.target.is_floating_point() else p.target.long()
            tail = p.group.first_bad(bad_targets(whole, p.options, p.vocabulary), part.top)
        part.send_sums(p.vocabulary, tail)
        last, rows_of = (chunk, x, part), next_rows
    finish(*last)
    if gradients is not None:
        gradients.finish()
    return results, saved, counts, gradients


class SumOfLosses(torch.autograd.Function):
    """The sum of the losses alone (and argmax), with its gradients from the pass that gives it."""

    @staticmethod
    def forward(ctx: Any, x: Any, w: Any, bias: Any, p: Chunks, wants: tuple[bool, ...]) -> Any:
        results, _, counts, g = _forward(p, wants)
        # Without a row that counts, the mean has NaN for an upstream gradient, and every gradient is 0.
        counted = torch.full((), len(p.target) > 0, device=x.device)
        if not p.target.is_floating_point():
            counted = (p.target != p.options.ignore_index).any()
        db = None if g.bias is None else g.bias.to(p.type)
        ctx.save_for_backward(counted, p.whose_targets_count(), g.x, g.w, db)
        ctx.types, ctx.op = [None if t is None else t.dtype for t in (x, w, bias)], p.group.op
        ctx.set_materialize_grads(False)
        outputs = [r.sum(dtype=torch.float64) if name == "loss" else r for name, r in results.items()]
        ctx.mark_non_differentiable(counts, *outputs[1:])
        return (*outputs, counts)

    @staticmethod
    def backward(ctx: Any, grad: Any, *_: Any) -> Any:
        refuse_second_derivatives(ctx.op, grad)
        if grad is None:
            return None, None, None, None, None
        once = not torch._C._autograd._get_current_graph_task_keep_graph()
        counted, of_rows, *gradients = ctx.saved_tensors
        grad = torch.where(counted, grad, 0)
        # An ignored row has a gradient of 0 whatever the upstream one is: one that is infinite, or NaN.
        scales = [grad if of_rows is None else torch.where(of_rows, grad, 0)[:, None], grad, grad]
        result: list[Tensor | None] = []
        for saved, scale, type in zip(gradients, scales, ctx.types, strict=True):
            if saved is None:
                result.append(None)
                continue
            scale = scale.to(saved.dtype)
            result.append((saved.mul_(scale) if once else saved * scale).to(type))
        return *result, None, None


class Rows(torch.autograd.Function):
    """Every output of each row; backward multiplies the logits again."""

    @staticmethod
    def forward(ctx: Any, x: Any, w: Any, bias: Any, target: Any, p: Chunks) -> Any:
        results, saved, counts, _ = _forward(p, None)
        ctx.save_for_backward(x, w, bias, target, p.kept, p.weight, *_joined(saved))
        ctx.names, ctx.group, ctx.vocabulary, ctx.options = tuple(results), p.group, p.vocabulary, p.options
        ctx.how = p.sequence_parallel, p.budget
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(counts, *(r for r in results.values() if not r.is_floating_point()))
        return (*results.values(), counts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        refuse_second_derivatives(ctx.group.op, *grads)
        x, w, bias, target, kept, weight, *saved = ctx.saved_tensors
        saved = Saved(*saved)
        p = Chunks(ctx.group, ctx.vocabulary, ctx.options, x, w, bias, target, weight, kept, *ctx.how)
        upstream = dict(zip(ctx.names, grads, strict=False))
        upstream.pop("argmax", None)
        wants = tuple(ctx.needs_input_grad[:4])
        gradients = _Gradients(p, wants, x.dtype)
        chunks, at = p.all(), 0
        rows_of: Any = p.start_input(*chunks[0])
        for i, chunk in enumerate(chunks):
            rows, rows_of = rows_of(), None if i + 1 == len(chunks) else p.start_input(*chunks[i + 1])
            places = p.places(*chunk)
            part = p.target[places]
            g, of_target = slice_gradient(
                {name: None if grad is None else grad[places] for name, grad in upstream.items()},
                p.logits(rows),
                part.to(p.type) if part.is_floating_point() else None,
                p.weight,
                saved.part(at, at + len(rows)),
                p.options,
                p.vocabulary,
                in_place=True,
                wants=(True, wants[3]),
            )
            assert g is not None
            gradients.add(*chunk, rows, g, of_target)
            at += len(rows)
        gradients.finish()
        dw = None if gradients.w is None else gradients.w.to(w.dtype)
        db = None if gradients.bias is None else gradients.bias.to(bias.dtype)
        return gradients.x, dw, db, gradients.target, None


def _joined(saved: list[Saved]) -> Saved:
    """Of all chunks."""

    def join(name: str, dim: int) -> Any:
        parts = [getattr(s, name) for s in saved]
        return None if parts[0] is None else torch.cat(parts, dim)

    return Saved(join("stats", 1), join("classes", 0), join("valid", 0), join("class_weight", 0), saved[0].weight_sum)
