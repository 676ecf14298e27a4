"""``torch.onnx.export(dynamo=False)``, which traces: the layers and the softmax family in terms of PyTorch's operators.

The other exporter decomposes them by itself, losses too (_decompositions.py)."""

from __future__ import annotations

import functools
from typing import Any

OPSET = 13  # from here on, softmax has torch's meaning; later opsets take the same functions


@functools.cache
def register() -> None:
    """Tells the exporter about our ops. It is slow to import, so this waits until something is traced."""
    from torch.onnx import register_custom_op_symbolic, symbolic_helper, symbolic_opset9, symbolic_opset13

    activations = {
        "relu": symbolic_opset9.relu,
        "gelu": lambda graph, x: symbolic_opset9.gelu(graph, x, "none"),
        "gelu_tanh": lambda graph, x: symbolic_opset9.gelu(graph, x, "tanh"),
        "silu": symbolic_opset9.silu,
        "sigmoid": symbolic_opset9.sigmoid,
        "tanh": symbolic_opset9.tanh,
    }

    @symbolic_helper.parse_args("v", "v", "v", "s")
    def linear(graph: Any, input: Any, weight: Any, bias: Any, activation: str) -> Any:
        output = symbolic_opset9.linear(graph, input, weight, bias)
        return output if activation == "none" else activations[activation](graph, output)

    @symbolic_helper.parse_args("v", "i", "b")
    def softmax(graph: Any, input: Any, dim: int, log: bool) -> Any:
        return (symbolic_opset13.log_softmax if log else symbolic_opset13.softmax)(graph, input, dim)

    @symbolic_helper.parse_args("v", "i", "b")
    def logsumexp(graph: Any, input: Any, dim: int, keepdim: bool) -> Any:
        return symbolic_opset9.logsumexp(graph, input, [dim], int(keepdim))

    for function in (linear, softmax, logsumexp):
        register_custom_op_symbolic(f"regfast::{function.__name__}", function, OPSET)
