"""The rooms of csrc: they include each other as the table of CONTRIBUTING.md has it, files never in a circle; torch is
seen on its side alone; what is compiled inside the target region of an instruction set opens no header there."""

import re
import shutil
from pathlib import Path

import networkx
import pytest
from rooms_picture import drawn
from util import ROOT

CSRC = ROOT / "csrc"
if not CSRC.exists():
    pytest.skip("there are no sources beside these tests", allow_module_level=True)

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
SOURCES = {".h", ".cpp", ".cuh", ".cu"}
TORCH = re.compile(r"(ATen|c10|torch|pybind11)/|Python\.h")
# Included inside a target region; what else they need comes before it opens.
INSIDE = re.compile(r".*\.inl\.h|cpu/isa/simd_\w+\.h")
PRELUDE = "cpu/kernels/prelude.h"
# torch's headers, which g++ finds precompiled only where they are a file's first include.
PRECOMPILED = "shared/torch_api.h"


class Graph:
    """The files of a tree by their path from its top, and what each includes with "" and with <>."""

    def __init__(self, top: Path):
        self.top = top
        self.own: dict[str, list[str]] = {}
        self.system: dict[str, list[str]] = {}
        self.first: dict[str, str] = {}
        for path in sorted(p for p in top.rglob("*") if p.suffix in SOURCES):
            found = INCLUDE.findall(path.read_text())
            name = path.relative_to(top).as_posix()
            self.first[name] = found[0][1] if found else ""
            self.own[name] = [what for mark, what in found if mark == '"']
            self.system[name] = [what for mark, what in found if mark == "<"]
        self.files = networkx.DiGraph(self.own).subgraph(self.own)

    def reachable(self, name: str) -> set[str]:
        return {name, *networkx.descendants(self.files, name)}


def read_plan(text: str) -> dict[str, tuple[bool, set[str]]]:
    """Of each room whether it may include torch, and which rooms: the table's lines `room torch includes...`."""
    table = text.split("    room ", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    return {room: (torch == "torch", set(others) - {"-"}) for room, torch, *others in map(str.split, table)}


def room_of(name: str, plan) -> str:
    """The file's own line where the table has one, else its folder's; `csrc` is the top."""
    return name if name in plan else name.rpartition("/")[0] or "csrc"


def unknown_names(graph: Graph, plan) -> list[str]:
    return [
        f"{name} includes {other}, which is no path from csrc"
        for name, others in graph.own.items()
        for other in others
        if other not in graph.own
    ]


def arrows_beside_the_plan(graph: Graph, plan) -> list[str]:
    found: dict[tuple[str, str], str] = {}
    for name, others in graph.own.items():
        for other in others:
            ends = room_of(name, plan), room_of(other, plan)
            if ends[0] != ends[1]:
                found.setdefault(ends, f"{name} includes {other}")
    planned = {(room, other) for room, (_, others) in plan.items() for other in others}
    return [
        *(f"{found[ends]}: the table has no {ends[0]} -> {ends[1]}" for ends in sorted(found.keys() - planned)),
        *(f"the table has {room} -> {other}, which no file needs" for room, other in sorted(planned - found.keys())),
        *(f"the table has no room {room}" for room in sorted({room_of(n, plan) for n in graph.own} - plan.keys())),
    ]


def circles(arrows: dict) -> list[str]:
    return [" -> ".join([*circle, circle[0]]) for circle in networkx.simple_cycles(networkx.DiGraph(arrows))]


def circles_of_files_or_rooms(graph: Graph, plan) -> list[str]:
    return circles(graph.own) + circles({room: others for room, (_, others) in plan.items()})


def torch_below_its_side(graph: Graph, plan) -> list[str]:
    return [
        f"{name} sees <{header}> through {other}"
        for name in graph.own
        if not plan[room_of(name, plan)][0]
        for other in sorted(graph.reachable(name))
        for header in graph.system[other]
        if TORCH.match(header)
    ]


def headers_opened_in_a_region(graph: Graph, plan) -> list[str]:
    inside = [name for name in graph.own if INSIDE.fullmatch(name)]
    wrong = [f"{name} includes <{header}>" for name in inside for header in graph.system[name]]
    for name in inside:
        wrong += [f"{name} includes {o}" for o in graph.own[name] if not INSIDE.fullmatch(o) and o != PRELUDE]
    for name in graph.own:
        first = next((i for i, other in enumerate(graph.own[name]) if INSIDE.fullmatch(other)), None)
        if name not in inside and first is not None and PRELUDE not in graph.own[name][:first]:
            wrong.append(f"{name} opens a region without {PRELUDE}")
    return wrong


def torch_that_is_not_precompiled(graph: Graph, plan) -> list[str]:
    return [
        f"{name} sees torch and includes {graph.first[name]} before {PRECOMPILED}"
        for name in graph.own
        if name.endswith(".cpp") and plan[room_of(name, plan)][0] and graph.first[name] != PRECOMPILED
        if any(TORCH.match(header) for other in graph.reachable(name) for header in graph.system[other])
    ]


def needed_arrows(plan) -> networkx.DiGraph:
    """The plan's arrows that do not follow from others: those whose ends no other way connects."""
    return networkx.transitive_reduction(networkx.DiGraph({room: others for room, (_, others) in plan.items()}))


def picture() -> str:
    plan = read_plan((ROOT / "CONTRIBUTING.md").read_text())
    return drawn(needed_arrows(plan), {room for room, (torch, _) in plan.items() if torch})


CHECKS = [
    unknown_names,
    arrows_beside_the_plan,
    circles_of_files_or_rooms,
    torch_below_its_side,
    headers_opened_in_a_region,
    torch_that_is_not_precompiled,
]


@pytest.mark.parametrize("check", CHECKS)
def test_csrc_is_as_planned(check):
    assert not check(Graph(CSRC), read_plan((ROOT / "CONTRIBUTING.md").read_text()))


@pytest.mark.parametrize(
    "check, file, line, words",
    [
        (unknown_names, "cpu/drivers/gemm.cpp", '#include "../platform.h"', "no path from csrc"),
        (unknown_names, "cuda/gemm.cu", '#include "gemm.h"', "no path from csrc"),
        (arrows_beside_the_plan, "cuda/ops/ops.h", '#include "cpu/platform.h"', "no cuda/ops -> cpu"),
        (arrows_beside_the_plan, "cpu/kernels/arguments.h", '  # include "cpu/platform.h"', "no cpu/kernels -> cpu"),
        (arrows_beside_the_plan, "cuda/device/math.cuh", '#include "cuda/launch.h"', "no cuda/device -> cuda"),
        (arrows_beside_the_plan, "cpu/attic/old.h", '#include "shared/types.h"', "no room cpu/attic"),
        (circles_of_files_or_rooms, "shared/types.h", '#include "shared/chunks.h"', "chunks.h -> shared/types.h"),
        (torch_below_its_side, "cpu/platform.h", "#include <c10/util/Exception.h>", "cpu/drivers/gemm.cpp sees <c10/"),
        (torch_below_its_side, "cuda/launch.h", '#include "shared/torch_api.h"', "cuda/softmax.cu sees <ATen/"),
        (headers_opened_in_a_region, "cpu/kernels/math.inl.h", "#include <cmath>", "includes <cmath>"),
        (headers_opened_in_a_region, "cpu/isa/simd_avx2.h", '#include "cpu/tuning.h"', "includes cpu/tuning.h"),
        (torch_that_is_not_precompiled, "autograd/softmax.cpp", "#include <cmath>", "includes cmath before shared/"),
    ],
)
def test_a_fault_is_found(tmp_path, check, file, line, words):
    top = tmp_path / "csrc"
    shutil.copytree(CSRC, top)
    path = top / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(line + "\n" + (path.read_text() if path.exists() else ""))
    found = check(Graph(top), read_plan((ROOT / "CONTRIBUTING.md").read_text()))
    assert any(words in fault for fault in found), found


def test_a_line_of_the_plan_that_nothing_needs_is_found():
    plan = read_plan((ROOT / "CONTRIBUTING.md").read_text())
    plan["cpu/kernels"][1].add("cpu/drivers")
    found = arrows_beside_the_plan(Graph(CSRC), plan)
    assert found == ["the table has cpu/kernels -> cpu/drivers, which no file needs"]
    assert any("cpu/kernels -> cpu/drivers" in circle for circle in circles_of_files_or_rooms(Graph(CSRC), plan))


PICTURE = ROOT / "docs/static/rooms.svg"


def test_the_picture_of_the_rooms_is_the_codes():
    assert PICTURE.read_text() == picture(), "python tests/test_include_graph.py draws it again"


def test_arrows_that_follow_from_others_are_left_out():
    plan = {"a": (True, {"b", "c"}), "b": (False, {"c"}), "c": (False, set())}
    assert set(needed_arrows(plan).edges) == {("a", "b"), ("b", "c")}


if __name__ == "__main__":
    PICTURE.write_text(picture())
