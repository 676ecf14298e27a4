"""Which CUDA kernels are in use: the answer to C++ when the first tensor of a device comes, and to build_info()."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field

import torch

from .. import _C
from . import store
from .machine import Machine

COMMAND = "python -m regfast prove"
_warned: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Decision:
    """The ops whose kernels are in use on a device, what was chosen for their products, and why."""

    ops: list[str]
    choices: dict[str, str]
    why: str
    # What a user should know who has not asked for this.
    warning: str = field(default="", compare=False)
    gpu: str = ""  # which, where it is known


def forced() -> bool | None:
    """What REGFAST_CUDA_KERNELS says, which is heard before any proof."""
    said = os.environ.get("REGFAST_CUDA_KERNELS", "")
    return None if said == "" else said == "1"


def is_built() -> bool:
    return _C.build_info()["cuda"]


def devices() -> int:
    """How many CUDA devices torch finds; asking them for nothing leaves them alone."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def decide(machine: Machine) -> Decision:
    """What is in use on a device of a build that has CUDA kernels."""
    asked = forced()
    if asked is False:
        return Decision([], {}, "off: REGFAST_CUDA_KERNELS=0")
    if asked:
        return Decision(list(_C.CUDA_OPS), _choices_at_hand(machine), "on: REGFAST_CUDA_KERNELS=1")
    command = COMMAND + (f" --device {machine.index}" if machine.index else "")
    try:
        identity = machine.identity()
    except Exception as error:  # a device that cannot even be asked for its name
        return Decision([], {}, f"off: {type(error).__name__}: {error}")
    try:
        proof = store.read(identity)
    except store.NoProof as none:
        turn_on = f"{command} checks the kernels on this GPU, in a process of its own, and turns them on"
        cause = f"an ignored file: {none}" if none.corrupt else str(none)
        warning = f"CUDA tensors take plain PyTorch, for {cause}; {turn_on}; REGFAST_CUDA_KERNELS=0 keeps this quiet"
        return Decision([], {}, f"off: {none}; {turn_on}", warning, str(identity))
    except Exception as error:  # a device that cannot even be asked for its name
        return Decision([], {}, f"off: {type(error).__name__}: {error}")
    why = f"on by the proof of {proof.date}: {', '.join(proof.proven) or 'nothing'}"
    if left := [f"{op} ({reason})" for op, reason in proof.ops.items() if reason]:
        why += f"; on PyTorch: {', '.join(left)}"
    if rows := [what for what in proof.choices if is_about_rows(what)]:
        why += f"; PyTorch's for rows: {', '.join(rows)}"
    return Decision(proof.proven, proof.choices, why)


def is_about_rows(choice: str) -> bool:
    """Rather than about products: "softmax long few", which is PyTorch's where a proof has it."""
    return choice.partition(" ")[0] in _C.CUDA_ROW_OPS


def _choices_at_hand(machine: Machine) -> dict[str, str]:
    """For kernels that are on whatever a proof says: whose products are fastest, and no rows for PyTorch."""
    try:
        proof = store.read(machine.identity())
    except Exception:  # without a proof products are ATen's
        return {}
    return {what: chosen for what, chosen in proof.choices.items() if not is_about_rows(what)}


def answer(device: int) -> None:
    """Called by csrc/shared/cuda_kernels.cpp, and calls it, when a device's first tensor meets an op."""
    if not is_built() or not devices():  # a tensor of a device that is not there: it is a fake one
        _C.use_cuda_kernels(device, [], [])
        return
    decision = decide(Machine(device))
    warning = decision.warning
    try:
        _C.use_cuda_kernels(device, decision.ops, list(decision.choices.items()))
    except ValueError as error:  # a choice that this build does not know: the file is not what prove writes
        _C.use_cuda_kernels(device, [], [])
        warning = f"CUDA tensors take plain PyTorch, for the proof is none of this build ({error}); run {COMMAND} again"
    # Once for all GPUs that are alike; the command names the first of them.
    about = (decision.gpu, warning if not decision.gpu else "")
    if warning and about not in _warned:
        _warned.add(about)
        warnings.warn(f"regfast: {warning}", stacklevel=2)


def state() -> dict[str, str]:
    """For build_info(): of each CUDA device which kernels are in use there, and why. Empty without kernels or GPU."""
    return {f"cuda:{i}": decide(Machine(i)).why for i in range(devices() if is_built() else 0)}
