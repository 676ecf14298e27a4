"""The GPU that kernels are proven on: what tells it from others, and what a check may ask of it."""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import _C

if TYPE_CHECKING:  # every import of regfast comes here; only prove times
    from .timing import Clock


@dataclass(frozen=True)
class Identity:
    """What a proof is good for: a proof of anything else says nothing here."""

    gpu: str
    architecture: int  # 90 for compute capability 9.0
    driver: str
    build: str

    @property
    def file_name(self) -> str:
        return f"{slug(self.gpu)}-{slug(self.driver)}-{slug(self.build)}.json"

    def __str__(self) -> str:
        return f"{self.gpu}, driver {self.driver}, build {self.build}"


def slug(name: str) -> str:
    """The words of a name as they may stand in the name of a file. What else tells names apart stands in the file."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))[:80] or "unnamed"


def build() -> str:
    """The kernels' build: the extension's bytes, and the torch whose products and allocator it goes with."""
    return _digest(torch.__version__)


@functools.cache  # of tens of megabytes, for each of a machine's GPUs
def _digest(torch_version: str) -> str:
    digest = hashlib.sha256(torch_version.encode())
    digest.update(Path(_C.__file__).read_bytes())
    return digest.hexdigest()[:12]


def driver(version: Path = Path("/proc/driver/nvidia/version")) -> str:
    """As nvidia-smi has it, where Linux tells; else the CUDA version that the driver has."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", version.read_text(errors="replace"))
    except OSError:
        found = None
    # Only builds with CUDA have this one.
    return found[0] if found else f"cuda {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]


class Machine:
    """A CUDA device."""

    # What there is beside kernels: streams that run at the same time, graphs, calls that wait for the device.
    has_streams = True

    def __init__(self, index: int = 0):
        self.index = index
        self.place = torch.device("cuda", index)

    def identity(self) -> Identity:
        properties = torch.cuda.get_device_properties(self.index)
        return Identity(properties.name, 10 * properties.major + properties.minor, driver(), build())

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.index)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.index)[0]

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def is_lost(self) -> bool:
        """Whether the device has failed in a way that this process cannot recover from."""
        try:
            self.synchronize()
            return False
        except RuntimeError:
            return True

    def clock(self) -> Clock:
        from .timing import Clock

        return Clock(self.place)

    def ceilings(self, clock: Clock) -> dict[str, float]:
        from .timing import ceilings

        return ceilings(clock, self.place)

    def use(self, ops: list[str], choices: dict[str, str]) -> None:
        """Turns on the kernels of these ops in this process, whatever a proof or the environment says."""
        _C.use_cuda_kernels(self.index, ops, list(choices.items()))
