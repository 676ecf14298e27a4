"""The vocabulary-parallel losses as modules, and what copies and files of such a module have of its process group."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .cross_entropy import vocab_parallel_cross_entropy
from .groups import Group
from .linear_cross_entropy import vocab_parallel_linear_cross_entropy

if TYPE_CHECKING:
    from .groups import GroupOrMesh


class _OfGroup(nn.Module):
    """A module of a process group, which its copies share. In a file, all ranks are those of the process that reads it
    and a DeviceMesh is what torch makes of it there; of another group no other process knows anything."""

    group: GroupOrMesh

    def __copy__(self) -> _OfGroup:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> _OfGroup:
        memo[id(self.group)] = self.group
        memo[id(self)] = other = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if dist.is_available() and isinstance(self.group, dist.ProcessGroup):
            if self.group is not dist.group.WORLD:
                raise pickle.PicklingError(
                    f"regfast.{type(self).__name__}: group: expected None (all ranks) or a DeviceMesh in a module that "
                    f"is pickled, got a process group of {self.group.size()} ranks, which no other process can have; "
                    "save its state_dict, or set its group to None before it is pickled and to a group after"
                )
            state["group"] = None
        return state


class VocabParallelCrossEntropyLoss(_OfGroup):
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


class VocabParallelLinearCrossEntropyLoss(_OfGroup):
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
