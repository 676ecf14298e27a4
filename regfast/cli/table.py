"""A table on the terminal, and times in it."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Three digits of it, in s, ms or us."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def print_table(title: str, header: list[str], lines: list[list[str]], texts: int = 1) -> None:
    """By rich if it is installed, else in plain columns: GPUs are proven where nothing can be installed, too.

    texts: so many columns hold text, which is broken into lines where there is no room; the others hold numbers.
    """
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
        print(f"\n{title}")
        for line in [header, *lines]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < texts else "right", no_wrap=i >= texts)
    for line in lines:
        table.add_row(*line)
    console = Console(markup=False, highlight=False)
    console.width = max(console.width, 150)  # the table needs it, in a pipe too
    console.print(table)
