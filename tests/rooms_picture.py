"""Draws the rooms of csrc, docs/static/rooms.svg: boxes with arrows between them, the same text for the same rooms."""

from __future__ import annotations

import networkx

WIDTH, HEIGHT, ACROSS, DOWN, MARGIN = 118, 34, 138, 66, 22
# Where a room stands from left to right; from top to bottom it stands by the arrows below it.
COLUMNS = {
    "csrc": 0, "autograd": 0, "shared": 1.5,
    "cpu/ops": 1.5, "cpu/drivers": 1.5, "cpu/isa": 1, "cpu/kernels": 1, "cpu": 2, "cpu/tuning.h": 1.5,
    "cuda/ops": 3, "cuda": 3, "cuda/device": 3, "cuda/tuning.h": 3,
}  # fmt: skip
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}" font-size="13"
  font-family="sans-serif" text-anchor="middle">
<title>The rooms of csrc and which includes which</title>
<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">
<path d="M0 0 8 4 0 8Z" fill="#495057"/></marker></defs>
<rect width="{0}" height="{1}" rx="8" fill="#fff"/>"""


def drawn(arrows: networkx.DiGraph, sees_torch: set[str]) -> str:
    """The picture of rooms, each of which has an arrow to those whose files it includes."""
    if strangers := arrows.nodes - COLUMNS.keys():
        raise KeyError(f"rooms_picture.py: COLUMNS: expected every room, got none for {', '.join(sorted(strangers))}")
    rows = list(networkx.topological_generations(arrows.reverse()))[::-1]
    places = {
        room: (MARGIN + COLUMNS[room] * ACROSS + WIDTH / 2, MARGIN + row * DOWN + HEIGHT / 2)
        for row, rooms in enumerate(rows)
        for room in rooms
    }
    size = (int(2 * MARGIN + max(COLUMNS.values()) * ACROSS + WIDTH), 2 * MARGIN + (len(rows) - 1) * DOWN + HEIGHT)
    lines = [HEAD.format(*size)]
    for device, color in (("cpu", "#fff4e6"), ("cuda", "#ebfbee")):
        inside = [place for room, place in places.items() if room.split("/")[0] == device]
        left, top = (min(axis) for axis in zip(*inside, strict=True))
        right, bottom = (max(axis) for axis in zip(*inside, strict=True))
        lines.append(
            f'<rect x="{left - WIDTH / 2 - 9:g}" y="{top - HEIGHT / 2 - 9:g}" width="{right - left + WIDTH + 18:g}" '
            f'height="{bottom - top + HEIGHT + 18:g}" rx="8" fill="{color}"/>'
        )
    for room, end in sorted(arrows.edges):
        (x, y), (to_x, to_y) = places[room], places[end]
        lines.append(
            f'<path d="M{x:g} {y + HEIGHT / 2:g} {to_x + (x - to_x) * 0.2:g} {to_y - HEIGHT / 2 - 1:g}" '
            f'stroke="#495057" marker-end="url(#head)"><title>{room} includes {end}</title></path>'
        )
    for room in sorted(places):
        x, y = places[room]
        for inset in (0, 3) if room in sees_torch else (0,):
            lines.append(
                f'<rect x="{x - WIDTH / 2 + inset:g}" y="{y - HEIGHT / 2 + inset:g}" width="{WIDTH - 2 * inset}" '
                f'height="{HEIGHT - 2 * inset}" rx="4" fill="#fff" stroke="#495057"/>'
            )
        lines.append(f'<text x="{x:g}" y="{y + 5:g}">{room}</text>')
    return "\n".join([*lines, "</svg>\n"])
