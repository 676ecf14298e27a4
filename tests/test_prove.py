"""python -m regfast prove from its first case to the table, on the emulated device; and with kernels that are wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_gpu import SIZES, EmulatedGpu

from regfast import _C
from regfast.cli import prove as command
from regfast.proof import run, sanitizer, store

EMULATOR = sys.modules["conftest"].EMULATOR
pytestmark = [
    pytest.mark.no_kernels("they run in processes of their own"),
    pytest.mark.skipif(EMULATOR is None, reason="the emulator is not built"),
]
WORKER = [sys.executable, str(Path(__file__).parent / "emulated_gpu.py")]


@pytest.fixture
def prove(tmp_path, monkeypatch, capsys):
    """The command with planted faults: its status, the proof, and what it printed."""
    monkeypatch.setenv("REGFAST_PROOFS", str(tmp_path / "proofs"))
    monkeypatch.setattr(sanitizer.shutil, "which", lambda *_, **__: None)

    def call(planted: str = "", ratio: float = 2.0, slow: str = ""):
        monkeypatch.setenv("PLANTED", planted)
        monkeypatch.setenv("PLANTED_RATIO", str(ratio))
        monkeypatch.setenv("PLANTED_SLOW", slow)
        status = command.run_on(0, WORKER, seconds=3000)  # however busy the machine is
        told = capsys.readouterr()
        return status, store.read(EmulatedGpu(EMULATOR).identity()), told.out + told.err

    return call


def test_right_kernels_are_proven(prove):
    slow = "softmax short few,softmax columns,cross_entropy medium"
    status, proof, told = prove(slow=slow)
    assert status == 0, told
    assert proof.proven == list(_C.CUDA_OPS) and not proof.failures
    # The clock says that ours are twice as fast, in everything.
    assert proof.choices["bfloat16 large"] == "sm80" and proof.choices["float32 relu"] == "fused"
    # torch's gelu on the CPU is another than gelu_tanh, which the proof finds: that epilogue is not taken.
    assert "float32 gelu_tanh" not in proof.choices and "torch's epilogue is not as exact" in told
    # Of rows those are PyTorch's for which its kernels are faster, and the others ours.
    assert {what for what, chosen in proof.choices.items() if chosen == "aten"} == set(slow.split(","))
    assert "softmax fwd, columns" in told and "PyTorch's is taken" in told
    assert "right in" in told and "compute-sanitizer" in told and "90%" in told


def test_each_wrong_kernel_is_named_and_stays_on_pytorch(prove):
    """One run, with a fault of another kind in each op: two of them end the process, which begins again behind them."""
    planted = {
        "softmax_forward": "wrong",
        "logsumexp_backward": "beyond",
        "mse_loss_forward": "other_bits",
        "linear_nll_forward": "raise",
        "linear_backward": "lose",
        "phm_linear_backward": "crash",
    }
    status, proof, told = prove(",".join(f"{op} {fault}" for op, fault in planted.items()), ratio=0.5)
    assert status == 1
    wrong = {"softmax", "log_softmax", "logsumexp", "mse_loss", "linear_nll", "linear", "phm_linear"}
    right = {"cross_entropy", "linear_cross_entropy"}
    assert {failure["op"] for failure in proof.failures} == wrong | {"sm80 float32", "sm80 bfloat16"}
    said = {failure["op"]: failure["error"] for failure in proof.failures}
    assert "error" in said["softmax"] and "PyTorch's" in said["softmax"]
    assert "memory behind a tensor" in said["logsumexp"]
    assert "other bits" in said["mse_loss"]
    assert said["linear_nll"] == "RuntimeError: CUDA error: invalid argument"
    assert said["linear"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert said["phm_linear"] == "the process ended by SIGSEGV"
    assert all(failure["case"] for failure in proof.failures)
    # Those that are right are measured, and were planted to be slower than PyTorch's.
    assert all(proof.ops[op].startswith("slower than PyTorch here") for op in right)
    assert proof.proven == [] and proof.choices == {}
    assert "softmax is wrong in" in told and "Please report it as an issue" in told


def test_a_case_that_hangs_costs_its_op_and_one_without_memory_is_skipped(monkeypatch):
    monkeypatch.setenv("PLANTED", "logsumexp_forward hang,linear_nll_forward full")
    choices = [f"{choice} {arithmetic}" for choice in ("sm80", "relu", "gelu_tanh") for arithmetic in SIZES.arithmetics]
    others = [*choices, *(op for op in _C.CUDA_OPS if op not in ("logsumexp", "linear_nll", "mse_loss"))]
    machine, subjects = run.run_cases([*WORKER, "cases", "--without", *others], lambda *_: None, hang_seconds=30)
    assert machine == EmulatedGpu(EMULATOR).identity()
    assert subjects["logsumexp"].error == "no answer for 30 s" and not subjects["mse_loss"].why_not
    full = subjects["linear_nll"]
    assert not full.failed and full.passed and len(full.skipped) == full.cases - full.passed
    assert all(case.endswith("not enough memory is free") for case in full.skipped) and full.skipped


def test_a_worker_that_does_not_start_is_told_in_its_words(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("REGFAST_PROOFS", str(tmp_path))
    broken = [sys.executable, "-c", "raise SystemExit('no CUDA driver')"]
    assert command.run_on(0, broken, 600) == 2
    assert "no case could be run: no CUDA driver" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


CHOICES = """
import torch, torch.nn.functional as F, regfast
from emulated_gpu import enable, load_emulator
from on_cuda import seen
from regfast._paths import recorded

emulator = load_emulator()
enable(emulator, "forward", 80)

def path(n, d, v, dtype=torch.float32):
    with recorded(emulator) as calls:
        regfast.linear(torch.randn(n, d, dtype=dtype), torch.randn(v, d, dtype=dtype))
    return calls[-1].path, calls[-1].why

assert path(70, 8, 70)[0] == path(70, 8, 3)[0] == "aten" and "not proven to be faster" in path(70, 8, 70)[1]
emulator.take_cuda_choices([("float32 small", "sm80"), ("float32 large", "sm90")])
assert path(70, 8, 70) == ("kernels", "") and path(70, 8, 3)[0] == "aten"  # whose side of 3 is skinny
assert path(70, 8, 70, torch.float64)[0] == "aten"
emulator.take_cuda_choices([("float32 skinny", "sm80")])
assert path(70, 8, 70)[0] == "aten" and path(70, 8, 3)[0] == "kernels"

def fused(activation, grad=False, bias=True, rows=(5, 7), device_type=torch.float32):
    x, w = torch.randn(*rows, 8, dtype=device_type), torch.randn(6, 8, dtype=device_type, requires_grad=grad)
    b = torch.randn(6, dtype=device_type) if bias else None
    results = []
    ops = seen(lambda: results.append(regfast.linear(x, w, b, activation=activation)))
    expected = regfast.reference.linear(x, w, b, activation=activation)
    # On the CPU its gelu is the exact one: a proof would not choose it there.
    torch.testing.assert_close(results[-1], expected, rtol=1e-5, atol=1e-3 if activation == "gelu_tanh" else 1e-5)
    return "aten::_addmm_activation" in ops

assert not fused("relu")
emulator.take_cuda_choices([("float32 relu", "fused"), ("float32 gelu_tanh", "fused")])
assert fused("relu") and fused("relu", grad=True) and fused("gelu_tanh")
assert not fused("gelu_tanh", grad=True)  # whose derivative wants the pre-activation
assert not fused("relu", bias=False) and not fused("gelu") and not fused("relu", rows=(0, 7))
assert not fused("relu", device_type=torch.float64)
emulator.take_cuda_choices([])
assert not fused("relu")
"""


def test_choices_route_products_and_epilogues(monkeypatch):
    """In a process whose environment forces no product, as that of the other tests does."""
    monkeypatch.delenv("REGFAST_CUDA_GEMM", raising=False)
    tests = Path(__file__).parent
    script = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tests)!r})\n{CHOICES}"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tests)
    assert done.returncode == 0, done.stderr


def test_what_compute_sanitizer_says_is_held_against_the_case_that_ran(tmp_path, monkeypatch):
    lines = [
        "========= COMPUTE-SANITIZER",
        run.MARK + '{"subjects": {"softmax": 2, "linear": 1}}',
        run.MARK + '{"begin": 0, "subject": "softmax", "case": "(37, 10)"}',
        run.MARK + '{"end": 0, "passed": true}',
        run.MARK + '{"begin": 1, "subject": "linear", "case": "(1, 2, 3)"}',
        "========= Invalid __global__ write of size 16 bytes",
        "=========     at rf::cuda::gemm+0x10",
        run.MARK + '{"end": 1, "passed": true}',
        "========= ERROR SUMMARY: 1 error",
    ]
    script = tmp_path / "says.py"
    script.write_text(f"print({chr(10).join(lines)!r}, flush=True)\nraise SystemExit(1)")
    faults, said, failed = run.run_sanitizer([sys.executable, str(script)], 60)
    assert faults == {"linear": ("(1, 2, 3)", "Invalid __global__ write of size 16 bytes")}
    assert said == "2 cases" and not failed
    script.write_text(f"import time\nprint({lines[1]!r}, flush=True)\ntime.sleep(60)")
    assert run.run_sanitizer([sys.executable, str(script)], 2) == ({}, "0 cases, stopped after 2 s", "")
    script.write_text("raise SystemExit('not for this driver')")
    found = run.run_sanitizer([sys.executable, str(script)], 60)
    assert found == ({}, "could not run: it exited with 1: not for this driver", "")
    script.write_text(f"print({chr(10).join(lines[1:4])!r}, flush=True)\nraise SystemExit('an error at the end')")
    assert run.run_sanitizer([sys.executable, str(script)], 60)[2] == "it exited with 1: an error at the end"


def test_a_small_run_takes_a_case_of_each_subject_first():
    """As under compute-sanitizer, which may be stopped before all have run."""
    others = ["linear_cross_entropy", "linear_nll", "phm_linear", "linear", "cross_entropy"]
    script = [*WORKER, "cases", "--small", "--without-canaries", "--without", *others]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    told = [json.loads(line.removeprefix(run.MARK)) for line in done.stdout.splitlines() if line.startswith(run.MARK)]
    begun = [entry["subject"] for entry in told if "begin" in entry]
    subjects = list(dict.fromkeys(begun))
    assert begun[: len(subjects)] == subjects and {"softmax", "mse_loss", "sm80 bfloat16"} <= set(subjects)
    assert begun[len(subjects)] == subjects[0]  # and so on; a subject that is refused is left out from then on
