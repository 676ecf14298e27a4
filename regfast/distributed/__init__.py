"""Losses of a vocabulary that is divided among processes, on torch.distributed."""

from .cross_entropy import vocab_parallel_cross_entropy
from .linear_cross_entropy import vocab_parallel_linear_cross_entropy
from .modules import VocabParallelCrossEntropyLoss, VocabParallelLinearCrossEntropyLoss

__all__ = [
    "VocabParallelCrossEntropyLoss",
    "VocabParallelLinearCrossEntropyLoss",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
]
