"""python -m regfast info and bench."""

import json
import re
import subprocess
import sys

import pytest
import torch
from util import ROOT

import regfast
from regfast.__main__ import main
from regfast.cli import bench, info

SOURCES = ROOT / "csrc"


def test_info_is_about_this_process(capsys, monkeypatch):
    monkeypatch.setenv("REGFAST_GEMM", "own")
    monkeypatch.delenv("REGFAST_ISA", raising=False)
    assert main(["info", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["versions"]["torch"] == torch.__version__
    assert said["kernels"]["instruction set"] == regfast.isa()
    assert said["environment"]["REGFAST_GEMM"] == "own" and "REGFAST_ISA" not in said["environment"]
    assert said["paths"]["extension"] == regfast._C.__file__
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {re.escape(n)} +{re.escape(v)}$", text, re.M) for n, v in said["versions"].items())


@pytest.mark.skipif(not SOURCES.exists(), reason="there are no sources beside these tests")
def test_every_variable_that_the_code_reads_is_known():
    files = [p for top in (SOURCES, ROOT / "regfast") for p in top.rglob("*") if p.suffix in {".py", ".cpp", ".cu"}]
    read = r"""(?:getenv|environ(?:\.get)?|setdefault)[(\[]["'](REGFAST_\w+)"""
    found = {name for path in (*files, ROOT / "setup.py") for name in re.findall(read, path.read_text())}
    assert found == set(info.ENVIRONMENT)


@pytest.mark.parametrize("case", bench.cases(), ids=lambda case: case.name)
def test_what_is_timed_beside_each_other_is_the_same(case):
    tensors = case.make()
    assert any(t.requires_grad for t in tensors)
    with torch.no_grad():
        ours, torchs = case.ours(*tensors), case.torchs(*tensors)
    tolerance = 2e-2 if ours.dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(ours, torchs, rtol=tolerance, atol=tolerance * torchs.abs().max().item())


def test_bench_prints_a_table_and_a_line_to_paste():
    command = [sys.executable, "-m", "regfast", "bench", "--seconds", "0.2", "--only", "cross_entropy 256"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = re.search(r"^cross_entropy 256 x 10 +[\d.e+]+ \w+ +[\d.e+]+ \w+ +([\d.]+)x  ", done.stdout, re.M)
    last = done.stdout.splitlines()[-1]
    assert last.endswith(f": cross_entropy 256 x 10 {row[1]}x") and f"torch {torch.__version__}" in last


@pytest.mark.parametrize(
    "arguments, said",
    [(["--only", "nothing like it"], "--only: expected a part of one of: linear"), (["--seconds", "0"], "--seconds")],
    ids=["only", "seconds"],
)
def test_bench_without_anything_to_time(arguments, said, capsys):
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_commands_are_named_where_none_is(capsys):
    assert main([]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in ("info", "prove", "bench"))


@pytest.mark.parametrize("command", ["info", "prove", "bench"])
def test_wrong_options_are_the_commands(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--bogus"])
    assert f"usage: python -m regfast {command}" in capsys.readouterr().err
