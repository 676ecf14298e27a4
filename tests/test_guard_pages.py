"""Every op on tensors against unmapped pages, with every instruction set of this machine: guarded_calls.py does it in a
process of its own, which an access beyond a tensor ends."""

import os
import signal
import subprocess
import sys

import guard
import pytest
import torch
from guarded_calls import OPS
from util import ROOT, SANITIZED

import regfast


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(SANITIZED, reason="the sanitizer reports the fault, and the process exits")
@pytest.mark.parametrize("access", ["read behind", "read before", "write"])
def test_an_access_that_is_wrong_is_a_fault(access):
    code = f"""
import sys; sys.path.insert(0, "tests")
import ctypes, torch, guard
values = torch.ones(5)
behind, before = guard.place(values), guard.place(values, side="before")
guard.place(values, writable=True).fill_(2)
print(behind.sum().item(), before.sum().item(), flush=True)
if {access!r} == "write": behind.fill_(2)
elif {access!r} == "read behind": ctypes.string_at(behind.data_ptr() + 20, 1)
else: ctypes.string_at(before.data_ptr() - 1, 1)
"""
    done = run("-c", code)
    assert done.stdout == "5.0 5.0\n", done.stderr
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS)


@pytest.mark.parametrize("layout", guard.LAYOUTS)
@pytest.mark.parametrize("side", guard.SIDES)
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (5, 3), (2, 3, 4), (1100, 3)], ids=str)
def test_placed_values_are_the_given_ones(layout, side, shape):
    values = torch.randn(shape, dtype=torch.float64)
    placed = guard.place(values, layout, side)
    if shape and values.numel():
        values = {"rows expanded": values[:1], "columns expanded": values[..., :1]}.get(layout, values).expand(shape)
    assert torch.equal(placed, values)


@pytest.mark.parametrize("isa", regfast.isas())
def test_no_access_beyond_a_tensor(isa):
    # Our products, whatever the library's are worth on this machine. One process for all ops: torch's import takes as
    # long as two ops' calls, and the last line names the op.
    done = run("tests/guarded_calls.py", *OPS, REGFAST_ISA=isa, REGFAST_GEMM="own")
    fault = signal.Signals(-done.returncode).name if done.returncode < 0 else "failed"
    last = done.stdout.splitlines()[-1:] or ["before the first call"]
    assert done.returncode == 0, f"{isa}: {fault} in {last[0]}\n{done.stderr[-3000:]}"
