"""Prints what runs here, for a bug report: versions, kernels, paths, settings.

Nothing is sent anywhere. --json prints the same for programs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import torch

import regfast

from .. import _C, _environment

# Besides regfast's own variables, those that change how fast or on how many threads anything runs.
OTHERS = (
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_SPINCOUNT", "KMP_AFFINITY", "KMP_BLOCKTIME",
    "MKL_NUM_THREADS", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "THP_MEM_ALLOC_ENABLE",
    "LD_PRELOAD", "MALLOC_CONF", "CUDA_VISIBLE_DEVICES", "TORCH_DISTRIBUTED_DEBUG",
)  # fmt: skip


def _file(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def processor() -> str:
    """The CPU's name, where the system tells it."""
    names = [line.partition(":")[2].strip() for line in _file("/proc/cpuinfo").splitlines() if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def huge_pages() -> str:
    """How the system gives huge pages: always, madvise or never; nothing where it does not say."""
    chosen = _file("/sys/kernel/mm/transparent_hugepage/enabled").partition("[")[2].partition("]")[0]
    return chosen or "unknown"


def collect() -> dict[str, dict[str, str]]:
    """All of it, by section and by name."""
    built, pool = regfast.build_info(), regfast.memory.stats()
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "versions": {
            "regfast": regfast.__version__,
            "torch": torch.__version__,
            "built against torch": built["torch"],
            "built by": built["compiler"],
            "Python": sys.version.split()[0],
            "system": platform.platform(),
        },
        "machine": {
            "CPU": processor(),
            "logical CPUs": str(os.cpu_count()),
            "threads of torch": str(torch.get_num_threads()),
            "torch's CPU capability": torch.backends.cpu.get_cpu_capability(),
            "huge pages": huge_pages(),
            "GPUs": ", ".join(gpus) or "none that torch finds",
        },
        "kernels": {
            "instruction set": built["isa"],
            "others that run here": ", ".join(isa for isa in built["isas"] if isa != built["isa"]),
            **{f"products of {dtype}": who for dtype, who in built["linear"].items()},
            "CUDA kernels": "built" if built["cuda"] else "not built",
            **{f"CUDA kernels on {device}": state for device, state in built["cuda_kernels"].items()},
            "memory kept for results": f"{pool.limit / 2**20:.0f} MiB at most" if pool.limit else "none",
        },
        "paths": {
            "package": str(Path(regfast.__file__).parent),
            "extension": _C.__file__,
            "torch": str(Path(torch.__file__).parent),
        },
        "environment": {
            **{name: os.environ[name] for name in (*_environment.MEANINGS, *OTHERS) if name in os.environ},
            **{name: f"is as if not set: {wrong}" for name, wrong in _environment.refused.items()},
        },
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    sections = collect()
    if args.json:
        print(json.dumps(sections, indent=2))
        return 0
    for title, entries in sections.items():
        print(title)
        for name, value in (entries or {"nothing set": ""}).items():
            print(f"  {name:24} {value}".rstrip())
    return 0
