"""The cross-entropy of a linear classifier whose classes are divided among the ranks of a process group, in chunks of
rows: while one chunk's statistics travel, the next one's logits and the last one's gradients are multiplied."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import kinds
from .._extension import not_a_tensor
from ..outputs import LOSS, CrossEntropyOutput
from ..reference import _autocast, result_types
from ..types import LossOptions, Output, Reduction, Several
from .cross_entropy import (
    FLOATING,
    bad_targets,
    call_of,
    checked_options,
    reduced,
    require_class_weight,
    require_target,
    row_weights,
)
from .groups import (
    Group,
    OfGroup,
    Vocabulary,
    outside_of_graphs,
    refuse_second_derivatives,
    refuse_transforms,
    require_kernels,
)
from .slices import Options, Saved, Slice, slice_gradient, sum_type

if TYPE_CHECKING:
    from .groups import GroupOrMesh

_OP = "vocab_parallel_linear_cross_entropy"
_LEAST_ROWS = 16  # a product of fewer reads the weight for too little arithmetic
_linear = torch.ops.regfast.linear_forward.default
_linear_backward = torch.ops.regfast.linear_backward.default


def _default_budget() -> int:
    """That of linear_cross_entropy on the CPU."""
    return min((32 << 20) * (os.cpu_count() or 1), 1 << 30)


@dataclass(frozen=True)
class _Problem:
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

    def chunks(self) -> list[tuple[int, int]]:
        """Equal parts of the rows (of each rank's rows, where these are gathered), as many on all ranks; at least one,
        even of no rows, so that there is a message that tells of bad targets."""
        ranks = self.group.size if self.sequence_parallel else 1
        numbers = 2 * max(self.vocabulary.sizes) + 3 * self.x.shape[1]  # of a row: two panels, input, two gradients
        most = max(_LEAST_ROWS, self.budget // max(1, numbers * self.type.itemsize))
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

    def _class_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the type of the sums, a few classes at a time where that is another one."""
        if self.w.dtype == self.type:
            yield slice(0, len(self.w)), self.w
            return
        step = max(64, self.budget // 8 // max(1, self.w.shape[1] * self.type.itemsize))
        for begin in range(0, len(self.w), step):
            yield slice(begin, begin + step), self.w[begin : begin + step].to(self.type)

    def logits(self, x: Tensor) -> Tensor:
        if self.w.dtype == self.type:
            return _linear(x, self.w, self.bias, "none", False)[0]
        panel = x.new_empty((len(x), len(self.w)), dtype=self.type)
        wide = x.to(self.type)
        for place, w in self._class_blocks():
            torch.mm(wide, w.t(), out=panel[:, place])
        return panel if self.bias is None else panel.add_(self.bias.to(self.type))

    def input_gradient(self, g: Tensor) -> Tensor:
        """This rank's part of it."""
        if self.w.dtype == self.type and len(self.w):
            return _linear_backward(g, None, self.w, None, "none", [True, False, False])[0]
        dx = g.new_zeros((len(g), self.w.shape[1]))
        for place, w in self._class_blocks():
            dx.addmm_(g[:, place], w)
        return dx

    def add_weight_gradient(self, g: Tensor, x: Tensor, dw: Tensor) -> None:
        dw.addmm_(g.t(), x.to(self.type))


class _Gradients:
    """Gradients of a call, to which each chunk adds."""

    def __init__(self, p: _Problem, wants: tuple[bool, ...], dx_type: torch.dtype) -> None:
        self.p = p
        x, w, bias, target = wants
        new = p.x.new_zeros
        # Rows that take no part have no gradient.
        self.x: Any = new(p.x.shape, dtype=dx_type) if x else None
        self.w: Any = new(p.w.shape, dtype=p.type) if w else None
        self.bias: Any = new(len(p.w), dtype=torch.float64) if bias else None
        self.target: Any = p.target.new_zeros(p.target.shape) if target else None
        self._last: Callable[[], None] | None = None

    def add(self, begin: int, end: int, x: Tensor, g: Any, of_target: Any) -> None:
        """Multiplies a chunk's gradient of the logits; the sum of dX over the ranks is awaited with the next chunk."""
        p = self.p
        waits = None
        if self.x is not None:
            dx = p.input_gradient(g)
            if p.sequence_parallel:
                waits = p.group.scatter_rows(dx, "reduce_scatter of the gradient of input")
            else:
                waits = p.group.reduce(dx, dist.ReduceOp.SUM, "all_reduce of the gradient of input")
        if self.w is not None:
            p.add_weight_gradient(g, x, self.w)
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


def _forward(p: _Problem, wants: tuple[bool, ...] | None) -> Any:
    """Outputs of all rows, what each chunk saves, the rows' weights in the mean, and with ``wants`` the gradients of
    the sum of losses."""
    gradients = None if wants is None else _Gradients(p, wants, p.type)
    saved: list[Saved] = []
    results: dict[str, Tensor] = {}
    counts = p.x.new_zeros(len(p.target), dtype=p.type)
    chunks = p.chunks()

    def finish(chunk: tuple[int, int], x: Tensor, part: Slice) -> None:
        tail = part.receive_sums()
        if chunk[0] == 0:
            p.group.check_targets(tail, p.vocabulary)
        places = p.places(*chunk)
        for name, rows in part.results.items():
            results.setdefault(name, rows.new_zeros(len(p.target)))[places] = rows
        counts[places] = row_weights(part.saved, part.rows, p.type)
        if gradients is None:
            saved.append(part.saved)
            return
        g, _ = slice_gradient(
            {"loss": torch.ones_like(part.results["loss"])}, part.logits, part.probabilities, part.weight, part.saved,
            p.options, p.vocabulary, in_place=True,
        )  # fmt: skip
        gradients.add(*chunk, x, g, None)

    last: Any = None
    rows_of: Any = p.start_input(*chunks[0])
    for i, chunk in enumerate(chunks):
        x, next_rows = rows_of(), None if i + 1 == len(chunks) else p.start_input(*chunks[i + 1])
        target = p.target[p.places(*chunk)]
        part = Slice(
            p.group, p.logits(x), target.to(p.type) if target.is_floating_point() else target, p.weight, p.options
        )
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


class _SumOfLosses(torch.autograd.Function):
    """The sum of the losses alone (and argmax), with its gradients from the pass that gives it."""

    @staticmethod
    def forward(ctx: Any, x: Any, w: Any, bias: Any, p: _Problem, wants: tuple[bool, ...]) -> Any:
        results, _, counts, g = _forward(p, wants)
        # Without a row that counts, the mean has NaN for an upstream gradient, and every gradient is 0.
        counted = torch.full((), len(p.target) > 0, device=x.device)
        if not p.target.is_floating_point():
            counted = (p.target != p.options.ignore_index).any()
        ctx.save_for_backward(counted, g.x, g.w, None if g.bias is None else g.bias.to(p.type))
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
        counted, *gradients = ctx.saved_tensors
        grad = torch.where(counted, grad, 0)
        result: list[Tensor | None] = []
        for saved, type in zip(gradients, ctx.types, strict=True):
            if saved is None:
                result.append(None)
                continue
            scale = grad.to(saved.dtype)
            result.append((saved.mul_(scale) if once else saved * scale).to(type))
        return *result, None, None


class _Rows(torch.autograd.Function):
    """Every output of each row; backward multiplies the logits again."""

    @staticmethod
    def forward(ctx: Any, x: Any, w: Any, bias: Any, target: Any, p: _Problem) -> Any:
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
        p = _Problem(ctx.group, ctx.vocabulary, ctx.options, x, w, bias, target, weight, kept, *ctx.how)
        upstream = dict(zip(ctx.names, grads, strict=False))
        upstream.pop("argmax", None)
        wants = tuple(ctx.needs_input_grad[:4])
        gradients = _Gradients(p, wants, x.dtype)
        chunks, at = p.chunks(), 0
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
                _part_of(saved, at, at + len(rows)),
                p.options,
                p.vocabulary,
                in_place=True,
                wants=(True, wants[3]),
            )
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


def _part_of(saved: Saved, begin: int, end: int) -> Saved:
    def rows(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[begin:end]

    return Saved(
        saved.stats[:, begin:end].contiguous(), rows(saved.classes), rows(saved.valid), rows(saved.class_weight),
        saved.weight_sum,
    )  # fmt: skip


def _require_shapes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> int:
    """This rank's number of classes."""
    if input.dtype not in FLOATING or input.dim() == 0:
        raise NotImplementedError(
            f"regfast.{_OP}: input: expected float32, float64, bfloat16 or float16 with a dimension of features, got "
            f"{input.dtype} {tuple(input.shape)}"
        )
    features = input.shape[-1]
    if linear_weight.dim() != 2 or linear_weight.shape[1] != features:
        raise RuntimeError(
            f"regfast.{_OP}: linear_weight: expected shape (C, {features}), got {tuple(linear_weight.shape)}"
        )
    classes = linear_weight.shape[0]
    if isinstance(linear_bias, Tensor) and linear_bias.shape != (classes,):
        raise RuntimeError(f"regfast.{_OP}: linear_bias: expected shape {(classes,)}, got {tuple(linear_bias.shape)}")
    for name, t in {"linear_weight": linear_weight, "linear_bias": linear_bias}.items():
        if t is not None and not isinstance(t, Tensor):
            raise not_a_tensor(_OP, **{name: t})
        if t is not None and (t.device != input.device or (t.dtype != input.dtype and not _autocast(input))):
            raise RuntimeError(
                f"regfast.{_OP}: {name}: expected {input.dtype} on {input.device}, got {t.dtype} on {t.device}"
            )
    return classes


def _saved_tensors_are_packed() -> bool:
    """By a checkpoint, say, which computes forward again: gradients from its first time would be thrown away."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class _Options(LossOptions, total=False):
    """Keywords that say nothing of the result's type."""

    group: GroupOrMesh
    linear_bias: Tensor | None
    weight: Tensor | None
    reduction: Reduction
    ignore_index: int
    label_smoothing: float
    memory_budget: int | None
    sequence_parallel: bool


@overload
def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    outputs: Output | tuple[Output] = ...,
    **further: Unpack[_Options],
) -> Tensor: ...
@overload
def vocab_parallel_linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, outputs: Several, **further: Unpack[_Options]
) -> CrossEntropyOutput: ...
@overload
def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    outputs: Output | tuple[Output, ...],
    **further: Unpack[_Options],
) -> Tensor | CrossEntropyOutput: ...
@outside_of_graphs
def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    group: GroupOrMesh = None,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    outputs: Output | tuple[Output, ...] = LOSS,
    memory_budget: int | None = None,
    loss_dtype: torch.dtype | None = None,
    sequence_parallel: bool = False,
    normalizer: float | Tensor | None = None,
) -> Tensor | CrossEntropyOutput:
    """:func:`regfast.linear_cross_entropy` with a weight of which each rank of a group has the rows of its own classes.

    Logits exist for a chunk of rows at a time, in float32 for half types. The collectives of a chunk run while the
    next one's logits and the last one's gradients are multiplied. dX is summed over the ranks chunk by chunk, in
    float32 (float64), the gradient of linear_weight stays where it is. The same call on the same ranks has the same
    bits, and dX the same on all of them. The method is that of Shoeybi et al., "Megatron-LM" (2019), without stored
    logits.

    Args:
        input: rows ``(D)``, ``(N, D)`` or ``(B, T, D)``, the same on all ranks; float32, float64, bfloat16 or float16.
        linear_weight: of this rank's classes, ``(C, D)``, input's dtype. C may differ from rank to rank and be 0.
        target: class indices of the whole vocabulary, the same on all ranks, input's shape without D; or this rank's
            part of probabilities, ``(N, C)``.
        group, normalizer: as in :func:`vocab_parallel_cross_entropy`.
        linear_bias: of this rank's classes, ``(C)``. weight: of each of them in the loss, ``(C)``, without gradient.
        reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale, outputs, loss_dtype: as in
            :func:`vocab_parallel_cross_entropy`.
        memory_budget: bytes for chunks on this rank, of which there are two at a time, the same on all ranks; by
            default 32 MiB for each core of the machine, and 1 GiB at most. At least 16 rows are computed at a time.
        sequence_parallel: input is this rank's part of dimension 0 of the rows, as many rows on all ranks, in the order
            of ranks; target is whole. Chunks of input are gathered, those of dX reduced and scattered. Ignored rows
            take part in the products then: NaN in one makes the weight's gradient NaN, as in torch.

    Returns:
        The tensor for one name, a named tuple for several, for all rows; each as on a single process.

    Raises: as :func:`vocab_parallel_cross_entropy`.

    Saved for backward: the gradients of a sum or mean alone (argmax at most besides), in float32 for half types; their
    upstream gradient multiplies them. Otherwise the inputs and each row's statistics, from which backward multiplies
    the logits again; so do calls under saved tensor hooks (a checkpoint's). Rows that are ignored cost nothing, unless
    lse, entropy or argmax is wanted or sequence_parallel is set. Half types are multiplied in float32, for which the
    weight is converted a few classes at a time. Beside the messages of :func:`vocab_parallel_cross_entropy`, whose
    header goes ahead once for all chunks, dX is all that is sent.
    """
    return losses_of_slices(
        input,
        linear_weight,
        target,
        group=group,
        linear_bias=linear_bias,
        weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        outputs=outputs,
        memory_budget=memory_budget,
        loss_dtype=loss_dtype,
        sequence_parallel=sequence_parallel,
        normalizer=normalizer,
    )


def losses_of_slices(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    group: object,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float | None,
    outputs: str | tuple[str, ...],
    memory_budget: int | None,
    loss_dtype: torch.dtype | None,
    sequence_parallel: bool,
    normalizer: float | Tensor | None,
    row_groups: Sequence[object] = (),
) -> Any:
    """:func:`vocab_parallel_linear_cross_entropy` of a part of the rows, of which each rank of ``row_groups`` has
    another: a mean is this part's share of that over all."""
    names, options, result, output_places = checked_options(
        _OP, {"input": input, "linear_weight": linear_weight, "target": target}, reduction, outputs, normalizer,
        loss_dtype, ignore_index, label_smoothing, z_loss, softcap, logit_scale,
    )  # fmt: skip
    kinds.boolean(_OP, "sequence_parallel", sequence_parallel)
    refuse_transforms(_OP, input, linear_weight, linear_bias, target, weight)
    if memory_budget is not None and kinds.integer(_OP, "memory_budget", memory_budget) <= 0:
        raise ValueError(f"regfast.{_OP}: memory_budget: expected a positive number of bytes, got {memory_budget}")
    of_group = Group(_OP, group)
    classes = _require_shapes(input, linear_weight, linear_bias)
    rows_shape = input.shape[:-1]
    if sequence_parallel:
        if not rows_shape:
            raise RuntimeError(f"regfast.{_OP}: input: expected rows to divide with sequence_parallel, got one row (D)")
        rows_shape = torch.Size((rows_shape[0] * of_group.size, *rows_shape[1:]))
    probabilities = require_target(_OP, rows_shape, torch.Size((*rows_shape, classes)), target)
    require_class_weight(_OP, weight, classes, input)
    require_kernels(_OP, input)

    tensors: list[Any] = [input, linear_weight, linear_bias]
    types = result_types(input, target, weight)
    if _autocast(input):  # as linear has it
        low = torch.get_autocast_dtype(input.device.type)
        tensors = [None if t is None else t if t.dtype == torch.float64 else t.to(low) for t in tensors]
    if probabilities and torch.float64 in (target.dtype, None if weight is None else weight.dtype):
        tensors = [None if t is None else t.double() for t in tensors]
    x, w, bias = tensors
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    target = target.reshape(rows_shape.numel(), classes) if probabilities else target.reshape(-1)

    kept = None
    if not probabilities and not sequence_parallel and set(names) <= {"loss", "logprob"}:
        kept = (target != options.ignore_index).nonzero().squeeze(1)
        kept = None if len(kept) == len(target) else kept
    grad = torch.is_grad_enabled()
    wants = [grad and t is not None and t.requires_grad for t in (x, w, bias, target)]
    one_pass = set(names) <= {"loss", "argmax"} and "loss" in names and reduction != "none"
    one_pass = one_pass and any(wants) and not wants[3] and not _saved_tensors_are_packed()
    budget = memory_budget or _default_budget()
    further = {
        "reduction": reduction,
        "loss_dtype": loss_dtype,
        "memory_budget": budget,
        "sequence_parallel": sequence_parallel,
        "rows that take part": len(target) if kept is None else len(kept),
        "gradient of input": wants[0],
        "gradients in forward": one_pass,
    }
    call = call_of(_OP, input, tuple(input.shape), target, weight, options, normalizer, **further)
    of_group.compare(call)
    # Of one size and dtype whatever the call is, so that calls which differ can be told apart.
    of_classes = None if probabilities else target.long()
    header = of_group.header(classes, call, of_classes, x.new_empty(0, dtype=torch.float64))
    headers = of_group.reduce(header, dist.ReduceOp.MAX, "all_reduce of sizes")
    vocabulary = of_group.read_header(headers())
    if vocabulary.total == 0:
        raise RuntimeError(f"regfast.{_OP}: linear_weight: expected a class on some rank, got none on any")
    p = _Problem(
        of_group, vocabulary, options, x.detach(), w.detach(), None if bias is None else bias.detach(), target.detach(),
        weight, kept, sequence_parallel, budget,
    )  # fmt: skip
    in_one_pass: Any = _SumOfLosses
    rows: Any = _Rows
    if one_pass:
        *tensors, counts = in_one_pass.apply(x, w, bias, p, (*wants[:3], False))
        total = tensors[0]
    else:
        *tensors, counts = rows.apply(x, w, bias, target, p)
        total = tensors[0].sum(dtype=torch.float64) if "loss" in names and reduction != "none" else None
    if total is not None:
        tensors[0] = reduced(total, counts, reduction, normalizer, row_groups)
    tensors = [t if t.dim() == 0 else t.reshape(rows_shape) for t in tensors]
    tensors = [
        t if name == "argmax" else t.to(loss_dtype or types[name]) for name, t in zip(names, tensors, strict=True)
    ]
    return tensors[0] if result is None else result(*(tensors[i] for i in output_places))


class VocabParallelLinearCrossEntropyLoss(OfGroup):
    """:func:`vocab_parallel_linear_cross_entropy` with its options, of a ``linear`` with this rank's classes.

    ``num_classes`` are those of the whole vocabulary; each rank has an equal part of them, the last ones less, as
    DTensor divides them. Assign another Parameter to ``linear.weight`` to tie weights or for another division.
    ``weight`` is that of this rank's classes. Each rank draws its own initial weights, the same as the others if its
    seed is the same: give them different seeds, or load a state.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        group: GroupOrMesh = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        ranks = Group("VocabParallelLinearCrossEntropyLoss", group)
        each = -(-num_classes // ranks.size)
        begin = min(ranks.rank * each, num_classes)
        self.num_classes, self.group, self.options = num_classes, group, options
        self.linear = nn.Linear(in_features, min(each, num_classes - begin), bias, device, dtype)
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor, *, normalizer: float | Tensor | None = None) -> Any:
        return vocab_parallel_linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            group=self.group,
            linear_bias=self.linear.bias,
            weight=self.weight,
            normalizer=normalizer,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={value!r}" for name, value in {"num_classes": self.num_classes, **self.options}.items()
        )
