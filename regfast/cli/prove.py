"""Proves the CUDA kernels on this machine's GPU, which turns them on."""

from __future__ import annotations

import argparse

import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no options yet."""


def run(args: argparse.Namespace) -> int:
    """2 where there is nothing to prove."""
    if not torch.cuda.is_available():
        print(f"regfast prove: expected an NVIDIA GPU, torch {torch.__version__} finds none")
        return 2
    raise NotImplementedError
