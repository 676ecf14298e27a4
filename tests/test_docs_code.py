"""Every block of Python in README.md and docs/ runs, one after another, and prints what the page says it prints."""

import contextlib
import io
import re
from collections import OrderedDict

import pytest
import torch
from torch import nn
from util import ROOT

import regfast
from regfast._environment import MEANINGS

if not (ROOT / "docs").exists():
    pytest.skip("there are no docs beside these tests", allow_module_level=True)

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class LanguageModel(nn.Module):
    """As small as a model of a reader's own may be."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(32, 8), nn.Linear(8, 32, bias=False)

    def get_output_embeddings(self):
        return self.head

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


@pytest.fixture
def one_process(tmp_path):
    """A group of this process alone, for what is written for many: the page starts it."""
    import torch.distributed as dist

    begin = dist.init_process_group
    patch = pytest.MonkeyPatch()
    one = {"init_method": f"file://{tmp_path}/store", "rank": 0, "world_size": 1}
    patch.setattr(dist, "init_process_group", lambda backend: begin(backend, **one))
    yield
    patch.undo()
    if dist.is_initialized():
        dist.destroy_process_group()


def names_of_many_processes():
    """What the page leaves to its reader, who has it: a rank's logits, a model and its data."""
    model = nn.Sequential(OrderedDict(head=nn.Linear(8, 16)))
    rows = {"hidden": torch.randn(4, 8, requires_grad=True), "x": torch.randn(4, 8), "target": torch.randint(16, (4,))}
    logits = torch.randn(4, 16, requires_grad=True)
    return {"logits_of_my_classes": logits, "features": 8, "classes": 16, "model": model, **rows}


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda page: page.name)
def test_code_runs_and_prints_what_the_page_says(page, one_process):
    names = names_of_many_processes() if page.stem == "distributed" else {"model": LanguageModel()}
    text, shown = page.read_text(), io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            for block in BLOCK.findall(text):
                exec(compile(block, str(page), "exec"), names)
    finally:
        regfast.restore()
    # An indented line behind a block that ends in print is what it prints, but for numbers, which are a machine's.
    printed = [re.sub(r"[\d.]+", "0", line) for line in shown.getvalue().splitlines()]
    for expected in re.findall(r"print\([^\n]*\n```\n(?:\n[^\n`#]+\n)?\n    ([^\n]+)\n", text):
        assert re.sub(r"[\d.]+", "0", expected) in printed


def test_the_pages_have_code():
    assert sum(len(BLOCK.findall(page.read_text())) for page in PAGES) >= 15


def test_the_table_of_variables_is_that_of_the_command():
    table = (ROOT / "docs" / "faq.md").read_text()
    rows = re.findall(r"^\| `(REGFAST_\w+)` \| (.*) \|$", table, re.MULTILINE)
    assert dict(rows) == MEANINGS


def test_the_pictures_figures_are_the_tables():
    page, readme = ((ROOT / name).read_text() for name in ("docs/accelerate.md", "README.md"))
    rows = re.findall(r"^\| ([\w-]+), bfloat16 \| ([\d.]+) s \| [\d.]+x \| ([\d.]+)x \|", page, re.MULTILINE)
    picture = (ROOT / "docs" / "static" / "models.svg").read_text()
    said = re.findall(r">(?:[\d.]+ s, )?([\d.]+(?:x as fast| s))<", picture)
    assert said == [text for _, seconds, times in rows for text in (f"{seconds} s", f"{times}x as fast")]
    name, number = re.search(r"\*\*([\w-]+)[^*]* (\d+) times as fast\*\*", readme).groups()
    assert (name, number) in [(name, times) for name, _, times in rows]
