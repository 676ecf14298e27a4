"""The CUDA kernels on the CPU, as a GPU that regfast.proof can prove: a worker of it is this file, run as a program.

    python tests/emulated_gpu.py cases|measure ...     as regfast.proof.worker, on the emulated device

PLANTED="softmax_forward wrong,linear_backward crash" in the environment plants faults in kernels: see FAULTS.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import time
import warnings
from pathlib import Path

import torch

from regfast.proof import measure, worker
from regfast.proof.cases import BF16, F32, Sizes
from regfast.proof.machine import Identity, Machine, build
from regfast.proof.measure import Shapes


def load_emulator():
    """cuda_on_host/extension.cpp, if it was built for this torch; after make test has built it, it has to be there."""
    path = Path(__file__).parent / "cuda_on_host" / "build" / f"torch-{torch.__version__}" / "cuda_on_host.so"
    if not path.exists():
        if os.environ.get("REGFAST_TEST_CUDA_ON_HOST") == "1":
            raise FileNotFoundError(f"{path}: the CUDA kernels on the CPU, which make test builds")
        return None
    loader = importlib.machinery.ExtensionFileLoader("cuda_on_host", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("cuda_on_host", loader))
    loader.exec_module(module)
    return module


def enable(emulator, schedule: str, architecture: int) -> None:
    """From now on ops of CPU tensors run the CUDA kernels."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # torch's, on overridden kernels
        emulator.enable(schedule, architecture)


# Enough to meet each kernel of each op once or twice, of two dtypes; the emulator takes a second for 100,000 elements.
SIZES = Sizes(
    dtypes=(F32, BF16),
    arithmetics=("float32", "bfloat16"),
    activations=("none", "gelu"),
    layouts=("aligned", "gaps"),
    rows=((37, 10), (3, 1025)),
    images=((2, 5, 3, 4),),
    options=((5, 33),),
    linear=((17, 30, 10),),
    heads=((130, 9, 12),),
    likelihoods=((20, 5, 7),),
    phm=((9, 16, 8, 4),),
    elements=((12, 101),),
    repeats=1,
    alone=False,
)
SHAPES = Shapes(
    bytes_of_logits=1 << 11,
    rows=(("short", 128), ("medium", 512)),
    few_rows=2,
    pixels=(1, 3, 4, 5),
    few_pixels=(1, 5, 2, 2),
    elements=500,
    activation=(8, 24),
    layer=(16, 8, 24),
    head=(130, 8, 24),
    likelihood=(16, 8, 12),
    phm=(8, 16, 8, 4),
    products=(("skinny", ((16, 8, 4),)), ("small", ((24, 16, 8),)), ("large", ((24, 16, 8),))),
)


class Clock:
    """Runs what it is to time, and answers what a test has planted: PyTorch takes so many times our time, and half of
    it for the rows of PLANTED_SLOW, "softmax short few,logsumexp medium"."""

    def __init__(self) -> None:
        self.ratio = float(os.environ.get("PLANTED_RATIO", "2"))
        self.slow = os.environ.get("PLANTED_SLOW", "").split(",")
        self.rows = ""  # what is timed next

    def interleaved(self, calls, rounds=25, seconds=1.5):
        for prepare in calls.values():
            prepare()()
        ratio = 0.5 if self.rows and self.rows in self.slow else self.ratio
        self.rows = ""
        return {name: [1e-3 if name == "regfast" else 1e-3 * ratio] * 3 for name in calls}


def measured(timed, shapes, clock, *rest):
    clock.rows = timed.rows
    return MEASURED(timed, shapes, clock, *rest)


MEASURED = measure.measured


class EmulatedGpu(Machine):
    has_streams = False

    def __init__(self, emulator, driver: str = "host"):
        self.index, self.place, self.emulator, self.driver = 0, torch.device("cpu"), emulator, driver

    def identity(self) -> Identity:
        return Identity("Emulated GPU", 80, self.driver, build())

    def synchronize(self) -> None: ...

    def empty_cache(self) -> None: ...

    def is_lost(self) -> bool:
        return bool(LOST)

    def clock(self) -> Clock:
        return Clock()

    def ceilings(self, clock) -> dict[str, float]:
        return {
            "copy_gb_s": 1.0,
            "read_gb_s": 1.0,
            **{f"gemm_{name}_tflop_s": 1.0 for name in ("bf16", "tf32", "fp32")},
        }

    def use(self, ops: list[str], choices: dict[str, str]) -> None:
        self.emulator.take_cuda_choices(list(choices.items()))


# Each is called with a result of the op that it is planted in.
def _wrong(y: torch.Tensor) -> None:
    y.flatten()[-1].add_(0.01)  # one element


def _beyond(y: torch.Tensor) -> None:
    y.as_strided((1,), (1,), y.storage_offset() + y.numel()).fill_(0)  # right, and one element more


def _other_bits(y: torch.Tensor) -> None:
    y.flatten()[0].mul_(1 + 2**-7 * (time.perf_counter_ns() % 1000) / 1e6)


def _crash(y: torch.Tensor) -> None:
    os.kill(os.getpid(), 11)


def _hang(y: torch.Tensor) -> None:
    time.sleep(1000)


def _raise(y: torch.Tensor) -> None:
    raise RuntimeError("CUDA error: invalid argument")


def _lose(y: torch.Tensor) -> None:  # the device, for the rest of the process
    LOST.append(True)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def _full(y: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


LOST: list[bool] = []
FAULTS = {
    name: globals()[f"_{name}"] for name in ("wrong", "beyond", "other_bits", "crash", "hang", "raise", "lose", "full")
}


def plant(kernels: str, fault: str) -> torch.library.Library:
    """In an op of the library, as "softmax_backward"."""
    right = torch.library.get_kernel(f"regfast::{kernels}", "CPU")

    def planted(keys, *args):
        result = right.call_boxed(keys, *args)
        FAULTS[fault](result if isinstance(result, torch.Tensor) else result[0])
        return result

    library = torch.library.Library("regfast", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        library.impl(kernels, planted, "CPU", with_keyset=True)
    return library


if __name__ == "__main__":
    EMULATOR = load_emulator()
    measure.measured = measured
    enable(EMULATOR, "forward", 80)
    KEPT = [plant(*entry.split(" ")) for entry in filter(None, os.environ.get("PLANTED", "").split(","))]
    sys.exit(worker.main(machine=EmulatedGpu(EMULATOR), sizes=SIZES, shapes=SHAPES))
