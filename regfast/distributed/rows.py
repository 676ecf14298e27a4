"""What there is to know of rows whose classes lie on several ranks: options, shapes, types, and what backward needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .groups import Vocabulary

NO_CLASS = -100  # of rows whose class is on another rank or nowhere, in what the kernels are given


class Options(NamedTuple):
    """Those of cross_entropy that say what a row's outputs are."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float | None
    outputs: frozenset[str]


def sum_type(dtype: torch.dtype) -> torch.dtype:
    """What statistics of logits of a dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def class_dim(logits: Tensor) -> int:
    return 1 if logits.dim() > 1 else 0


def row_shape(logits: Tensor) -> torch.Size:
    dim = class_dim(logits)
    return logits.shape[:dim] + logits.shape[dim + 1 :]


def holds_probabilities(logits: Tensor, target: Tensor) -> bool:
    return target.is_floating_point() and target.shape == logits.shape


class Saved(NamedTuple):
    """What the gradient of a slice is computed from, besides logits, probabilities and class weights: numbers of
    each row, and of the whole vocabulary."""

    stats: Tensor  # as the kernels have them: maximum, log of the sum, entropy, mass, mass of the target
    classes: Tensor | None  # of rows whose class is of this slice its number there; not of probabilities
    valid: Tensor | None  # not ignored
    class_weight: Tensor | None  # of the row's class, 0 where ignored
    weight_sum: Tensor  # of all classes

    def row_weights(self) -> Tensor:
        """Each row's term of the mean's denominator."""
        if self.valid is None:
            return torch.ones_like(self.stats[0])
        return self.valid.to(self.stats.dtype) if self.class_weight is None else self.class_weight

    def part(self, begin: int, end: int) -> Saved:
        """Of a part of the rows."""

        def rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[begin:end]

        stats = self.stats[:, begin:end].contiguous()
        return Saved(stats, rows(self.classes), rows(self.valid), rows(self.class_weight), self.weight_sum)


def bad_targets(target: Tensor | None, options: Options, vocabulary: Vocabulary) -> Tensor | None:
    """Rows whose target is neither a class nor ignored."""
    if target is None:
        return None
    return (target != options.ignore_index) & ((target < 0) | (target >= vocabulary.total))
