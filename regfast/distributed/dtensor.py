"""Cross-entropies of DTensors: classes that are sharded over one dimension of a mesh are one vocabulary in parts, rows
that are sharded over others are computed where they are, and a mean takes a sum of their counts.

Plain tensors beside a DTensor are what this process has: whole, or its part of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .._extension import reduction_number
from ..cross_entropy import cross_entropy as whole_cross_entropy
from ..linear_cross_entropy import linear_cross_entropy as whole_linear_cross_entropy
from ..outputs import select_outputs
from . import cross_entropy as logits_of_slices
from . import linear_cross_entropy as linear_of_slices
from .groups import group_of_mesh
from .rows import class_dim


class _Layout:
    """How logits lie on a mesh: rows over some of its dimensions, classes over at most one."""

    def __init__(self, op: str, mesh: Any, placements: Sequence[Placement], classes: int) -> None:
        self.op, self.mesh = op, mesh
        by_class = [i for i, p in enumerate(placements) if p.is_shard(classes)]
        if len(by_class) > 1:
            raise NotImplementedError(
                f"regfast.{op}: expected classes that are sharded over one dimension of the mesh, got "
                f"{tuple(placements)} of {mesh}"
            )
        self.class_axis = by_class[0] if by_class else None
        # Sums that are not yet complete, and anything else, become whole.
        self.logits: list[Any] = [p if type(p) is Shard else Replicate() for p in placements]
        self.row_axes = [i for i, p in enumerate(self.logits) if p.is_shard() and i != self.class_axis]
        # Of tensors with a number for each row.
        self.rows: list[Placement] = [
            Shard(p.dim - (p.dim > classes)) if i in self.row_axes else Replicate() for i, p in enumerate(self.logits)
        ]

    @property
    def class_group(self) -> Any:
        return None if self.class_axis is None else group_of_mesh(self.op, self.mesh, self.class_axis)

    @property
    def row_groups(self) -> list[Any]:
        return [self.mesh.get_group(axis) for axis in self.row_axes]

    def _only(self, axes: Sequence[int], placement: Placement) -> list[Placement]:
        return [placement if i in axes else Replicate() for i in range(self.mesh.ndim)]

    def by_class(self) -> list[Placement]:
        """Of tensors with a number for each class."""
        return self._only([] if self.class_axis is None else [self.class_axis], Shard(0))

    def parameters(self) -> list[Placement]:
        """Of gradients of such tensors: sums over the rows, of which each rank has a part."""
        return [Partial() if i in self.row_axes else p for i, p in enumerate(self.by_class())]

    def local(
        self,
        name: str,
        t: Any,
        placements: list[Placement],
        part: torch.Size | None = None,
        grads: Any = None,
    ) -> Any:
        """This process's part of a tensor. ``part`` is its shape, by which a plain tensor is known to be that part."""
        if t is None or (not isinstance(t, DTensor) and (part is None or t.shape == part)):
            return t
        if not isinstance(t, DTensor):
            t = DTensor.from_local(t, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        if t.device_mesh != self.mesh:
            raise RuntimeError(
                f"regfast.{self.op}: {name}: expected a DTensor on {self.mesh}, got one on {t.device_mesh}"
            )
        return t.redistribute(placements=placements).to_local(grad_placements=grads)

    def result(self, name: str, t: Tensor, reduction: str, shape: torch.Size) -> DTensor:
        """A DTensor of what each process has: numbers of its rows, or its share of a sum."""
        if name != "loss" or reduction == "none":
            stride = torch.empty(shape, device="meta").stride()
            return DTensor.from_local(t, self.mesh, self.rows, run_check=False, shape=shape, stride=stride)
        total = DTensor.from_local(t, self.mesh, self._only(self.row_axes, Partial()), run_check=False)
        return total if reduction == "sum" else total.redistribute(placements=[Replicate()] * self.mesh.ndim)


def _finish(layout: _Layout, results: Any, outputs: Any, reduction: str, shape: torch.Size) -> Any:
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    values = [results] if isinstance(results, Tensor) else list(results)
    values = [layout.result(name, t, reduction, shape) for name, t in zip(names, values, strict=True)]
    _, kind, _ = select_outputs(layout.op, outputs)
    return values[0] if kind is None else kind(*values)


def _number(normalizer: float | Tensor | None) -> float | Tensor | None:
    return normalizer.full_tensor() if isinstance(normalizer, DTensor) else normalizer


def cross_entropy(
    input: DTensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    reduction: str,
    outputs: Any,
    normalizer: Any,
    **options: Any,
) -> Any:
    """:func:`regfast.cross_entropy` of logits that are sharded by class, by row or by both."""
    op = "cross_entropy"
    reduction_number(op, reduction)
    dim = class_dim(input)
    layout = _Layout(op, input.device_mesh, input.placements, dim)
    logits = input.redistribute(placements=layout.logits).to_local(grad_placements=layout.logits)
    if target.is_floating_point() and target.shape == input.shape:
        target = layout.local("target", target, layout.logits, logits.shape)
    else:
        target = layout.local("target", target, layout.rows, logits.shape[:dim] + logits.shape[dim + 1 :])
    weight = layout.local("weight", weight, layout.by_class(), logits.shape[dim : dim + 1])
    normalizer = _number(normalizer)
    given = {"reduction": reduction, "outputs": outputs, **options}
    if layout.class_axis is not None:
        groups = {"group": layout.class_group, "row_groups": layout.row_groups}
        results = logits_of_slices.losses_of_slices(logits, target, weight, normalizer=normalizer, **groups, **given)
    else:
        if reduction == "mean" and normalizer is None:
            normalizer = _count(layout, target, weight, options["ignore_index"])
        results = whole_cross_entropy(logits, target, weight, normalizer=normalizer, **given)
    return _finish(layout, results, outputs, reduction, input.shape[:dim] + input.shape[dim + 1 :])


def linear_cross_entropy(
    input: Any,
    linear_weight: Any,
    target: Tensor,
    *,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    outputs: Any,
    filter_eps: float,
    normalizer: Any,
    **options: Any,
) -> Any:
    """:func:`regfast.linear_cross_entropy` of a weight whose classes are sharded, of sharded rows, or of both. With a
    plain input, which is this process's, results are plain."""
    op = "linear_cross_entropy"
    reduction_number(op, reduction)
    plain = not isinstance(input, DTensor)
    mesh = linear_weight.device_mesh if plain else input.device_mesh
    if plain and mesh.ndim > 1:
        raise NotImplementedError(
            f"regfast.{op}: input: expected a DTensor beside a linear_weight on a mesh of more than one dimension, got "
            f"a plain tensor and {mesh}"
        )
    last = input.dim() - 1
    placements: list[Placement] = [Replicate()] * mesh.ndim
    if not plain:
        placements = [Replicate() if p.is_shard(last) else p for p in input.placements]
    if isinstance(linear_weight, DTensor):
        by_class = [p.is_shard(0) for p in linear_weight.placements]
        placements = [Shard(last) if own else p for own, p in zip(by_class, placements, strict=True)]
    layout = _Layout(op, mesh, placements, last)
    if plain and layout.class_axis is None:
        # Each process may have rows of its own, whose gradients of a whole weight nothing would add up.
        raise NotImplementedError(
            f"regfast.{op}: input: expected a DTensor beside a linear_weight whose classes are not sharded, got a "
            f"plain tensor and {linear_weight.placements}"
        )
    x = layout.local("input", input, layout.rows, None if plain else torch.Size(), layout.rows)
    w = layout.local("linear_weight", linear_weight, layout.by_class(), None, layout.parameters())
    classes = w.shape[:1]
    bias = layout.local("linear_bias", linear_bias, layout.by_class(), None, layout.parameters())
    weight = layout.local("weight", weight, layout.by_class(), classes)
    if target.is_floating_point():
        target = layout.local("target", target, layout.logits, x.shape[:-1] + classes)
    else:
        target = layout.local("target", target, layout.rows, x.shape[:-1])
    normalizer = _number(normalizer)
    given = {"linear_bias": bias, "weight": weight, "reduction": reduction, "outputs": outputs, **options}
    if layout.class_axis is not None:
        results = linear_of_slices.losses_of_slices(
            x, w, target, group=layout.class_group, row_groups=layout.row_groups, sequence_parallel=False,
            ignore_index=-100 if ignore_index is None else ignore_index, normalizer=normalizer, **given,
        )  # fmt: skip
    else:
        if reduction == "mean" and normalizer is None:
            normalizer = _count(layout, target, weight, -100 if ignore_index is None else ignore_index)
        results = whole_linear_cross_entropy(
            x, w, target, ignore_index=ignore_index, filter_eps=filter_eps, normalizer=normalizer, **given
        )
    return results if plain else _finish(layout, results, outputs, reduction, input.shape[:-1])


def _count(layout: _Layout, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The denominator of a mean over all ranks' rows, of a part of them with all classes."""
    if target.is_floating_point():
        dim = class_dim(target)
        count = torch.tensor(target.shape[:dim].numel() * target.shape[dim + 1 :].numel(), device=target.device)
    else:
        valid = target != ignore_index
        # A class that is out of range is the loss's to refuse.
        terms = valid if weight is None else valid * weight[target.long().clamp(0, len(weight) - 1)].double()
        count = terms.sum()
    count = count.double()
    for group in layout.row_groups:
        dist.all_reduce(count, group=group)
    return count
