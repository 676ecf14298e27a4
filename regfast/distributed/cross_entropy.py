"""Softmax cross-entropy of logits whose classes are divided among the ranks of a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor

from .. import kinds
from ..outputs import LOSS, CrossEntropyOutput
from ..reference import divided, result_types
from ..types import LossOptions, Output, Reduction, Several
from .arguments import FLOATING, call_of, checked_options, in_one_type, require_class_weight, require_target
from .gradients import slice_gradient
from .groups import Group, outside_of_graphs, refuse_second_derivatives, refuse_transforms, require_kernels
from .rows import Options, Saved, bad_targets, class_dim, row_shape
from .slices import Slice

if TYPE_CHECKING:
    from .groups import GroupOrMesh

_OP = "vocab_parallel_cross_entropy"


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
        counts = part.saved.row_weights()
        ctx.mark_non_differentiable(counts, *(r for r in results if not r.is_floating_point()))
        return (*results, counts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        refuse_second_derivatives(ctx.group.op, *grads)
        logits, probabilities, weight, *saved = ctx.saved_tensors
        upstream = dict(zip(ctx.names, grads, strict=False))
        upstream.pop("argmax", None)
        needs = ctx.needs_input_grad
        dx, dt = slice_gradient(
            upstream, logits, probabilities, weight, Saved(*saved), ctx.options, ctx.vocabulary,
            in_place=ctx.in_place and needs[0], wants=needs[:2],
        )  # fmt: skip
        return dx if needs[0] else None, dt if needs[1] else None, None, None, None, None, None


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
    entropy, smoothing beside logprob, and probabilities (beside logprob one more if smoothed, two if weighted): at most
    16 bytes, but 20 where classes are weighted and smoothed and loss, logprob and entropy are wanted, and 20 or 24 for
    probabilities that are weighted, or smoothed with entropy, where loss and logprob are. argmax widens the maximum to
    8 bytes, and of float64 takes a third collective of 8. Each message ends in a few numbers for each rank, which tell
    how many classes it has, whether it makes the same call, and whether its targets are classes. On a GPU the host
    waits for them.

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
