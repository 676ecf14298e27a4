"""The cross-entropy of a linear classifier whose classes are divided among the ranks of a process group."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor

from .. import kinds
from .._extension import not_a_tensor
from ..outputs import LOSS, CrossEntropyOutput
from ..reference import _autocast, result_types
from ..types import LossOptions, Output, Reduction, Several
from .arguments import FLOATING, call_of, checked_options, require_class_weight, require_target
from .chunks import Chunks, Rows, SumOfLosses
from .cross_entropy import reduced
from .groups import Group, outside_of_graphs, refuse_transforms, require_kernels

if TYPE_CHECKING:
    from .groups import GroupOrMesh

_OP = "vocab_parallel_linear_cross_entropy"


def _default_budget() -> int:
    """That of linear_cross_entropy on the CPU."""
    return min((32 << 20) * (os.cpu_count() or 1), 1 << 30)


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
            default 32 MiB for each core of the machine, and 1 GiB at most; up to 2% more where that saves a chunk. At
            least 16 rows are computed at a time.
        sequence_parallel: input is this rank's part of dimension 0 of the rows, as many rows on all ranks, in the order
            of ranks; target is whole. Chunks of input are gathered, those of dX reduced and scattered. Ignored rows
            take part in the products then: NaN in one makes the weight's gradient NaN, as in torch.

    Returns:
        The tensor for one name, a named tuple for several, for all rows; each as on a single process.

    Raises: as :func:`vocab_parallel_cross_entropy`.

    Saved for backward: the gradients of a sum or mean alone (argmax at most besides), in float32 for half types; their
    upstream gradient multiplies them. Otherwise the inputs and each row's statistics, from which backward multiplies
    the logits again; so do calls under saved tensor hooks (a checkpoint's). Rows that are ignored cost nothing, unless
    lse, entropy or argmax is wanted or sequence_parallel is set. Half types are multiplied where they lie, into
    float32; where the CPU multiplies pairs of bfloat16 (AVX512-BF16, AMX), the logits' gradient is rounded to it
    for its products. Beside the messages of :func:`vocab_parallel_cross_entropy`, whose header goes ahead once for
    all chunks, dX is all that is sent; the class weight of the one call that has five sums goes with the maxima.
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
    p = Chunks(
        of_group, vocabulary, options, x.detach(), w.detach(), None if bias is None else bias.detach(), target.detach(),
        weight, kept, sequence_parallel, budget,
    )  # fmt: skip
    in_one_pass: Any = SumOfLosses
    rows: Any = Rows
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
