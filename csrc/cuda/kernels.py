"""Compiles the kernels (*.cu) with nvcc for setup.py, and reports what ptxas says of them.

`python csrc/cuda/kernels.py LOG... --into KERNELS.md` writes registers, shared memory and spills into its table. A
build ends with an error when a kernel spills that SPILLS does not list.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent

# Architectures that code is made for, with the first release of nvcc that knows each. The letter a: with the
# instructions of that architecture alone, which run nowhere else.
ARCHITECTURES = {"80": (11, 0), "86": (11, 1), "89": (11, 8), "90a": (12, 0), "100a": (12, 8), "120": (12, 8)}

# Bytes that a kernel may spill to memory for each thread, with the reason. None at present.
SPILLS: dict[str, int] = {}

# Asked for its attributes, never launched (device/launch_kernel.cuh).
PROBE = "nothing"

FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]


class NoToolkit(Exception):
    """Why there is no CUDA toolkit to build with."""


class Toolkit:
    """nvcc with its folders; it has to be of the release that torch was built with, since both use one cudart."""

    def __init__(self, torch_cuda: str | None):
        if torch_cuda is None:
            raise NoToolkit("this torch is built without CUDA")
        home = os.environ.get("CUDA_HOME")
        self.nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
        if self.nvcc is None:
            raise NoToolkit("there is no nvcc on PATH or in CUDA_HOME/bin")
        # Its own account of where it is: nvcc on PATH may be a script that calls another.
        told = self._run("--dryrun", "-x", "cu", "-E", os.devnull)
        top = Path(re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)[1]).resolve()
        self.release = tuple(map(int, re.search(r"release (\d+)\.(\d+)", self._run("--version")).groups()))
        if self.release[0] != int(torch_cuda.split(".")[0]):
            raise NoToolkit(f"nvcc is of CUDA {self.release[0]}.{self.release[1]} and torch of CUDA {torch_cuda}")
        self.include = str(top / "include")
        self.libraries = [str(top / name) for name in ("lib64", "lib") if (top / name).is_dir()]

    def _run(self, *arguments: str) -> str:
        done = subprocess.run([self.nvcc, *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            raise NoToolkit(f"{self.nvcc} does not run: {(done.stderr or done.stdout).strip()}")
        return done.stdout + done.stderr

    def architectures(self) -> list[str]:
        asked = os.environ.get("REGFAST_CUDA_ARCHS", "").replace(",", " ").split()
        for name in asked:
            if name not in ARCHITECTURES:
                raise SystemExit(f"regfast: REGFAST_CUDA_ARCHS: expected some of {' '.join(ARCHITECTURES)}, got {name}")
        return [name for name, first in ARCHITECTURES.items() if self.release >= first and (not asked or name in asked)]

    def code_flags(self) -> list[str]:
        names = self.architectures()
        flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
        # For all others the driver compiles PTX. Where Hopper is asked for that of 9.0, which has clusters; it is never
        # what a Hopper runs, nor may it be: gemm_sm90.cu's kernel is empty in it.
        ptx = "90" if "90a" in names else "80"
        return [*flags, f"-gencode=arch=compute_{ptx},code=compute_{ptx}"]


def build(toolkit: Toolkit, folder: str, jobs: int) -> list[str]:
    """The objects of all kernels, of which only those are compiled whose sources or flags have changed."""
    into = Path(folder) / "kernels"
    into.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, f"-I{HERE.parent}", *toolkit.code_flags()]
    sources = sorted(HERE.glob("*.cu"))
    shared = [HERE.parent / "shared" / name for name in ("types.h", "problems.h")]
    headers = [*HERE.glob("*.h"), *HERE.glob("device/*"), *shared]
    newest_header = max(path.stat().st_mtime for path in headers)

    def compile_one(source: Path) -> Path:
        target, log = into / f"{source.stem}.o", into / f"{source.stem}.ptxas"
        command = [toolkit.nvcc, *flags, "-c", str(source), "-o", str(target)]
        heading = " ".join(command) + "\n"
        newest = max(newest_header, source.stat().st_mtime)
        if target.exists() and log.exists() and target.stat().st_mtime > newest and log.read_text().startswith(heading):
            return target
        log.unlink(missing_ok=True)
        print(heading, end="", flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{done.stdout}{done.stderr}\nregfast: nvcc failed on {source.name}")
        log.write_text(heading + done.stdout + done.stderr)
        return target

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_one, sources))
    check_spills(resources([path.with_suffix(".ptxas") for path in objects]))
    return [str(path) for path in objects]


def resources(logs: list[Path]) -> list[dict]:
    """What ptxas says of each kernel for each architecture."""
    rows = []
    pattern = re.compile(
        r"Compiling entry function '(?P<symbol>\S+)' for 'sm_(?P<arch>\w+)'\n"
        r"(?:.*\n)*?\s+\d+ bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
        r"ptxas info\s+: Used (?P<registers>\d+) registers(?P<rest>.*)"
    )
    for log in logs:
        for found in pattern.finditer(log.read_text()):
            shared = re.search(r"(\d+) bytes smem", found["rest"])
            rows.append(
                {
                    "file": f"{log.stem}.cu",
                    "kernel": kernel_name(found["symbol"]),
                    "arch": found["arch"],
                    "registers": int(found["registers"]),
                    "shared": int(shared[1]) if shared else 0,
                    "spills": int(found["stores"]) + int(found["loads"]),
                    "symbol": found["symbol"],
                }
            )
    return rows


def kernel_name(symbol: str) -> str:
    """The function's own name in a mangled one: the last before the template arguments or the end."""
    names, at = [], symbol.find("N") + 1
    while match := re.compile(r"\d+").match(symbol, at):
        at = match.end() + int(match[0])
        names.append(symbol[match.end() : at])
    return names[-1] if names else symbol


def check_spills(rows: list[dict]) -> None:
    bad = [row for row in rows if row["spills"] > SPILLS.get(row["kernel"], 0)]
    if bad:
        lines = [f"  {row['file']} {row['symbol']} on sm_{row['arch']}: {row['spills']} bytes" for row in bad]
        raise SystemExit("\n".join(["regfast: kernels that SPILLS does not list spill registers to memory:", *lines]))


def table(rows: list[dict]) -> str:
    """One line a kernel: its instances, and the range of what they use on each architecture."""
    rows = [row for row in rows if row["kernel"] != PROBE]
    archs = [name for name in ARCHITECTURES if any(row["arch"] == name for row in rows)]
    lines = [
        "| file | kernel | instances | static shared memory | "
        + " | ".join(f"registers, sm_{a}" for a in archs)
        + " |",
        "|---" * (4 + len(archs)) + "|",
    ]
    for file, kernel in sorted({(row["file"], row["kernel"]) for row in rows}):
        of_kernel = [row for row in rows if (row["file"], row["kernel"]) == (file, kernel)]

        def span(values: list[int]) -> str:
            return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"

        registers = [[row["registers"] for row in of_kernel if row["arch"] == arch] for arch in archs]
        cells = [
            f"`{file}`",
            f"`{kernel}`",
            str(len({row["symbol"] for row in of_kernel})),
            span([row["shared"] for row in of_kernel]),
            *(span(values) if values else "" for values in registers),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    spilling = sorted({f"`{row['kernel']}` ({row['spills']} bytes)" for row in rows if row["spills"]})
    lines += ["", f"Spills: {', '.join(spilling) or 'none'}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path, help="*.ptxas of a build")
    parser.add_argument("--into", type=Path, help="file whose part between the ptxas markers is replaced")
    arguments = parser.parse_args()
    text = table(resources(arguments.logs))
    if arguments.into is None:
        print(text)
        return
    begin, end = "<!-- ptxas:begin -->\n", "<!-- ptxas:end -->"
    head, _, rest = arguments.into.read_text().partition(begin)
    _, _, tail = rest.partition(end)
    arguments.into.write_text(f"{head}{begin}{text}\n{end}{tail}")


if __name__ == "__main__":
    main()
