"""The page of results: one file with everything in it, whose figures are those of bench/results."""

import json
import re
import sys

import pytest
from util import ROOT

if not (ROOT / "bench" / "results").exists():
    pytest.skip("there are no results beside these tests", allow_module_level=True)
pytest.importorskip("plotly")
sys.path.insert(0, str(ROOT / "bench"))
import page

RESULTS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "bench" / "results").glob("*.json"))}


@pytest.fixture(scope="module")
def html():
    return page.page(list(RESULTS.values()))


@pytest.fixture(scope="module")
def data(html):
    return json.loads(re.search(r"^const DATA = (.*);$", html, re.MULTILINE)[1])


def test_nothing_is_loaded_from_elsewhere(html):
    head, _, body = html.partition("<body>")
    assert "Plotly" in head and len(head) > 1_000_000
    assert not re.search(r"<(?:script|link|img)[^>]*(?:src|href)=", head + body)
    assert "/*data*/" not in body and "/*plotly*/" not in head


@pytest.mark.parametrize("index, result", list(enumerate(RESULTS.values())), ids=list(RESULTS))
def test_figures_are_the_results(data, index, result):
    shown = data[index]
    assert result["machine"]["cpu"] in shown["name"] and result["date"] in shown["about"]
    timed = [c for c in result["cases"] if "eager" in c["ratio"] and not c.get("grid")]
    assert len(shown["cases"]) == len(timed) > 20
    for case, entry in zip(timed, shown["cases"], strict=True):
        assert entry["seconds"]["regfast"] == case["median_s"]["regfast"]
        assert entry["ratio"]["PyTorch"] == case["ratio"]["eager"]
        assert entry["share"] == case.get("share")
        assert [(e["who"], e["error"]) for e in entry["errors"]] == list(case.get("errors", {}).items())
        if "gflops" in entry:
            assert entry["gflops"] == pytest.approx(case["flops"] / case["median_s"]["regfast"] / 1e9)
            assert entry["gflops"] < 1.2 * shown["peak"] or case["dtype"] != "float32"


def test_heat_maps_have_every_cell_that_was_measured(data):
    for shown, result in zip(data, RESULTS.values(), strict=True):
        cells = sum(value is not None for grid in shown["grids"] for row in grid["ratio"] for value in row)
        cases = [c for c in result["cases"] if c.get("grid")]
        assert cells == len(cases) + sum("openblas" in c["environments"] for c in cases)
