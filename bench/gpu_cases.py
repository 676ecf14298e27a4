"""What is timed on a GPU beyond what `python -m regfast prove` times: more shapes, more dtypes, compilers and peers.

gpu.py runs it, once for the kernels of rows and once for each matrix product, which REGFAST_CUDA_GEMM chooses:

    python bench/gpu_cases.py rows|linear OUT [--seconds N]     writes ceilings and cases to OUT, a line of JSON each
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import regfast
from regfast.proof.timing import Clock, bounds, ceilings, preparation, ratios

GIB = 1 << 30


@dataclass
class Case:
    """One op in one mode. A contestant maps the tensors to what is differentiated; those named here take part."""

    op: str
    mode: str  # fwd | bwd | fwd_bwd
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], list[torch.Tensor]]  # fresh inputs; those that require grad get one
    contestants: dict[str, Callable]  # regfast, eager, and peers
    bytes: int = 0  # least traffic
    flops: int = 0
    formula: str = ""
    compile: bool = False
    label: str = ""
    tf32: bool = False
    memory: bool = False  # whether the peak of what each allocates is measured too

    @property
    def name(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return " ".join(filter(None, [self.op, self.label, shape, self.arithmetic, self.mode.replace("_", "+")]))

    @property
    def arithmetic(self) -> str:
        return "tf32" if self.tf32 else {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]


def peak_mib(prepare: Callable[[], Callable]) -> float:
    """The most that a call has of PyTorch's allocator at one time, its results included."""
    call = prepare()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# Peers, each where it is installed: from the name of a package and of a function in it to one that is called as ours.
PEERS = {
    "cross_entropy": {
        "liger": ("liger_kernel.transformers.functional", "liger_cross_entropy", lambda f: f),
        "quack": ("quack.cross_entropy", "cross_entropy", lambda f: lambda x, t: f(x, t, reduction="mean")),
    },
    "softmax": {"quack": ("quack.softmax", "softmax", lambda f: f)},
    "linear_cross_entropy": {
        "torch": ("torch.nn.functional", "linear_cross_entropy", lambda f: f),
        "liger": ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", lambda f: f),
        "quack": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy", lambda f: f),
        "cce": ("cut_cross_entropy", "linear_cross_entropy", lambda f: f),
    },
}


def peers(op: str) -> dict[str, Callable]:
    found = {}
    for name, (module, function, adapt) in PEERS[op].items():
        try:
            found[name] = adapt(getattr(importlib.import_module(module), function))
        except Exception as error:  # not installed, or not for this GPU: whatever it says, it does not take part
            print(f"  {name}'s {op} does not take part: {type(error).__name__}: {str(error)[:100]}")
    return found


def row_cases() -> list[Case]:
    """Cross-entropy and the softmax family: logits of 0.5 GiB, from the shortest rows to the longest."""
    cases, others = [], {op: peers(op) for op in ("cross_entropy", "softmax")}
    for dtype in (torch.bfloat16, torch.float32):
        size = dtype.itemsize
        for v in (1024, 4096, 32768, 131072, 262144):
            n = GIB // 2 // size // v

            def logits(n=n, v=v, dtype=dtype):
                return [3 * torch.randn(n, v, device="cuda", dtype=dtype), torch.randint(v, (n,), device="cuda")]

            def leaf(make=logits):
                x, t = make()
                return [x.requires_grad_(), t]

            fns = {"regfast": regfast.cross_entropy, "eager": F.cross_entropy}
            nv = n * v * size
            every = {**fns, **others["cross_entropy"]}
            compiled = v == 131072
            cases += [
                Case("cross_entropy", "fwd", dtype, (n, v), logits, fns, nv, formula="NVs", compile=compiled),
                Case("cross_entropy", "fwd_bwd", dtype, (n, v), leaf, every, 2 * nv, formula="2NVs", compile=compiled),
            ]
            # With lse as an output too, forward leaves the gradient to backward.
            ours = {
                "regfast": lambda x, t: regfast.cross_entropy(x, t, outputs=("loss", "lse")).loss,
                "eager": F.cross_entropy,
            }
            cases.append(Case("cross_entropy", "bwd", dtype, (n, v), leaf, ours, 2 * nv, formula="2NVs"))

            def softmax_input(make=logits):
                return make()[:1]

            def softmax_leaf(make=logits):
                return [make()[0].requires_grad_()]

            fns = {"regfast": regfast.softmax, "eager": lambda x: torch.softmax(x, -1), **others["softmax"]}
            cases += [
                Case("softmax", "fwd", dtype, (n, v), softmax_input, fns, 2 * nv, formula="2NVs", compile=compiled),
                Case("softmax", "bwd", dtype, (n, v), softmax_leaf, fns, 3 * nv, formula="3NVs"),
            ]
    dtype, shape = torch.float32, (8, 21, 512, 512)
    n = math.prod(shape) * 4

    def pixels():
        x = 3 * torch.randn(shape, device="cuda")
        return [x.requires_grad_(), torch.randint(21, (8, 512, 512), device="cuda")]

    fns = {"regfast": regfast.cross_entropy, "eager": F.cross_entropy}
    cases.append(Case("cross_entropy", "fwd_bwd", dtype, shape, pixels, fns, 2 * n, formula="2NVs", label="pixels"))

    def pair():
        return [torch.randn(1 << 27, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2)]

    fns = {"regfast": regfast.mse_loss, "eager": F.mse_loss}
    cases.append(Case("mse_loss", "fwd_bwd", torch.bfloat16, (1 << 27,), pair, fns, 6 << 28, formula="6ns"))
    return cases


def linear_cases() -> list[Case]:
    cases = []
    squares, odd = [(4096, 4096, 4096), (8192, 8192, 8192)], [(256, 784, 10), (4096, 1003, 2051)]
    for dtype, tf32, shapes in (
        (torch.bfloat16, False, squares + odd),
        (torch.float32, True, squares[:1] + odd),
        (torch.float32, False, squares[:1] + odd),
    ):
        for n, d, v in shapes:

            def make(n=n, d=d, v=v, dtype=dtype):
                return [torch.randn(s, device="cuda", dtype=dtype).mul_(d**-0.25) for s in ((n, d), (v, d), (v,))]

            def leaves(make=make):
                return [t.requires_grad_() for t in make()]

            fns = {
                "regfast": lambda x, w, b: regfast.linear(x, w, b, activation="gelu"),
                "eager": lambda x, w, b: F.gelu(F.linear(x, w, b)),
            }
            flops, moved = 2 * n * d * v, (n * d + v * d + n * v) * dtype.itemsize
            options = {"compile": n == d == v, "label": "gelu", "tf32": tf32}
            cases += [
                Case("linear", "fwd", dtype, (n, d, v), make, fns, moved, flops, "2NDV", **options),
                Case("linear", "fwd_bwd", dtype, (n, d, v), leaves, fns, 3 * moved, 3 * flops, "6NDV", **options),
            ]
    fns = {
        "regfast": regfast.linear_cross_entropy,
        "unfused": lambda x, w, t: regfast.cross_entropy(regfast.linear(x, w), t),
        "eager": lambda x, w, t: F.cross_entropy(F.linear(x, w), t),
        **peers("linear_cross_entropy"),
    }
    for n, d, v in ((8192, 2048, 32768), (8192, 4096, 131072)):

        def head(n=n, d=d, v=v):
            x, w = (torch.randn(s, device="cuda", dtype=torch.bfloat16).mul_(d**-0.25) for s in ((n, d), (v, d)))
            return [x.requires_grad_(), w.requires_grad_(), torch.randint(v, (n,), device="cuda")]

        options = {"flops": 6 * n * d * v, "formula": "6NDV", "compile": v == 32768, "memory": True}
        cases.append(Case("linear_cross_entropy", "fwd_bwd", torch.bfloat16, (n, d, v), head, fns, **options))
    return cases


def likelihood_cases() -> list[Case]:
    """Gradients of weight and bias: a regression that reads its rows, and layers as wide as their input."""
    cases, bernoulli = [], partial(regfast.linear_nll, family="bernoulli")
    for dtype, (n, d, v), label, ours, loss in (
        (torch.float32, (1 << 20, 256, 1), "squared", regfast.linear_mse_loss, F.mse_loss),
        (torch.bfloat16, (1 << 16, 1024, 1024), "squared", regfast.linear_mse_loss, F.mse_loss),
        (torch.bfloat16, (1 << 16, 1024, 1024), "bernoulli", bernoulli, F.binary_cross_entropy_with_logits),
    ):

        def make(n=n, d=d, v=v, dtype=dtype):
            x, w, b = (torch.randn(s, device="cuda", dtype=dtype).mul_(d**-0.25) for s in ((n, d), (v, d), (v,)))
            return [x, w.requires_grad_(), torch.rand(n, v, device="cuda", dtype=dtype), b.requires_grad_()]

        fns = {"regfast": ours, "eager": lambda x, w, y, b, loss=loss: loss(F.linear(x, w, b), y)}
        moved, flops = 2 * n * d * dtype.itemsize + n * v * dtype.itemsize, 4 * n * d * v
        options = {"formula": "2NDs+NVs, 4NDV", "compile": v > 1, "label": label, "memory": True}
        cases.append(Case("linear_nll", "fwd_bwd", dtype, (n, d, v), make, fns, moved, flops, **options))
    return cases


def measure(case: Case, clock: Clock, limits: dict[str, float]) -> dict:
    """The case's times, its ratios to the others within each round, and its share of the ceiling."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = case.tf32
    tensors = case.make()
    fns = dict(case.contestants)
    if case.compile:
        torch._dynamo.reset()
        fns["compile"] = torch.compile(fns["eager"], dynamic=False)
    calls, failures = {}, {}
    for name, fn in fns.items():
        try:
            # Liger writes its gradient over the logits, so it gets logits of its own.
            own = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors] if name == "liger" else tensors
            prepare = preparation(fn, own, case.mode)
            clock.once(prepare)
            calls[name] = prepare
        except Exception as error:
            if name == "regfast":
                raise
            failures[name] = f"{type(error).__name__}: {str(error)[:200]}"
            print(f"  {case.name}: {name} does not take part: {failures[name]}", flush=True)
    samples = clock.interleaved(calls)
    median = {name: statistics.median(values) for name, values in samples.items()}
    reads_only = case.mode == "fwd" and case.op == "cross_entropy"
    least = bounds(limits, case.bytes, case.flops, case.arithmetic, reads_only)
    bound = max(least, key=least.get)
    memory = {"peak_mib": {name: peak_mib(prepare) for name, prepare in calls.items()}} if case.memory else {}
    return {
        "name": case.name,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "mode": case.mode,
        "formula": case.formula,
        "median_s": median,
        "ratio": ratios(samples),
        "bound": bound,
        "share": least[bound] / median["regfast"],
        "gemm": os.environ.get("REGFAST_CUDA_GEMM", "auto") if case.flops else "",
        **memory,
        "failures": failures,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rows", "linear"))
    parser.add_argument("out")
    parser.add_argument("--seconds", type=float, default=math.inf, help="cases that would begin later are left out")
    args = parser.parse_args()
    os.environ["REGFAST_CUDA_KERNELS"] = "1"
    if not regfast.build_info()["cuda"]:
        print("gpu_cases: regfast was built without CUDA kernels")
        return 2
    begin, clock, failed = time.perf_counter(), Clock(), 0
    limits = ceilings(clock)
    print("  " + ", ".join(f"{name} {value:.4g}" for name, value in limits.items()), flush=True)
    with open(args.out, "w", buffering=1) as out:
        out.write(json.dumps({"ceilings": limits}) + "\n")
        for case in row_cases() + likelihood_cases() if args.what == "rows" else linear_cases():
            if time.perf_counter() - begin > args.seconds:
                failed += 1
                print(f"  {case.name}: not measured, the time is over", flush=True)
                continue
            try:
                result = measure(case, clock, limits)
                out.write(json.dumps(result) + "\n")
                print(f"  {case.name}: {result['share']:.0%} of {result['bound']}", flush=True)
                torch.cuda.empty_cache()
            except Exception:
                failed += 1
                print(f"  {case.name}: FAILED", flush=True)
                traceback.print_exc()
    print(f"{failed} cases failed or were left out" if failed else "all measured")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
