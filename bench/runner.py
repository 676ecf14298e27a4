"""Runs one case: checks it, times it against the others, in other environments too, and stores all in extra_info."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import harness
import machine
import psutil
import pytest
import torch
from harness import Case, Work

HUGE_PAGE = 2 << 20  # torch asks for huge pages only for allocations of at least this size

# Variables that must be set before torch starts, so the case runs again in a process of its own there.
ENVIRONMENTS = {
    "huge_pages": {"THP_MEM_ALLOC_ENABLE": "1"},
    # These stand for CPUs without bfloat16 instructions (AVX512-BF16, AMX): one with AVX-512, one with AVX2 only.
    "avx512_no_bf16": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "REGFAST_ISA": "avx512",
        "REGFAST_GEMM": "own",
    },
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "REGFAST_ISA": "avx2",
        "REGFAST_GEMM": "own",
    },
    # NumPy instead of PyTorch. Its OpenBLAS chooses its kernels itself: None leaves a variable out.
    "openblas": {"OPENBLAS_CORETYPE": None, "OPENBLAS_L2_SIZE": None},
}

WORKER_ARGUMENTS = {"openblas": ("--instead", "numpy")}


def check_same(work: Work, mode: str, dtype: torch.dtype) -> None:
    """A fast wrong answer is no result: regfast and eager agree to a few roundings in every output and gradient."""
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 5e-2)
    leaves = [x for x in work.inputs if x.requires_grad] if mode != "fwd" else []
    grad = None
    found = []
    for fn in (work.eager, work.regfast):
        out = fn(*work.inputs)
        if grad is None:
            grad = torch.rand_like(out) + 0.5  # not ones; and a single bfloat16 may be drawn as exactly 0
        found.append([out.detach(), *(torch.autograd.grad(out, leaves, grad) if leaves else [])])
    for theirs, ours in zip(*found, strict=True):
        theirs, ours = theirs.float(), ours.float()
        error = (torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)).item()
        assert error <= tolerance, f"regfast differs from PyTorch: relative error {error:.2e} > {tolerance:.0e}"


def in_subprocess(case: Case, module: str, variables: dict[str, str | None], *arguments: str) -> dict:
    """Runs the case in worker.py in a fresh process with these variables set (None: unset); returns what it prints."""
    worker = Path(__file__).with_name("worker.py")
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, str(worker), module, case.name, *arguments],
        env={k: v for k, v in {**os.environ, **variables, "PYTHONPATH": path}.items() if v is not None},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"worker.py failed for {case.name} with {variables}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def applies(environment: str, case: Case, isas: list[str]) -> bool:
    """Whether that environment can differ from the plain one for this case on this machine."""
    if environment == "huge_pages":
        return case.largest >= HUGE_PAGE
    if environment == "openblas":
        return "openblas" in machine.blas()
    return ENVIRONMENTS[environment]["REGFAST_ISA"] in isas


def summary(timing: dict[str, dict]) -> dict:
    return {
        "median_s": {name: row["median"] for name, row in timing.items()},
        "ratio": harness.ratios(timing),
        "rounds": len(timing["regfast"]["samples"]),
    }


def run_case(benchmark, case: Case, module: str) -> None:
    """The body of every benchmark. `module` is the bench file's name, from which worker.py imports the case again."""
    gc.collect()  # gigabytes of the case before may wait in a cycle
    torch.set_num_threads(machine.num_threads())
    torch.manual_seed(0)
    facts = machine.measure()
    # PyTorch has the logits, their logarithms and their gradient at one time.
    if case.vocabulary and 3.25 * case.largest > psutil.virtual_memory().available:
        pytest.skip(f"PyTorch's logits, {case.largest / 1e9:.1f} GB, do not fit this machine")
    work = case.build()
    check_same(work, case.mode, case.dtype)
    before = harness.evict if case.cold else None
    calls = harness.contestants(case, work, everyone=True)
    with machine.OthersCpus() as others:
        timing = harness.time_interleaved(calls, harness.MIN_ROUNDS, harness.MIN_SECONDS, before)
    info = {
        "name": case.name,
        "op": case.op,
        "label": case.label,
        "mode": case.mode,
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": list(case.shape),
        "cold": case.cold,
        "headline": case.headline,
        "grid": case.grid,
        "threads": torch.get_num_threads(),
        # CPUs that other processes kept busy meanwhile: with no CPU to spare, every parallel region waits for them
        "others_cpus": others.cpus,
        "bytes_read": case.reads,
        "bytes_written": case.writes,
        "flops": case.flops,
        "formula": case.formula,
        **summary(timing),
    }
    ceiling = machine.ceiling_seconds(facts, case.reads, case.writes, case.flops, case.cold)
    if ceiling:
        info["ceiling_s"], info["bound"] = ceiling
        info["share"] = ceiling[0] / info["median_s"]["regfast"]
    found = {
        name: in_subprocess(case, module, ENVIRONMENTS[name], *WORKER_ARGUMENTS.get(name, ()))
        for name in case.environments
        if applies(name, case, facts["isas"])
    }
    info["environments"] = {name: summary(result["timing"]) for name, result in found.items()}
    if case.memory:
        info["extra_memory"] = {
            name: in_subprocess(case, module, {}, "--memory", name)["buffers"]
            for name in ("eager", "regfast", "in_place")
        }
    if case.vocabulary or case.peak:
        info["peak_bytes"] = {
            name: in_subprocess(case, module, {}, "--memory", name)["bytes"]
            for name in ("eager", "chunked", "regfast")
            if name in info["median_s"]
        }
    if work.errors:
        info["errors"] = work.errors()
    benchmark.extra_info.update(info)
    call = calls["regfast"]

    def setup():
        if call.setup:
            call.setup()
        if before:
            before()

    rounds = max(3, min(200, int(0.2 / info["median_s"]["regfast"])))
    benchmark.pedantic(call.run, setup=setup, rounds=rounds, iterations=1, warmup_rounds=1)
