"""Losses of a vocabulary that is divided among processes, on torch.distributed."""

from .cross_entropy import VocabParallelCrossEntropyLoss, vocab_parallel_cross_entropy

__all__ = ["VocabParallelCrossEntropyLoss", "vocab_parallel_cross_entropy"]
