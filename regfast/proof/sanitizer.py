"""compute-sanitizer, where it is installed. bench/gpu.py takes this file alone, before there is a build."""

from __future__ import annotations

import os
import shutil


def sanitizer_prefix(tool: str) -> list[str]:
    """compute-sanitizer's tool (memcheck, racecheck), looking at our own kernels and at no calls of the driver, since
    others' faults are not ours to find; options that a command can follow. Nothing where it is not installed."""
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=toolkit)
    if not program:
        return []
    options = ["--tool", tool, "--kernel-regex", "kns=_ZN2rf4cuda"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [program, *options, "--error-exitcode", "1"]
