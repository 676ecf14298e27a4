"""python -m regfast prove as its user meets it: what it says, and what befalls it. Its cases are test_prove.py's."""
# ruff: noqa: F811  # fixtures are taken from proof_examples.py by their names

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from proof_examples import GPU, gpu, in_use, proof_of, proofs  # noqa: F401

from regfast import _C
from regfast.__main__ import main
from regfast.cli import prove as command
from regfast.proof import decide, machine, roofline, run, store
from regfast.proof.run import Subject

pytestmark = pytest.mark.no_kernels("no GPU is there")


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12.2\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (dvs-builder)\n",
    ],
)
def test_the_driver_is_named_as_nvidia_smi_names_it(tmp_path, text):
    (tmp_path / "version").write_text(text)
    assert machine.driver(tmp_path / "version") == "550.54.15"


def test_the_build_is_told_by_the_extension_and_its_torch(monkeypatch):
    first = machine.build()
    assert machine.build() == first and len(first) == 12
    monkeypatch.setattr(torch, "__version__", torch.__version__ + "x")
    assert machine.build() != first


def test_without_kernels_or_gpu_there_is_nothing_to_prove(monkeypatch, capsys):
    monkeypatch.setattr(decide, "is_built", lambda: False)
    assert main(["prove"]) == 2
    assert "expected a build with CUDA kernels" in capsys.readouterr().err
    monkeypatch.setattr(decide, "is_built", lambda: True)
    monkeypatch.setattr(decide, "devices", lambda: 0)
    assert main(["prove"]) == 2
    assert "expected an NVIDIA GPU" in capsys.readouterr().err
    monkeypatch.setattr(decide, "devices", lambda: 2)
    assert main(["prove", "--device", "2"]) == 2
    assert "--device: expected one of the 2 GPUs from 0 on, got 2" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named_before_the_work(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REGFAST_PROOFS", str(tmp_path / "file" / "proofs"))
    assert command.run_on(0, ["no-such-program"], 1) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and "the proof could not be written" in told and "REGFAST_PROOFS" in told


@pytest.mark.parametrize("with_rich", [True, False])
def test_what_the_command_prints(monkeypatch, capsys, proofs, with_rich):
    """Of a proof as a GPU might give it: one table, what is wrong and how to report it, last where the proof lies."""
    if not with_rich:
        for name in ("rich", "rich.console", "rich.table", "rich.progress"):
            monkeypatch.setitem(sys.modules, name, None)
    subjects = {
        "linear": Subject(2, passed=1, skipped=["large: 48 GiB of memory are not free"]),
        "softmax": Subject(3, passed=1, failed="(37, 10) float32 odd", error="other bits"),
        "sm90 bfloat16": Subject(4, passed=4),
        "gelu_tanh float32": Subject(4, failed="(3, 4, 5)", error="error 0.1"),
    }
    timed = {
        "name": "softmax fwd, short",
        "op": "softmax",
        "median_s": {"regfast": 2e-4},
        "ratio": 1.25,
        "share": 0.872,
    }
    won = {
        "name": "gemm_sm90, bfloat16 large",
        "choice": "bfloat16 large",
        "chosen": "sm90",
        "ratio": 1.1,
        "share": None,
    }
    made = proof_of(
        failures=[{"op": "softmax", "case": "(37, 10) float32 odd", "error": "other bits"}],
        measured=[{**timed, "bound": "copy_gb_s", "predicted": 0.9}, won],
        left_out=[{"left_out": f"case {i}", "error": "the time was over"} for i in range(5)],
    )

    def prove(worker, device, seconds, progress):
        progress(1, 9, "softmax (37, 10)")
        return made, subjects, "17 cases, 0 faults"

    monkeypatch.setattr(command, "prove", prove)
    assert command.run_on(0, [], 1) == 1
    told = capsys.readouterr()
    words = " ".join(told.out.split())
    for text in (
        "right in 1 cases, 1 skipped",
        "other bits",
        "200 us",
        "1.25x",
        "87%",
        "90%",
        "taken",
        "17 cases, 0 faults",
        "Not measured: case 0 (the time was over), case 1 (the time was over), case 2 (the time was over) and 2 more.",
    ):
        assert text in words, text
    assert "softmax is wrong in (37, 10) float32 odd: other bits." in words and "Please report it as an issue" in words
    assert words.endswith(f"Written to {proofs / GPU.file_name}")
    assert store.read(GPU) == made
    assert with_rich or "1 of 9: softmax" in told.err

    def full(proof):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write", full)
    assert command.run_on(0, [], 1) == 2
    assert "could not be written: [Errno 28] No space left on device; REGFAST_PROOFS" in capsys.readouterr().err


def test_the_ledger_is_made_of_the_predictions():
    path = machine.Path(__file__).parent.parent / "KERNELS.md"
    if not path.exists():
        pytest.skip("there is no KERNELS.md beside these tests")
    within = path.read_text().split(roofline.BEGIN)[1].split(roofline.END)[0]
    assert within.strip() == roofline.table()
    assert roofline.predicted("cross_entropy fwd", 89) == roofline.predicted("cross_entropy fwd", 80)
    assert roofline.predicted("gemm_sm90 bf16", 80) is None and roofline.predicted("gemm_sm80 fp64", 90) is None


# ---- what befalls it -------------------------------------------------------------------------------------------------

# A worker that passes a case of each of three subjects in no time and stays in the last one; then measures one thing.
WORKER = f"""
import json, os, sys, time
from regfast.proof import worker
if "--with-parent" in sys.argv:
    worker.end_with_parent()
if "measure" in sys.argv:
    worker.tell(ceilings={{}})
    worker.tell(name="softmax fwd")
    time.sleep(1000)
worker.tell(machine={vars(GPU)!r}, subjects=dict.fromkeys(("linear", "softmax", "mse_loss"), 1))
for i, subject in enumerate(("linear", "softmax", "mse_loss")):
    worker.tell(begin=i, subject=subject, case="(1, 2)")
    if i == 2:
        print(worker.MARK + json.dumps({{"pid": os.getpid()}}), flush=True)
        time.sleep(1000)
    worker.tell(end=i, passed=True)
"""


SECONDS = 40  # in which a worker starts, on a machine that has much else to do


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    return [sys.executable, str(tmp_path / "worker.py")]


def test_when_time_is_over_what_has_not_run_is_named_and_not_proven(worker):
    begin = time.monotonic()
    _, subjects = run.run_cases([*worker, "cases"], lambda *_: None, seconds=SECONDS)
    assert time.monotonic() - begin < 3 * SECONDS
    assert not subjects["linear"].why_not and not subjects["softmax"].why_not
    said = subjects["mse_loss"].why_not
    assert said == f"0 of 1 cases were run when {SECONDS} s were over; --seconds allows more; (1, 2) had begun"


def test_a_device_that_begins_no_case_in_time_has_nothing_proven():
    with pytest.raises(run.NotRun, match="no case had begun after 1 s; --seconds allows more"):
        run.run_cases([sys.executable, "-c", "import time; time.sleep(1000)"], lambda *_: None, seconds=1)


def test_what_was_not_measured_in_time_is_named(worker):
    told = run.run_measurements([*worker, "measure"], lambda _: None, seconds=SECONDS)
    assert told[:2] == [{"ceilings": {}}, {"name": "softmax fwd"}]
    assert told[2] == {
        "left_out": "what comes after softmax fwd",
        "error": f"it was stopped when {SECONDS} s were over",
    }
    script = [sys.executable, "-c", "raise SystemExit('CUDA error: out of memory')"]
    (left,) = run.run_measurements(script, lambda _: None, seconds=60)
    assert left["left_out"] == "what comes after the start" and left["error"].endswith("CUDA error: out of memory")


def ended(pid: int) -> bool:
    for _ in range(300):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # nobody has asked for its status yet
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_one_that_is_stopped_leaves_no_worker_and_the_old_proof(worker, proofs, sent):
    """By Ctrl-C with a word to the user; by whatever, without a process that would hold the device."""
    path = store.write(proof_of())
    before = path.read_bytes()
    script = "import sys; from regfast.cli import prove; sys.exit(prove.run_on(0, sys.argv[1:], 600))"
    # A shell that starts its children in the background has them ignore Ctrl-C.
    script = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {script}"
    # rich is left out, so that each subject that begins is a line.
    script = f"import sys; sys.modules['rich.console'] = sys.modules['rich.progress'] = None; {script}"
    proving = subprocess.Popen([sys.executable, "-c", script, *worker], stderr=subprocess.PIPE, text=True)
    while "mse_loss" not in (line := proving.stderr.readline()):
        assert line, "it ended"
    (child,) = [int(p) for p in Path(f"/proc/{proving.pid}/task/{proving.pid}/children").read_text().split()]
    proving.send_signal(sent)
    said = proving.stderr.read()
    assert proving.wait(60) == (130 if sent == signal.SIGINT else -sent)
    assert "stopped; no proof was written" in said or sent != signal.SIGINT
    assert ended(child)
    assert path.read_bytes() == before and {p.name for p in proofs.iterdir()} == {path.name, ".lock"}


def test_two_at_a_time_wait_for_each_other(worker, proofs):
    script = "import sys; from regfast.cli import prove; sys.exit(prove.run_on(0, sys.argv[1:], 600))"
    broken = [sys.executable, "-c", "raise SystemExit('no CUDA driver')"]
    proofs.mkdir()
    with store.alone(lambda: None):
        second = subprocess.Popen([sys.executable, "-c", script, *broken], stderr=subprocess.PIPE, text=True)
        assert "another one is at work, and is waited for" in second.stderr.readline()
        assert second.poll() is None
    assert "no CUDA driver" in second.stderr.read() and second.wait(60) == 2


def test_a_full_disk_is_found_before_the_work():
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)); "
    script += "from regfast.cli import prove; sys.exit(prove.run_on(0, ['no-such-program'], 88))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "the proof could not be written: " in done.stderr and "File too large" in done.stderr


def test_without_platformdirs_it_says_what_is_missing(gpu, monkeypatch, capsys):
    """As where torch alone is installed: the command in a sentence, the first tensor in its usual one."""
    monkeypatch.delenv("REGFAST_PROOFS")
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert command.run_on(0, ["no-such-program"], 88) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and "platformdirs, which is not installed; REGFAST_PROOFS names another" in told
    with pytest.warns(UserWarning, match="plain PyTorch, for the user's cache directory is told by the package"):
        decide.answer(gpu)
    assert in_use(gpu) == set()


def test_the_time_it_may_take_is_a_number():
    for text in ("5", "nan", "inf", "soon"):
        with pytest.raises(SystemExit) as end:
            main(["prove", "--seconds", text])
        assert end.value.code == 2


# ---- many machines ---------------------------------------------------------------------------------------------------


def test_gpus_that_are_alike_are_told_of_once_and_others_by_themselves(gpu, monkeypatch):
    """Eight of one kind are one warning, and a ninth of another kind its own."""

    class Pretended(machine.Machine):
        def identity(self):
            return GPU if self.index < 56 else machine.Identity("NVIDIA A100", 80, GPU.driver, GPU.build)

    monkeypatch.setattr(decide, "Machine", Pretended)
    monkeypatch.setattr(decide, "devices", lambda: 64)
    with pytest.warns(UserWarning, match="there is no proof") as told:
        for device in range(54, 58):
            decide.answer(device)
    assert len(told) == 2
    assert "prove --device 54 " in str(told[0].message) and "prove --device 56 " in str(told[1].message)


def test_each_kind_of_gpu_has_a_proof_of_its_own(gpu, monkeypatch):
    kinds = [machine.Identity(name, 80, GPU.driver, GPU.build) for name in ("NVIDIA A100", "NVIDIA A100 MIG 1g.5gb+me")]

    class Pretended(machine.Machine):
        def identity(self):
            return kinds[self.index % 2]

    monkeypatch.setattr(decide, "Machine", Pretended)
    monkeypatch.setattr(decide, "devices", lambda: 64)
    paths = [
        store.write(proof_of(kind, ops={op: "" if op == name else "wrong" for op in _C.CUDA_OPS}, choices={}))
        for kind, name in zip(kinds, ("softmax", "linear"), strict=True)
    ]
    assert len(set(paths)) == 2 and paths[1].name.startswith("nvidia-a100-mig-1g-5gb-me-580")
    for device in (48, 49):
        decide.answer(device)
    assert in_use(48) == {"softmax"} and in_use(49) == {"linear"}


@pytest.mark.parametrize("name", ["../../etc/passwd", "NVIDIA\n\x00 A100/B", "\u5bb6", "x" * 300])
def test_whatever_a_gpu_is_called_its_proof_is_a_file_of_the_folder(name, proofs):
    identity = machine.Identity(name, 80, "580.1", GPU.build)
    path = store.write(proof_of(identity))
    assert path.parent == proofs and len(path.name) < 200
    assert store.read(identity).machine == identity


def test_a_driver_that_the_system_does_not_tell_is_named_by_its_cuda(tmp_path, monkeypatch):
    """As under WSL, or where the file is not the one that is known."""
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    assert machine.driver(tmp_path / "version") == "cuda 13000"
    (tmp_path / "version").write_text("something else")
    assert machine.driver(tmp_path / "version") == "cuda 13000"
