"""A proof, a GPU that is not there, and its first tensors, for the tests of what a proof turns on."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import regfast
from regfast import _C
from regfast._paths import recorded
from regfast.proof import decide, machine, store
from regfast.proof.machine import Identity

GPU = Identity("NVIDIA H200", 90, "580.95.05", "0123456789ab")
OPS = dict.fromkeys(_C.CUDA_OPS, "")


def proof_of(identity=GPU, **changes):
    changes = {"ops": {**OPS, "softmax": "wrong"}, "choices": {"bfloat16 large": "sm90"}, **changes}
    return store.Proof(identity, "2026-11-29", **changes)


@pytest.fixture(autouse=True)
def proofs(tmp_path, monkeypatch):
    monkeypatch.setenv("REGFAST_PROOFS", str(tmp_path / "proofs"))
    monkeypatch.delenv("REGFAST_CUDA_KERNELS", raising=False)
    monkeypatch.setattr(decide, "_warned", set())
    return tmp_path / "proofs"


@pytest.fixture
def gpu(monkeypatch):
    """Devices that are asked about as if they were there. What C++ is told of a number stays, so each has another."""

    class Pretended(machine.Machine):
        def identity(self):
            return GPU

    monkeypatch.setattr(decide, "Machine", Pretended)
    monkeypatch.setattr(decide, "is_built", lambda: True)
    monkeypatch.setattr(decide, "devices", lambda: 1)
    gpu.number = getattr(gpu, "number", 8) + 1
    return gpu.number


def in_use(device):
    return {op for op in _C.CUDA_OPS if _C.cuda_kernels_in_use(op, device)}


# Each op once, of tensors that are made by what it is given.
CALLS = {
    "linear": lambda t: regfast.linear(t(4, 8), t(6, 8), t(6)),
    "softmax": lambda t: regfast.softmax(t(4, 8), 0),
    "log_softmax": lambda t: regfast.log_softmax(t(4, 8), -1),
    "logsumexp": lambda t: regfast.logsumexp(t(4, 8), 0),
    "cross_entropy": lambda t: regfast.cross_entropy(t(4, 8), t(4, dtype=torch.int64)),
    "linear_cross_entropy": lambda t: regfast.linear_cross_entropy(t(4, 8), t(6, 8), t(4, dtype=torch.int64)),
    "linear_nll": lambda t: regfast.linear_mse_loss(t(4, 8), t(6, 8), t(4, 6), t(6)),
    "phm_linear": lambda t: regfast.phm_linear(t(4, 8), t(2, 2, 2), t(2, 3, 4), t(6)),
    "mse_loss": lambda t: regfast.mse_loss(t(4, 8), t(4, 8)),
}


@pytest.fixture
def first_tensors(gpu):
    """Ops of fake tensors that say that they are on the GPU: by the dispatcher, C++ and Python."""
    if torch.cuda.is_available():
        pytest.skip("where there is a GPU, a fake tensor is on it or on none")
    asked = []
    _C.ask_about_cuda_kernels(lambda device: (asked.append(device), decide.answer(device)))

    def call(*ops):
        with FakeTensorMode(), recorded() as calls:
            for op in ops:
                CALLS[op](partial(torch.empty, device=f"cuda:{gpu}"))
        return asked, [(call.op, call.why) for call in calls if call.path == "composite"]

    yield call
    _C.ask_about_cuda_kernels(decide.answer)
