"""Draws the README's picture, docs/static/models.svg, from the table of docs/accelerate.md: the bfloat16 models."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parent.parent / "docs"
STOCK, OURS = "#9aa5b1", "#d9480f"


def rows(page: str) -> list[tuple[str, float, float]]:
    """Model, seconds of the stock step and how many times as fast it is after accelerate(products=True)."""
    found = re.findall(r"^\| ([\w-]+), bfloat16 \| ([\d.]+) s \| [\d.]+x \| ([\d.]+)x \|", page, re.MULTILINE)
    return [(name, float(seconds), float(times)) for name, seconds, times in found]


def draw(models: list[tuple[str, float, float]], path: Path) -> None:
    # Text stays text, which is small and can be read; the same input gives the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "regfast", "font.family": "sans-serif"})
    figure, axes = plt.subplots(figsize=(6.25, 3.3), dpi=96, layout="constrained")
    for i, (_, seconds, times) in enumerate(models):
        at = len(models) - 1 - i
        axes.barh(at + 0.2, seconds, 0.36, color=STOCK, label="PyTorch" if i == 0 else None)
        label = "with regfast.accelerate(products=True)" if i == 0 else None
        axes.barh(at - 0.2, seconds / times, 0.36, color=OURS, label=label)
        axes.text(seconds + 0.08, at + 0.2, f"{seconds:g} s", va="center", fontsize=9)
        text = f"{seconds / times:.2g} s, {times:g}x as fast"
        axes.text(seconds / times + 0.08, at - 0.2, text, va="center", fontsize=9, color=OURS)
    axes.set_yticks(range(len(models)), [name for name, *_ in reversed(models)])
    axes.set_xlim(0, 1.12 * max(seconds for _, seconds, _ in models))
    axes.set_xlabel("seconds of a training step in bfloat16, on a CPU without instructions for it")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(rows((DOCS / "accelerate.md").read_text()), DOCS / "static" / "models.svg")
