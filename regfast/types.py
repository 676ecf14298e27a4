"""Types of arguments that are one of a few names, for annotations; a test compares them with what the kernels have."""

from __future__ import annotations

from typing import Literal, TypedDict

import torch
from torch import Tensor

__all__ = ["Activation", "Family", "LossOptions", "Output", "Reduction", "Several"]

Activation = Literal["none", "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"]
Family = Literal["gaussian", "bernoulli", "poisson", "categorical"]
Output = Literal["loss", "lse", "entropy", "logprob", "argmax"]
Reduction = Literal["none", "mean", "sum"]
Several = tuple[Output, Output, *tuple[Output, ...]]  # two names at least: a result of several tensors


class LossOptions(TypedDict, total=False):
    """What all cross-entropies take as keywords beyond torch's own, :func:`regfast.cross_entropy` says what for."""

    z_loss: float
    softcap: float | None
    logit_scale: float | None
    loss_dtype: torch.dtype | None
    normalizer: float | Tensor | None
