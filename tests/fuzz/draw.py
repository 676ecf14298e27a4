"""Random choices: sizes around every constant that the kernels are tuned by, layouts, values, what requires grad."""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path

from regfast import _C

from .tensors import INF, LAYOUTS, NAN, VALUES

TUNING = Path(__file__).resolve().parents[2] / "csrc" / "cpu" / "tuning.h"
DTYPES = _C.DTYPES


@cache
def tuning_constants() -> dict[str, int]:
    """The whole numbers of tuning.h by name; a register tile's are its rows and its columns of 4, 8 or 16 lanes."""
    text = re.sub(r"//[^\n]*", "", TUNING.read_text())
    found = {}
    for declaration in re.findall(r"constexpr (?:int64_t|double) ([^;()]*);", text):
        for name, value in re.findall(r"(k\w+) = ([^,]+)", declaration):
            if re.fullmatch(r"[\d\s*<+.e-]+", value):
                number = eval(value)
                if number >= 2:
                    found[name] = int(number)
    for name, tile in re.findall(r"(kTile\w+) = \{([\d, ]+)\}", text):
        rows, vectors, dot_rows = map(int, tile.split(","))
        found |= {f"{name}.rows": rows, f"{name}.dot_rows": dot_rows}
        found |= {f"{name}.columns of {lanes}": vectors * lanes for lanes in (4, 8, 16)}
    return found


@cache
def sizes_of_interest(cap: int) -> list[int]:
    """Sizes up to `cap` at which a constant makes a difference, counted in elements, vectors, floats or doubles."""
    found = set()
    for constant in tuning_constants().values():
        for unit in (constant, constant * 8, constant * 16, constant // 4, constant // 8, constant // 2):
            found |= {unit - 1, unit, unit + 1}
    return sorted(n for n in found if 2 < n <= cap)


class Draw(random.Random):
    """Choices from one seed, by which a case is known."""

    def __init__(self, seed: int):
        super().__init__(seed)
        # Elements, or multiplications, that a case may have: few at most times, so that there can be many cases.
        self.room = self.choices((1_000, 20_000, 300_000, 6_000_000), (660, 290, 45, 5))[0]

    def chance(self, share: float) -> bool:
        return self.random() < share

    def size(self, cap: int, least: int = 0) -> int:
        """A size from `least` to `cap`: a few, the tails of vectors, around a constant, or any."""
        cap = max(cap, least)
        kind = self.random()
        if kind < 0.03:
            n = least
        elif kind < 0.40:
            n = self.randint(1, 9)
        elif kind < 0.60:
            n = self.randint(1, 70)
        elif kind < 0.90 and sizes_of_interest(cap):
            n = self.choice(sizes_of_interest(cap))
        else:
            n = int(2 ** self.uniform(0, cap.bit_length()))
        return min(max(n, least), cap)

    def sizes(self, count: int, least: int = 1) -> list[int]:
        """Sizes whose product stays within the room; which one may be long is drawn too."""
        order = list(range(count))
        self.shuffle(order)
        result, room = [0] * count, self.room
        for i in order:
            result[i] = self.size(max(1, room), least)
            room //= max(1, result[i])
        return result

    def leading(self, n: int) -> list[int]:
        """Leading dimensions of about n rows: mostly one."""
        if self.chance(0.75):
            return [n]
        if self.chance(0.2):
            return [] if self.chance(0.5) else [1, n, 1]
        a = self.randint(1, 3)
        return [a, n // a]

    def tensor(self, values: str | None = None, grad: float = 0.6, **more: object) -> dict:
        """How one tensor is filled, laid out and used."""
        if values is None:
            values = "normal" if self.chance(0.4) else self.choices(VALUES, (4, 8, 1, 1, 1, 2, 2, 1, 1))[0]
        layout = "contiguous" if self.chance(0.4) else self.choice(LAYOUTS)
        drawn = {"values": values, "layout": layout, "grad": self.chance(grad), "seed": self.randrange(1 << 30)}
        if self.chance(0.05):
            places, hostile = ("element", "element", "row", "all"), (INF, -INF, NAN, 1e30, -1e30, 1e-40, 3e38, 65000.0)
            drawn["hostile"] = [
                [self.choice(places), self.choice(hostile), self.randrange(1 << 20)]
                for _ in range(self.choice((1, 1, 1, 2, 4)))
            ]
        return drawn | more

    def upstream(self) -> str:
        """How the gradient of an output is filled and laid out."""
        return self.choices(
            ("normal", "one", "zero", "broadcast", "strided", "transposed", "huge", "nan", "spiky"),
            (60, 8, 4, 6, 8, 5, 2, 1, 6),
        )[0]
