"""What this machine can do at most: measured bandwidth and FMA ceilings, and a description for the results file.

`python bench/machine.py` prints it. Ceilings are measured and not computed from clock rates, because a virtual machine
hides its clocks and a shared one does not own its memory controller.
"""

import argparse
import ctypes
import functools
import json
import os
import platform
import re
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import threadpoolctl
import torch

MIB = 1 << 20
QUICK = os.environ.get("REGFAST_BENCH_QUICK") == "1"  # a smoke test: few cases, few rounds
_CACHE_DIR = Path("/sys/devices/system/cpu/cpu0/cache")


def num_threads() -> int:
    """The thread count of every benchmark: REGFAST_BENCH_THREADS, else torch's own choice."""
    return int(os.environ.get("REGFAST_BENCH_THREADS", torch.get_num_threads()))


def caches() -> dict[str, int]:
    """Bytes of one instance of each data cache that CPU 0 sees, e.g. {"L1": 49152, "L2": 2097152, "L3": ...}."""
    found = {}
    for index in sorted(_CACHE_DIR.glob("index*")):
        if (index / "type").read_text().strip() == "Instruction":
            continue
        size = (index / "size").read_text().strip()
        factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1], 1)
        found["L" + (index / "level").read_text().strip()] = int(size.rstrip("KMG")) * factor
    return found


@functools.cache
def blas() -> list[str]:
    """The BLAS libraries that this process has loaded, NumPy's among them."""
    return [library["internal_api"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]


class OthersCpus:
    """As a context manager: `cpus` is how many CPUs other processes kept busy meanwhile."""

    def __enter__(self):
        self._start = self._now()
        return self

    def __exit__(self, *_):
        seconds, every, mine = (after - before for after, before in zip(self._now(), self._start, strict=True))
        self.cpus = round(max(0.0, every - mine) / seconds, 3)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """The clock, the CPU time of everybody so far, that of this process and its children."""
        every, mine = psutil.cpu_times(), os.times()
        return time.perf_counter(), sum(every) - every.idle - getattr(every, "iowait", 0.0), sum(mine[:4])


def on_threads(count: int, body) -> list:
    """Runs body(i) on `count` threads that start together; returns their results in order of i."""
    barrier = threading.Barrier(count)
    results = [None] * count

    def work(i):
        barrier.wait()
        results[i] = body(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def _bandwidth(threads: int, total: int, seconds: float) -> dict[str, float]:
    """GB/s over a working set of `total` bytes: each thread walks its own slice again and again.

    Bytes counted: read = n, write = n, copy = 2n (n read and n written; a write-allocate read is not counted).
    numpy and ctypes release the GIL inside each call, so the threads do run at once.
    """
    part = total // threads // 2 // 64 * 64
    source = [np.ones(part // 4, np.float32) for _ in range(threads)]  # ones and zeros touch every page
    target = [np.zeros(part // 4, np.float32) for _ in range(threads)]
    for array in target:
        array.fill(0)  # np.zeros maps the zero page until it is written

    def read(i):
        np.maximum.reduce(source[i])  # .max() adds a microsecond of Python
        np.maximum.reduce(target[i])

    def write(i):
        ctypes.memset(source[i].ctypes.data, 0, part)
        ctypes.memset(target[i].ctypes.data, 0, part)

    def copy(i):
        np.copyto(target[i], source[i])

    def rate(step):
        def body(i):
            step(i)
            calls, start = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < seconds:
                step(i)
                calls += 1
            return calls / elapsed

        # The last call of a thread may run while the others have stopped; with calls much shorter than `seconds` that
        # is small, and the best of three runs is what the memory can do on a machine that others use too.
        return max(sum(on_threads(threads, body)) for _ in range(3)) * 2 * part / 1e9

    return {"read": rate(read), "write": rate(write), "copy": rate(copy)}


def bandwidth(threads: int, seconds: float = 0.25) -> list[dict]:
    """Ceilings for three working sets, smallest first: within L2, within the last-level cache, beyond all caches.

    An L2 belongs to one core, so one thread is measured and multiplied: calls that short would queue for the GIL.
    """
    sizes = caches()
    l2 = sizes.get("L2", MIB)
    last = max(sizes.values(), default=32 * MIB)
    room = psutil.virtual_memory().available // 8
    shared = min(last // 2, 32 * MIB * threads)
    beyond = min(max(2 * last, 256 * MIB), 1024 * MIB, room)
    inner = {kind: rate * threads for kind, rate in _bandwidth(1, l2 // 2, seconds / 2).items()}
    return [
        {"level": "L2", "bytes": l2 // 2 * threads, **inner},
        {"level": "last-level cache", "bytes": shared, **_bandwidth(threads, shared, seconds)},
        {"level": "memory", "bytes": beyond, **_bandwidth(threads, beyond, seconds)},
    ]


def fma_peak(threads: int, seconds: float = 0.3) -> dict[str, float]:
    """GFLOP/s of float32 FMA chains in registers, for one thread and for all of them at once, on the ISA in use."""
    import regfast

    probe = regfast._C.fma_gflops  # releases the GIL
    one = max(probe(seconds) for _ in range(3))
    every = max(sum(on_threads(threads, lambda i: probe(seconds))) for _ in range(3))
    return {"core": one, "all": every}


def describe(threads: int) -> dict:
    """What can be told without measuring."""
    import regfast
    from regfast.cli.info import huge_pages, processor

    return {
        "cpu": processor(),
        "slug": slug(processor(), threads, regfast.isa()),
        "arch": platform.machine(),
        "threads": threads,
        "logical_cpus": os.cpu_count(),
        "caches": caches(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "isa": regfast.isa(),
        "isas": list(regfast.isas()),
        "quick": QUICK,
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "huge_pages": huge_pages(),
    }


@functools.cache
def measure() -> dict:
    """Everything about this machine that a result needs in order to be read. Takes about five seconds, once."""
    threads = num_threads()
    with OthersCpus() as others:
        rates, peak = bandwidth(threads), fma_peak(threads)
    return {
        **describe(threads),
        "bandwidth_gb_s": rates,
        "fma_gflop_s": peak,
        "others_cpus": others.cpus,
    }


def slug(cpu: str, threads: int, isa: str) -> str:
    """A file name for this machine: virtual machines share a CPU name, so threads and ISA are part of it."""
    cpu = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", " ", cpu.lower())
    return "-".join([*re.findall(r"[a-z0-9]+", cpu), f"{threads}t", isa])


def ceiling_seconds(machine: dict, reads: int, writes: int, flops: int, cold: bool) -> tuple[float, str] | None:
    """The least time for that traffic and arithmetic, and what bounds it: ("memory" or "compute"). None: no ceiling.

    The bandwidth is that of the smallest measured working set that holds all the bytes once (cold: of memory), of
    reading or writing alone where the other is less than a quarter of it, else of copying.
    """
    bounds = []
    if reads + writes:
        rows = machine["bandwidth_gb_s"]
        row = rows[-1] if cold else next((row for row in rows if row["bytes"] >= reads + writes), rows[-1])
        kind = "read" if writes < reads / 4 else "write" if reads < writes / 4 else "copy"
        rate = row[kind]
        bounds.append(((reads + writes) / rate / 1e9, "memory"))
    if flops:
        bounds.append((flops / machine["fma_gflop_s"]["all"] / 1e9, "compute"))
    return max(bounds, default=None)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(json.dumps(measure(), indent=2))
