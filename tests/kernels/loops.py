"""The innermost loops of a compiled function: their instructions by kind, and how many of them touch the stack, where
registers are spilled to. Usage: loops.py OBJECT FUNCTION [LOOP], where FUNCTION is a regular expression that the
demangled name contains. With the number of a loop its instructions are printed alone, as llvm-mca reads them.
"""

import re
import sys
from collections import Counter

from check_symbols import functions

INSTRUCTION = re.compile(r"\s*([0-9a-f]+):\s+(\S+)\s*(.*?)(?:\s+#.*)?$")
JUMP = re.compile(r"(?:j\w+|b\.\w+|cbn?z|tbn?z)$")
STACK = re.compile(r"\((?:%rsp|%rbp)|\[(?:sp|x29)")


def innermost_loops(lines: list[str]) -> list[list[tuple[str, str]]]:
    """Mnemonic and operands of each instruction from the target of a jump back to the jump. Stretches that contain
    another one, and those that no loop runs through since they return, are not among them."""
    matches = [m.groups() for m in map(INSTRUCTION.match, lines) if m]
    code = [(int(at, 16), what, operands) for at, what, operands in matches]
    place = {at: i for i, (at, _, _) in enumerate(code)}
    stretches = []
    for i, (_, what, operands) in enumerate(code):
        target = re.search(r"\b([0-9a-f]+) <", operands)
        if JUMP.match(what) and target and place.get(int(target[1], 16), len(code)) <= i:
            stretches.append((place[int(target[1], 16)], i))
    inner = [(a, b) for a, b in stretches if not any((a, b) != (c, d) and a <= c and d <= b for c, d in stretches)]
    loops = [[(what, operands) for _, what, operands in code[a : b + 1]] for a, b in inner]
    return [loop for loop in loops if not any(what.startswith("ret") for what, _ in loop)]


def main(path: str, pattern: str, number: str = "") -> int:
    found = {name: innermost_loops(lines) for name, lines in functions(path).items() if re.search(pattern, name)}
    loops = [(name, loop) for name, of_name in found.items() for loop in of_name]
    if not found:
        print(f"{path}: no function whose name matches {pattern}", file=sys.stderr)
        return 1
    if number:
        # Without the jump, whose target the assembler would look for.
        print("\n".join(f"{what} {operands}" for what, operands in loops[int(number)][1][:-1]))
        return 0
    for i, (name, loop) in enumerate(loops):
        kinds = Counter(what for what, _ in loop)
        stack = sum(bool(STACK.search(operands)) for _, operands in loop)
        if i == 0 or name != loops[i - 1][0]:
            print(name)
        print(f"  loop {i}: {len(loop)} instructions, {stack} of them on the stack: ", end="")
        print(", ".join(f"{count} {what}" for what, count in kinds.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
