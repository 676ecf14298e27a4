"""`make gpu`: builds for the GPU found, proves the kernels on it, measures them, and writes bench/results/<gpu>.json.

It takes the python3 that has torch, no network, and at most nine minutes on 16 cores. Each part runs in a process of
its own, so that the failure of one does not stop the others; the exit status tells whether all of them succeeded. When
they have, the results file is to be committed. The proof itself is what turns kernels on, machine by machine.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
SECONDS = 525  # of the nine minutes
BENCHMARKS = 245  # of these, kept for the benchmarks whatever the proofs take
# Where code for an architecture alone has instructions that its plain code lacks (csrc/cuda/kernels.py).
LETTERS = {90: "90a", 100: "100a"}
WORKER = [sys.executable, "-P", "-m", "regfast.proof.worker"]
COLUMNS = ("unfused", "eager", "compile", "torch", "liger", "quack", "cce")  # whom gpu_cases.py compares with


@dataclass
class Part:
    name: str
    ok: bool
    seconds: float
    detail: str
    log: str = ""  # the output's end, of a part that failed


@dataclass
class Run:
    """Runs parts and keeps what became of them, in the results file too as soon as each has ended."""

    machine: dict
    path: Path
    environment: dict[str, str]
    begin: float = field(default_factory=time.perf_counter)
    parts: list[Part] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)
    cases: list[dict] = field(default_factory=list)
    proof: dict = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def part(
        self, name: str, command: list[str], limit: float, keep: float = 0, begun: str = "", **environment: str
    ) -> None:
        """At most `limit` seconds, and of those left all but `keep`. The detail is the output's last line.

        begun: what the output holds if a tool that not every machine lets run has begun; else the part is left out.
        """
        limit = min(limit, SECONDS - keep - (time.perf_counter() - self.begin))
        if limit < 1:
            self.add(Part(name, False, 0.0, "not run: the time is over"))
            return
        log, start = BUILD / (re.sub(r"\W+", "_", name) + ".log"), time.perf_counter()
        try:
            with open(log, "w") as out:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **self.environment, **environment},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # what it starts ends with it
                )
                try:
                    status = process.wait(limit)
                except subprocess.TimeoutExpired:
                    status = f"stopped after {limit:.0f} s"
                finally:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
            text = log.read_text(errors="replace").rstrip()
        except OSError as error:
            status, text = 1, str(error)
        lines = text.splitlines() or [""]
        detail = lines[-1][:160] if isinstance(status, int) else status
        seconds = round(time.perf_counter() - start, 1)
        print(f"\n=== {name}: {' '.join(command)}\n{text[-3000:]}", flush=True)
        if begun not in text:
            self.add(Part(name, True, seconds, f"left out, it cannot run here: {detail}"))
            return
        self.add(Part(name, status == 0, seconds, detail, "" if status == 0 else text[-20000:]))

    def add(self, part: Part) -> None:
        with self.lock:
            self.parts.append(part)
            self.save()

    def save(self, finished: bool = False) -> bool:
        """Writes the results so far; whether all of them are there and all parts succeeded."""
        passed = finished and all(part.ok for part in self.parts)
        result = {
            "machine": self.machine,
            "passed": passed,
            "proof": self.proof,
            "parts": [{key: value for key, value in asdict(part).items() if value != ""} for part in self.parts],
            "ceilings": self.ceilings,
            "cases": self.cases,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(rounded(result), indent=1) + "\n")
        return passed


def describe() -> dict:
    """The machine, for the results file; nothing that names a person or a host."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "architecture": 10 * properties.major + properties.minor,
        "sms": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(),
    }


def slug(name: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def part_of_regfast(path: str):
    """A module that needs nothing else of the package, which may not be built."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "regfast" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(run: Run) -> None:
    command = [sys.executable, "setup.py", "build", "--build-base", "build/gpu", "--build-lib", "build/gpu/lib"]
    run.part("build", command, 240, BENCHMARKS, REGFAST_CUDA="1", PYTHONPATH="")


def prove(run: Run) -> None:
    """Correctness: `python -m regfast prove` by itself, since it times kernels too; then the op tests and
    compute-sanitizer's racecheck at once."""
    run.part("prove", [sys.executable, "-P", "-m", "regfast", "prove"], 150, BENCHMARKS, REGFAST_CUDA_KERNELS="")
    for path in Path(run.environment["REGFAST_PROOFS"]).glob("*.json"):
        run.proof = json.loads(path.read_text())
    lines = []
    if all(importlib.util.find_spec(name) for name in ("pytest", "hypothesis")):
        subjects = ("linear", "softmax", "cross_entropy", "cross_entropy_outputs", "cross_entropy_semantics", "mse")
        subjects += ("linear_cross_entropy_cuda", "linear_nll_cuda")
        only = ["-k", "cuda and not cuda_on_host", "-m", "not slow", "--maxfail=20", "--tb=short"]
        only += ["-n", "4"] if importlib.util.find_spec("xdist") else []
        pytest = [sys.executable, "-P", "-m", "pytest", "-q", *only, *(f"tests/test_{name}.py" for name in subjects)]
        lines.append(("op tests", pytest, 150, "", {"REGFAST_CUDA_GEMM": "sm80"}))
    else:
        print("\nThe op tests need pytest and hypothesis; prove has covered the ops without them.")
    if prefix := part_of_regfast("proof/sanitizer.py").sanitizer_prefix("racecheck"):
        command = [*prefix, *WORKER, "cases", "--small", "--without-canaries"]
        # In some containers it refuses every device.
        lines.append(("racecheck", command, 200, '"begin"', {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    else:
        print("\ncompute-sanitizer is not installed: memcheck and racecheck are left out.")

    def follow(line: tuple) -> None:
        name, command, limit, begun, environment = line
        run.part(name, command, limit, BENCHMARKS, begun, **environment)

    with ThreadPoolExecutor(max(1, len(lines))) as pool:
        list(pool.map(follow, lines))


def benchmark(run: Run) -> None:
    """The ceilings and all cases that were measured, also those of a part that failed later."""
    for what, kernel, seconds in [
        ("rows", "aten", 110),
        ("linear", "aten", 65),
        ("linear", "sm80", 40),
        *([("linear", "sm90", 40)] if run.machine["architecture"] == 90 else []),
    ]:
        out = BUILD / f"{what}_{kernel}.jsonl"
        out.unlink(missing_ok=True)
        name = f"benchmarks: {what}" + (f", gemm {kernel}" if what == "linear" else "")
        command = [sys.executable, "-P", "bench/gpu_cases.py", what, str(out), "--seconds", str(seconds)]
        run.part(name, command, seconds + 40, REGFAST_CUDA_GEMM=kernel)
        for line in out.read_text().splitlines() if out.exists() else []:
            try:
                entry = json.loads(line)
            except ValueError:  # the part was stopped while it wrote this
                continue
            if "ceilings" in entry:
                run.ceilings = run.ceilings or entry["ceilings"]
            else:
                run.cases.append(entry)
        run.save()


HEADER = ["case", "GEMM", "regfast", *COLUMNS, "ceiling"]


def rows(cases: list[dict]) -> list[list[str]]:
    def time_of(seconds: float) -> str:
        return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"

    return [
        [
            case["name"],
            case["gemm"],
            time_of(case["median_s"]["regfast"]),
            *(f"{case['ratio'][name]:.2f}x" if name in case["ratio"] else "" for name in COLUMNS),
            f"{case['share']:.0%} of {case['bound'].removesuffix('_gb_s')}",
        ]
        for case in cases
    ]


def report(run: Run) -> None:
    print_table = part_of_regfast("cli/table.py").print_table
    measured = ", ".join(f"{name} {value:.4g}" for name, value in run.ceilings.items())
    print_table("Parts", ["part", "ok", "seconds", "last line"], [
        [part.name, "yes" if part.ok else "NO", f"{part.seconds:.0f}", part.detail] for part in run.parts
    ])  # fmt: skip
    title = (
        f"{run.machine['gpu']}, torch {run.machine['torch']}; measured ceilings: {measured}. "
        "How many times longer the others take than regfast, L2 cold; share of the ceiling"
    )
    print_table(title, HEADER, rows(run.cases))
    if memory := [case for case in run.cases if "peak_mib" in case]:
        print_table("Peak memory in MiB, besides inputs", ["case", "GEMM", "regfast", *COLUMNS], [
            [case["name"], case["gemm"], *(f"{case['peak_mib'][name]:.0f}" if name in case["peak_mib"] else ""
                                           for name in ("regfast", *COLUMNS))]
            for case in memory
        ])  # fmt: skip


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"make gpu: torch {torch.__version__} of {sys.executable} finds no NVIDIA GPU")
        return 2
    machine = describe()
    arch = machine["architecture"]
    print(f"{machine['gpu']} (sm_{arch}), torch {machine['torch']}, {os.cpu_count()} cores", flush=True)
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    run = Run(
        machine,
        args.out / f"{slug(machine['gpu'])}.json",
        {
            "PYTHONPATH": str(BUILD / "lib"),
            "REGFAST_CUDA_KERNELS": "1",
            "REGFAST_PROOFS": str(BUILD / "proofs"),
            "REGFAST_CUDA_ARCHS": LETTERS.get(arch, str(arch)),
        },
    )
    build(run)
    if run.parts[0].ok:
        prove(run)
        benchmark(run)
    passed = run.save(finished=True)
    report(run)
    print(f"\nWrote {run.path.name} in {args.out.name}/; " + ("all parts passed" if passed else "NOT all parts passed"))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
