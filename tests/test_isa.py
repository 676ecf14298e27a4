"""Every instruction set that this machine can run, each in a process of its own: REGFAST_ISA is read at import."""

import os
import platform
import subprocess
import sys

import pytest
from util import ROOT, fresh_process

import regfast

REPORT = "import regfast; print(regfast.isa(), regfast.isas())"


def test_the_one_in_use_is_the_best_of_those_that_run():
    names = regfast.isas()
    assert "scalar" in names and len(set(names)) == len(names)
    assert regfast.isa() in names
    assert fresh_process(REPORT, REGFAST_ISA="").split()[0] != "scalar" or names == ["scalar"]


@pytest.mark.parametrize("isa", regfast.isas())
def test_forced_by_the_environment(isa):
    assert fresh_process(REPORT, REGFAST_ISA=isa).split()[0] == isa


@pytest.mark.parametrize("isa", ["sse", "neon" if platform.machine() in ("x86_64", "AMD64") else "avx2"])
def test_an_isa_that_cannot_run_is_refused_in_words(isa):
    with pytest.raises(AssertionError, match=rf"REGFAST_ISA.*{isa}"):
        fresh_process(REPORT, REGFAST_ISA=isa)


@pytest.mark.parametrize("isa", [isa for isa in regfast.isas() if isa != regfast.isa()])  # on which all tests run
def test_numbers(isa):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "tests/numerics.py"],
        cwd=ROOT,
        # One thread: it is the arithmetic that is in question, and other load on the machine then does no harm.
        env={**os.environ, "REGFAST_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
