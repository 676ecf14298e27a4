"""Softmax cross-entropy of logits whose classes are divided among the ranks of a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor

from .. import kinds
from .._extension import not_a_tensor, reduction_number
from ..outputs import LOSS, CrossEntropyOutput, select_outputs
from ..reference import HALF, OUTPUTS, divided, require_normalizer, result_types
from ..types import LossOptions, Output, Reduction, Several
from .groups import (
    Group,
    OfGroup,
    Vocabulary,
    outside_of_graphs,
    refuse_second_derivatives,
    refuse_transforms,
    require_kernels,
)
from .slices import Options, Saved, Slice, class_dim, row_shape, slice_gradient

if TYPE_CHECKING:
    from .groups import GroupOrMesh

_OP = "vocab_parallel_cross_entropy"
FLOATING = (torch.float32, torch.float64, *HALF)


class _Rows(torch.autograd.Function):
    """Every output of each row, in the type of the sums, and the rows' terms of the mean's denominator."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, group: Group, options: Options,
                call: dict[str, Any], in_place: bool) -> Any:  # fmt: skip
        part = Slice(group, logits, target, weight, options)
        part.send_maxima(group.header(part.classes, call, part.target, logits.new_empty(0, dtype=part.type)))
        vocabulary = group.read_header(part.receive_maxima())
        if vocabulary.total == 0:
            raise RuntimeError(f"regfast.{group.op}: input: expected a class on some rank, got none on any")
        part.send_sums(vocabulary, group.first_bad(bad_targets(part.target, options, vocabulary), part.top))
        group.check_targets(part.receive_sums(), vocabulary)
        ctx.save_for_backward(logits, part.probabilities, part.weight, *part.saved)
        ctx.set_materialize_grads(False)
        ctx.group, ctx.options, ctx.vocabulary, ctx.in_place = group, options, vocabulary, in_place
        ctx.names = tuple(part.results)
        results = [result.view(part.shape) for result in part.results.values()]
        counts = row_weights(part.saved, part.rows, part.type)
        ctx.mark_non_differentiable(counts, *(r for r in results if not r.is_floating_point()))
        return (*results, counts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        refuse_second_derivatives(ctx.group.op, *grads)
        logits, probabilities, weight, *saved = ctx.saved_tensors
        upstream = dict(zip(ctx.names, grads, strict=False))
        upstream.pop("argmax", None)
        dx, dt = slice_gradient(
            upstream, logits, probabilities, weight, Saved(*saved), ctx.options, ctx.vocabulary,
            in_place=ctx.in_place, wants=ctx.needs_input_grad[:2],
        )  # fmt: skip
        needs = ctx.needs_input_grad
        return dx if needs[0] else None, dt if needs[1] else None, None, None, None, None, None


def bad_targets(target: Tensor | None, options: Options, vocabulary: Vocabulary) -> Tensor | None:
    """Rows whose target is neither a class nor ignored."""
    if target is None:
        return None
    return (target != options.ignore_index) & ((target < 0) | (target >= vocabulary.total))


def row_weights(saved: Saved, rows: int, type: torch.dtype) -> Tensor:
    """Each row's term of the mean's denominator."""
    if saved.valid is None:
        return torch.ones(rows, dtype=type, device=saved.stats.device)
    return saved.valid.to(type) if saved.class_weight is None else saved.class_weight


def mean_of(total: Tensor, count: Tensor) -> Tensor:
    """NaN of no rows, as torch's, whatever the terms that no weight multiplies add up to."""
    return torch.where(count == 0, torch.nan, total / count)


def reduced(
    total: Tensor, counts: Tensor, reduction: str, normalizer: float | Tensor | None, row_groups: Sequence[object]
) -> Tensor:
    """The sum of the losses as the caller wants it; the rows of a mean are those of all ranks of these groups."""
    if reduction == "sum":
        return total
    if normalizer is not None:
        return divided(total, normalizer)
    count = counts.sum(dtype=torch.float64)
    for group in row_groups:
        dist.all_reduce(count, group=group)
    return mean_of(total, count)


def options_of(
    op: str,
    names: Sequence[str],
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float | None,
) -> Options:
    """Numbers of one kind, whatever they were given as, since those of all ranks are compared."""
    o = Options(
        kinds.integer(op, "ignore_index", ignore_index),
        kinds.number(op, "label_smoothing", label_smoothing),
        kinds.number(op, "z_loss", z_loss),
        None if softcap is None else kinds.number(op, "softcap", softcap),
        None if logit_scale is None else kinds.number(op, "logit_scale", logit_scale),
        frozenset(names),
    )
    if not 0 <= o.label_smoothing <= 1:
        raise RuntimeError(f"regfast.{op}: label_smoothing: expected a number from 0 to 1, got {o.label_smoothing}")
    if o.softcap is not None and not o.softcap > 0:
        raise RuntimeError(f"regfast.{op}: softcap: expected a positive number or None, got {o.softcap}")
    return o


def require_loss_dtype(op: str, dtype: torch.dtype | None) -> None:
    if kinds.dtype(op, "loss_dtype", dtype) not in (None, *FLOATING):
        raise RuntimeError(
            f"regfast.{op}: loss_dtype: expected float32, float64, bfloat16, float16 or None, got {dtype}"
        )


def require_target(op: str, shape: torch.Size, logits_shape: torch.Size, target: Tensor) -> bool:
    """Whether target holds probabilities; if it is neither these nor classes of rows, an error."""
    if target.is_floating_point() and target.shape == logits_shape:
        return True
    if target.shape != shape or target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise RuntimeError(
            f"regfast.{op}: target: expected class indices {tuple(shape)} of an integer type or probabilities "
            f"{tuple(logits_shape)} of a floating one, got {target.dtype} {tuple(target.shape)}"
        )
    return False


def require_class_weight(op: str, weight: Tensor | None, classes: int, like: Tensor) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise not_a_tensor(op, weight=weight)
    if weight.requires_grad:
        raise RuntimeError(f"regfast.{op}: weight: expected one without gradient, got one with it")
    if weight.shape != (classes,) or not weight.is_floating_point() or weight.device != like.device:
        raise RuntimeError(
            f"regfast.{op}: weight: expected one number for each of this rank's {classes} classes, floating and on "
            f"{like.device}, got {weight.dtype} {tuple(weight.shape)} on {weight.device}"
        )


def call_of(
    op: str,
    input: Tensor,
    shape: tuple[Any, ...],
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    normalizer: float | Tensor | None,
    **others: object,
) -> dict[str, object]:
    """What has to be the same on all ranks."""
    return {
        "input": f"{input.dtype} {shape}",
        "target": "probabilities" if target.is_floating_point() else "classes",
        "weight": weight is not None,
        **options._asdict(),
        "outputs": tuple(sorted(options.outputs)),
        "normalizer": None if normalizer is None else kinds.number(op, "normalizer", normalizer),
        **others,
    }


def in_one_type(input: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits and probabilities in the wider type, which is float64 if the weights are."""
    if not target.is_floating_point():
        return input, target
    wide = torch.promote_types(input.dtype, target.dtype)
    if weight is not None and weight.dtype == torch.float64:
        wide = torch.float64
    return input.to(wide), target.to(wide)


def checked_options(
    op: str,
    tensors: dict[str, object],
    reduction: str,
    outputs: str | tuple[str, ...],
    normalizer: float | Tensor | None,
    loss_dtype: torch.dtype | None,
    *numbers: Any,
) -> tuple[list[str], Options, Any, Any]:
    """What both losses ask of their arguments before they look at shapes: the outputs' names in the kernels' order, the
    options of ``numbers``, and what :func:`select_outputs` tells of the result."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise not_a_tensor(op, **{name: value})
    reduction_number(op, reduction)
    bits, result, places = select_outputs(op, outputs)
    names = [name for bit, name in enumerate(OUTPUTS) if bits >> bit & 1]
    if normalizer is not None:
        require_normalizer(op, normalizer, reduction)
    options = options_of(op, names, *numbers)
    require_loss_dtype(op, loss_dtype)
    return names, options, result, places


class _Options(LossOptions, total=False):
    """Keywords that say nothing of the result's type."""

    group: GroupOrMesh
    ignore_index: int
    reduction: Reduction
    label_smoothing: float
    inplace_backward: bool


@overload
def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    outputs: Output | tuple[Output] = ...,
    **further: Unpack[_Options],
) -> Tensor: ...
@overload
def vocab_parallel_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, outputs: Several, **further: Unpack[_Options]
) -> CrossEntropyOutput: ...
@overload
def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    outputs: Output | tuple[Output, ...],
    **further: Unpack[_Options],
) -> Tensor | CrossEntropyOutput: ...
@outside_of_graphs
def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    group: GroupOrMesh = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    outputs: Output | tuple[Output, ...] = LOSS,
    inplace_backward: bool = False,
    loss_dtype: torch.dtype | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor | CrossEntropyOutput:
    """:func:`regfast.cross_entropy` of logits of which each rank of a group has those of its own classes.

    Classes are numbered in the order of the ranks, any number on each, also none. All ranks call it together with the
    same rows and options, and have the same results, in bits. The method is that of Shoeybi et al., "Megatron-LM"
    (2019), from statistics of slices: two collectives in forward, of maxima and of sums, none in backward.

    Args:
        input: logits of this rank's classes, ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``, any strides; float32, float64,
            bfloat16 or float16. C may differ from rank to rank.
        target: of the whole vocabulary, the same on all ranks: class indices of any integer type, input's shape without
            C; or this rank's part of probabilities, of input's shape and any floating dtype.
        weight: of each of this rank's classes, ``(C)``, of any floating dtype, without gradient.
        group: a process group, a DeviceMesh of one dimension, or None for all ranks.
        ignore_index, reduction, z_loss, softcap, logit_scale, outputs, inplace_backward, loss_dtype: as in
            :func:`regfast.cross_entropy`. argmax is a class of the whole vocabulary.
        label_smoothing: spread over the whole vocabulary.
        normalizer: what the sum of the losses is divided by instead of the mean's own denominator: a number, or a
            tensor of one.

    Returns:
        The tensor for one name, a named tuple for several; each as on a single process with all classes.

    Raises:
        IndexError: on all ranks, if any has a class out of range. RuntimeError: for shapes, dtypes or options that do
            not fit, or are not the same on all ranks; and where a collective fails or reaches the group's timeout.
        NotImplementedError: for second derivatives, forward mode, torch.func, and devices without our kernels.

    Sent for each row, in float32 (float64 for float64): its maximum; then the sum of exponentials and, if loss or
    logprob is wanted, the logit of the target: 4 and 8 bytes of float32. One number more for each of class weights,
    entropy, logprob beside a loss that is smoothed or weighted, and probabilities (two with logprob). argmax widens the
    maximum to 8 bytes, and of float64 takes a third collective of 8. Each message ends in a few numbers for each rank,
    which tell how many classes it has, whether it makes the same call, and whether its targets are classes. On a GPU
    the host waits for them.

    Saved for backward: input, probabilities and weight, and per row the statistics of the whole row, its class here and
    the weight of it. Nothing of input's size is allocated but its gradient. Compiled code breaks its graph here.
    """
    return losses_of_slices(
        input,
        target,
        weight,
        group=group,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        outputs=outputs,
        inplace_backward=inplace_backward,
        loss_dtype=loss_dtype,
        normalizer=normalizer,
    )


def losses_of_slices(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    group: object,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float | None,
    outputs: str | tuple[str, ...],
    inplace_backward: bool,
    loss_dtype: torch.dtype | None,
    normalizer: float | Tensor | None,
    row_groups: Sequence[object] = (),
) -> Any:
    """:func:`vocab_parallel_cross_entropy` of a part of the rows, of which each rank of ``row_groups`` has another: a
    mean is this part's share of that over all."""
    names, options, result, places = checked_options(
        _OP, {"input": input, "target": target}, reduction, outputs, normalizer, loss_dtype,
        ignore_index, label_smoothing, z_loss, softcap, logit_scale,
    )  # fmt: skip
    kinds.boolean(_OP, "inplace_backward", inplace_backward)
    refuse_transforms(_OP, input, target, weight)
    if input.dtype not in FLOATING or input.dim() == 0:
        raise NotImplementedError(
            f"regfast.{_OP}: input: expected float32, float64, bfloat16 or float16 with a dimension of classes, got "
            f"{input.dtype} {tuple(input.shape)}"
        )
    require_kernels(_OP, input)
    shape, dim = row_shape(input), class_dim(input)
    require_target(_OP, shape, input.shape, target)
    require_class_weight(_OP, weight, input.shape[dim], input)
    if inplace_backward and input.requires_grad and input.is_leaf:
        raise RuntimeError(
            f"regfast.{_OP}: inplace_backward: expected an input that is not a leaf, got a leaf that requires grad, "
            "whose data its gradient would replace"
        )
    of_group = Group(_OP, group)
    whole = tuple("classes" if d == dim else size for d, size in enumerate(input.shape))
    further = {"reduction": reduction, "loss_dtype": loss_dtype}
    call = call_of(_OP, input, whole, target, weight, options, normalizer, **further)
    of_group.compare(call)
    types = result_types(input, target, weight)
    logits, target = in_one_type(input, target, weight)
    rows: Any = _Rows
    *tensors, counts = rows.apply(logits, target, weight, of_group, options, call, inplace_backward)
    if "loss" in names and reduction != "none":
        tensors[0] = reduced(tensors[0].sum(dtype=torch.float64), counts, reduction, normalizer, row_groups)
    tensors = [
        t if name == "argmax" else t.to(loss_dtype or types[name]) for name, t in zip(names, tensors, strict=True)
    ]
    return tensors[0] if result is None else result(*(tensors[i] for i in places))


class VocabParallelCrossEntropyLoss(OfGroup):
    """:func:`vocab_parallel_cross_entropy` with its options; ``weight`` is that of this rank's classes."""

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None, *, group: Any = None, **options: Any) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.group, self.options = group, options

    def forward(self, input: Tensor, target: Tensor, *, normalizer: float | Tensor | None = None) -> Any:
        return vocab_parallel_cross_entropy(
            input, target, self.weight, group=self.group, normalizer=normalizer, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
