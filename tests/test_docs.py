"""What the documentation says of files, functions and make targets is so."""

import re
import subprocess
from urllib.parse import urlsplit

import pytest
from util import ROOT

DOCS = ROOT / "docs"
if not DOCS.exists() or not (ROOT / "csrc").exists():
    pytest.skip("there are no docs or no sources beside these tests", allow_module_level=True)

PAGES = [*DOCS.glob("*.md"), *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "KERNELS", "SECURITY"))]
HOUSE = (DOCS / "house.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_other_hosts_are_well_formed(page):
    links = re.findall(r"\w+://[^\s)>\]\"'`]*", re.sub(r"^( {4}|```).*$", "", page.read_text(), flags=re.MULTILINE))
    for link in links:
        parts = urlsplit(link.rstrip(".,;:"))
        assert parts.scheme == "https" or parts.hostname == "localhost", link
        assert re.fullmatch(r"[\w.-]+\.[a-z]{2,}|localhost", parts.hostname or ""), link
        assert re.fullmatch(r"[\w./%~+-]*", parts.path), link


def test_pages_of_the_site_do_not_link_to_pages_outside_of_it():
    # README.md is for code hosts; the site has docs/index.md. Sphinx says so too, but later.
    site = [*DOCS.glob("*.md"), *(ROOT / name for name in ("bench/README.md", "CONTRIBUTING.md", "KERNELS.md"))]
    linked = [(page.name, link) for page in site for link in re.findall(r"\]\(([^)#]*\bREADME\.md)", page.read_text())]
    assert [entry for entry in linked if not entry[1].endswith("bench/README.md")] == []
    # What only the site has, conf.py links to: on a code host the link would lead nowhere.
    assert not [page.name for page in site if "<a " in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    paths = re.findall(r"`((?:csrc|regfast|tests|bench|docs|examples)/[\w./]+)`", page.read_text())
    assert not [
        path for path in paths if not (ROOT / path).exists() and path != "examples/figures" and "/build/" not in path
    ]


def test_functions_of_the_walk_are_where_it_says():
    hops = re.findall(r"^\| \d+ \| `([^`]+)` \| `([^`]+)` \|", HOUSE, re.MULTILINE)
    assert len(hops) == len(re.findall(r"^\| \d+ \|", HOUSE, re.MULTILINE)) > 10
    for file, function in hops:
        assert re.search(rf"\b{function}\b", (ROOT / file).read_text()), f"{file} has no {function}"


SECTIONS = re.findall(r"^### [^\n]*: where `(\w+)` is named\n(.*?)(?=^#|\Z)", HOUSE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("word, section", SECTIONS, ids=[word for word, _ in SECTIONS])
def test_lists_of_what_a_new_one_touches_are_whole(word, section):
    listed = set(re.findall(r"`((?:csrc|regfast)/[^`]+)`", section))
    named = {
        path.relative_to(ROOT).as_posix()
        for top in ("csrc", "regfast")
        for path in (ROOT / top).rglob("*")
        if path.suffix in {".h", ".cpp", ".cuh", ".cu", ".py"} and path.parent.name != "cli"
        if word in path.read_text().lower()
    }
    assert listed == named


def test_the_prediction_for_many_ranks_is_what_its_code_computes():
    page = (DOCS / "distributed.md").read_text()
    (code,) = re.findall(r"```python\n(from math.*?)```", page, re.DOTALL)
    names = {}
    exec(code, names)
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [8, 16, 32, 64, 128, 256, 512, 1024]
    for ranks, *printed in rows:
        products, traffic, sent, step = names["predict"](int(ranks), 8192, 4096, 131072, 400e12, 50e9, 1e-5, 8)
        computed = (f"{1e3 * products:.2f}", f"{1e3 * traffic:.2f}", f"{sent / 1e6:.0f}", f"{1e3 * step:.2f}")
        assert tuple(printed) == computed


def test_make_help_explains_every_target():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()) - {"help", "FORCE"}
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    explained = dict(re.findall(r"^make ([\w.-]+) +(\S.*)$", shown, re.MULTILINE))
    assert set(explained) == targets | {"compile_commands.json"}
    # Each line stands above its target, with nothing but comments, variables and what belongs to it in between.
    for name in explained:
        assert re.search(
            rf"^#: make {re.escape(name)} .*\n(?:(?!#:|\t).*\n)*?{re.escape(name)}:", text, re.MULTILINE
        ), name
