"""regfast: fast drop-in PyTorch operators for fully connected layers and the losses on top of them."""

from . import _decompositions, _dtensor, _flops, distributed, memory, reference  # noqa: F401
from ._extension import build_info, isa, isas
from .accelerate import accelerate, restore
from .cross_entropy import CrossEntropyLoss, cross_entropy
from .lazy import LazyHead, LazyLogits, lazy_logits
from .linear import Linear, LinearActivation, linear
from .linear_cross_entropy import LinearCrossEntropyLoss, Plan, linear_cross_entropy, linear_cross_entropy_plan
from .linear_nll import LinearNLLLoss, linear_mse_loss, linear_nll
from .mse_loss import MSELoss, mse_loss
from .outputs import CrossEntropyOutput
from .phm_linear import PHMLinear, phm_linear
from .replace import Replacement, replace
from .softmax import log_softmax, logsumexp, softmax

__version__ = "0.1.0"
__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyOutput",
    "LazyHead",
    "LazyLogits",
    "Linear",
    "LinearActivation",
    "LinearCrossEntropyLoss",
    "LinearNLLLoss",
    "MSELoss",
    "PHMLinear",
    "Plan",
    "Replacement",
    "accelerate",
    "build_info",
    "cross_entropy",
    "distributed",
    "isa",
    "isas",
    "lazy_logits",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_plan",
    "linear_mse_loss",
    "linear_nll",
    "log_softmax",
    "logsumexp",
    "memory",
    "mse_loss",
    "phm_linear",
    "reference",
    "replace",
    "restore",
    "softmax",
]
