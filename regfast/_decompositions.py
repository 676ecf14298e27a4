"""Every op in terms of PyTorch's own, for what rewrites exported programs: run_decompositions, the ONNX exporter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import _extension  # noqa: F401  registers the ops

# Ops that users call. What they call in turn, forward and backward, never stands in an exported program.
_FRONT = (
    "linear",
    "phm_linear",
    "softmax",
    "logsumexp",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_nll",
    "mse_loss",
)


def _decomposition(op: torch._ops.OpOverload, composite: torch._ops.OpOverload) -> Callable[..., Any]:
    """The composite of an op, by the arguments that it has: those about memory and speed it has not."""
    names = [argument.name for argument in op._schema.arguments]
    taken = {argument.name for argument in composite._schema.arguments}

    def decompose(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        return composite(**{name: value for name, value in given.items() if name in taken})

    return decompose


# As a kernel that only Python's dispatcher knows: export's table takes in all ops that have one, while a call and
# torch.compile go on to the kernels at the keys of autograd and of devices, which come first.
for _name in _FRONT:
    _op = getattr(torch.ops.regfast, _name).default
    _op.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)(
        _decomposition(_op, getattr(torch.ops.regfast, f"composite_{_name}").default)
    )
