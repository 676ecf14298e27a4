"""Checks that what runs on every x86-64 CPU is free of instructions that only some have.

Without -march, the compiler keeps to the baseline except inside the target regions of isa_avx2.cpp and isa_avx512.cpp.
Two things can go wrong: such code in another object, or an inline function of the standard library compiled within a
region, whose copy the linker may then keep for everybody. Usage: check_symbols.py OBJECT...
"""

import functools
import os
import re
import subprocess
import sys

WIDE_REGISTER = re.compile(r"%[yz]mm\d")
# Every AVX, FMA, F16C and AVX-512 instruction is spelled with a v; of the baseline's only these are.
VEX = re.compile(r"\tv(?!err|erw|mcall|mlaunch|mresume|mxon|mxoff)[a-z0-9]+\s")
OWN_NAMESPACE = {"isa_avx2.o": "rf::avx2::", "isa_avx512.o": "rf::avx512::"}
# AVX-512's file may use these in the kernels that are in the tables for CPUs that have them, and nowhere else.
BEYOND_AVX512 = {
    "AVX512-BF16": (re.compile(r"\tv(dpbf16ps|cvtne2?ps2bf16)\w*\s"), re.compile(r"pairs|bf16x2v|flushed_bf16|amx")),
    "AMX": (re.compile(r"\t(ldtilecfg|tile|tdp)\w*\s?"), re.compile(r"amx|squares|multiply_rows")),
}


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def functions(path: str) -> dict[str, list[str]]:
    """The instructions of each function, by demangled name."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in output("objdump", "-d", "-C", "--no-show-raw-insn", path).splitlines():
        if start := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            name = start.group(1)
            found.setdefault(name, [])
        elif name and line.startswith(" "):
            found[name].append(line)
    return found


def beyond_baseline(instructions: list[str]) -> str | None:
    return next((i.strip() for i in instructions if WIDE_REGISTER.search(i) or VEX.search(i)), None)


def shared_symbols(path: str) -> set[str]:
    """Functions of which the linker keeps one object's copy: weak and unique ones."""
    lines = output("nm", "-C", "--defined-only", path).splitlines()
    return {name for _, kind, name in (line.split(" ", 2) for line in lines) if kind in "WVu"}


def problems(path: str) -> list[str]:
    if "elf64-x86-64" not in output("objdump", "-f", path):
        return [f"{path}: not an x86-64 object"]
    own = OWN_NAMESPACE.get(os.path.basename(path))
    shared = shared_symbols(path)
    wrong = []
    for name, instructions in functions(path).items():
        for found, kernels in BEYOND_AVX512.values():
            if not kernels.search(name) and (instruction := next(filter(found.search, instructions), None)):
                wrong.append(f"{path}: {name}: {instruction.strip()}")
        if own and (name not in shared or re.match(rf"(void |double |\w+ )?{own}|.*\b{own}", name)):
            continue
        if instruction := beyond_baseline(instructions):
            wrong.append(f"{path}: {name}: {instruction}")
    return wrong


def main(paths: list[str]) -> int:
    wrong = [p for path in paths for p in problems(path)]
    # The check itself is checked: the files for wide registers must be seen to have some.
    for path in paths:
        if os.path.basename(path) in OWN_NAMESPACE and not any(map(beyond_baseline, functions(path).values())):
            wrong.append(f"{path}: no wide instruction found where there should be many")
        for extension, (found, _) in BEYOND_AVX512.items():
            if os.path.basename(path) == "isa_avx512.o" and not any(
                found.search(i) for instructions in functions(path).values() for i in instructions
            ):
                wrong.append(f"{path}: no {extension} found where there should be some")
    print("\n".join(wrong) if wrong else f"{len(paths)} objects keep to the baseline where every CPU runs them")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
