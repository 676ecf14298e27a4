"""python -m regfast info and bench."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from util import ROOT

import regfast
from regfast import _environment
from regfast.__main__ import main
from regfast.cli import bench

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
    assert found == set(_environment.MEANINGS)


WRONG = {
    "REGFAST_ISA": "mmx",
    "REGFAST_GEMM": "mkl",
    "REGFAST_POOL": "-1",
    "REGFAST_VERBOSE": "yes",
    "REGFAST_CUDA_KERNELS": "2",
    "REGFAST_CUDA_GEMM": "own",
    "REGFAST_PROOFS": "/dev/null",
}


@pytest.fixture(scope="module")
def with_wrong_variables():
    def run(*command):
        environment = {**os.environ, **WRONG}
        return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)

    return run


def test_each_variable_with_a_wrong_value_is_one_sentence():
    for name, value in WRONG.items():
        assert re.fullmatch(rf"{name}: expected [^:]+, got {re.escape(value)}", _environment.fault(name, value))
    for name in _environment.MEANINGS:
        assert not _environment.fault(name, "")
    right = {"REGFAST_ISA": "scalar", "REGFAST_GEMM": "aten", "REGFAST_POOL": "0", "REGFAST_PROOFS": "not/there/yet"}
    assert not any(_environment.fault(name, value) for name, value in right.items())


def test_info_tells_wrong_variables_and_goes_on(with_wrong_variables):
    done = with_wrong_variables("-m", "regfast", "info", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    for name, value in WRONG.items():
        assert said["environment"][name] == f"is as if not set: {_environment.fault(name, value)}"
    assert said["kernels"]["instruction set"] == regfast.isas()[0]


def test_other_commands_refuse_wrong_variables(with_wrong_variables):
    done = with_wrong_variables("-m", "regfast", "bench")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and all(f"{name}: expected" in done.stderr for name in WRONG)


def test_a_program_is_told_the_first_one(with_wrong_variables):
    done = with_wrong_variables("-c", "import regfast")
    sentence = _environment.fault("REGFAST_ISA", WRONG["REGFAST_ISA"])
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f"ValueError: {sentence}"


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
