"""Which CUDA kernels are in use: the proof's file, what turns them on and off, and what a user is told."""

import json
import os
import sys
import threading
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import regfast
from regfast import _C
from regfast.__main__ import main
from regfast._paths import recorded
from regfast.cli import prove as command
from regfast.proof import decide, machine, roofline, store
from regfast.proof.machine import Identity
from regfast.proof.run import Subject

pytestmark = pytest.mark.no_kernels("no GPU is there")
GPU = Identity("NVIDIA H200", 90, "580.95.05", "0123456789ab")
OPS = dict.fromkeys(_C.CUDA_OPS, "")


def proof_of(identity=GPU, **changes):
    changes = {"ops": {**OPS, "softmax": "wrong"}, "choices": {"bfloat16 large": "sm90"}, **changes}
    return store.Proof(identity, "2026-11-29", **changes)


@pytest.fixture(autouse=True)
def proofs(tmp_path, monkeypatch):
    monkeypatch.setenv("REGFAST_PROOFS", str(tmp_path / "proofs"))
    monkeypatch.delenv("REGFAST_CUDA_KERNELS", raising=False)
    monkeypatch.setattr(decide, "_warned", set())
    return tmp_path / "proofs"


@pytest.fixture
def gpu(monkeypatch):
    """Devices that are asked about as if they were there. What C++ is told of a number stays, so each has another."""

    class Pretended(machine.Machine):
        def identity(self):
            return GPU

    monkeypatch.setattr(decide, "Machine", Pretended)
    monkeypatch.setattr(decide, "is_built", lambda: True)
    monkeypatch.setattr(decide, "devices", lambda: 1)
    gpu.number = getattr(gpu, "number", 8) + 1
    return gpu.number


def in_use(device):
    return {op for op in _C.CUDA_OPS if _C.cuda_kernels_in_use(op, device)}


# ---- the file ------------------------------------------------------------------------------------------------------


def test_a_proof_is_read_as_it_was_written(proofs):
    written = proof_of(measured=[{"name": "softmax", "ratio": 1.5}], ceilings={"copy_gb_s": 3000.0})
    path = store.write(written)
    assert path == proofs / "nvidia-h200-580-95-05-0123456789ab.json" and store.read(GPU) == written
    assert [entry.name for entry in proofs.iterdir()] == [path.name]
    assert os.stat(path).st_mode & 0o777 == 0o644


def test_it_lies_in_the_cache_directory_of_the_user(monkeypatch):
    monkeypatch.delenv("REGFAST_PROOFS")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/of/a/user")
    assert str(store.folder()) == "/somewhere/of/a/user/regfast/proofs" or sys.platform != "linux"


@pytest.mark.parametrize("change", [{"gpu": "NVIDIA H100"}, {"driver": "590.1.2"}, {"build": "ba9876543210"}])
def test_another_machine_asks_for_another_proof(change):
    store.write(proof_of())
    with pytest.raises(store.NoProof, match="there is no proof" if "gpu" in change else "another driver or build"):
        store.read(replace(GPU, **change))


def edited(**changes):
    def edit(text):
        return json.dumps({**json.loads(text), **changes})

    return edit


CORRUPT = {
    "empty": (lambda text: "", "is not JSON"),
    "cut": (lambda text: text[: len(text) // 2], "is not JSON"),
    "bytes": (lambda text: "\x00\xff" + text, "is not JSON"),
    "nested": (lambda text: "[" * 100000, "is not JSON"),
    "list": (lambda text: "[]", "is no proof of format 1"),
    "format": (edited(format=0), "is no proof of format 1"),
    "foreign": (edited(machine={**vars(GPU), "gpu": "NVIDIA A100"}), "is of another machine"),
    "no ops": (edited(ops=None), "has no table of ops"),
    "ops of numbers": (edited(ops=dict.fromkeys(OPS, 1)), "has no table of ops"),
    "other ops": (edited(ops={"softmax": ""}), "is about other ops"),
    "choices": (edited(choices=["bfloat16 large"]), "has no table of choices"),
    "measured": (edited(measured="fast"), "has no measured"),
}


@pytest.mark.parametrize("edit, said", CORRUPT.values(), ids=CORRUPT)
def test_a_file_that_is_no_proof_is_ignored_with_a_warning(gpu, edit, said):
    path = store.write(proof_of())
    path.write_text(edit(path.read_text()))
    with pytest.warns(UserWarning, match=f"plain PyTorch, for an ignored file: .*{said}.*python -m regfast prove"):
        decide.answer(gpu)
    assert in_use(gpu) == set()


def test_what_is_no_file_is_ignored(gpu, proofs):
    (proofs / GPU.file_name).mkdir(parents=True)
    with pytest.raises(store.NoProof, match="no file of a proof's size"):
        store.read(GPU)


def test_a_choice_that_nobody_knows_is_refused_by_the_kernels():
    emulator = sys.modules["conftest"].EMULATOR
    if emulator is None:
        pytest.skip("the emulator is not built")
    with pytest.raises(ValueError, match="no choice of CUDA kernels is called bfloat16 huge: sm80"):
        emulator.take_cuda_choices([("bfloat16 huge", "sm80")])


def test_writers_at_the_same_time_leave_one_whole_proof(proofs):
    def write(i):
        for _ in range(20):
            store.write(replace(proof_of(), date=f"2026-11-{i + 10}"))
            assert store.read(GPU).date.startswith("2026-11-")

    failures = []
    threads = [threading.Thread(target=lambda i=i: _collect(failures, write, i)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and [entry.name for entry in proofs.iterdir()] == [GPU.file_name]


def _collect(failures, fn, *arguments):
    try:
        fn(*arguments)
    except Exception as error:
        failures.append(error)


# ---- on or off -----------------------------------------------------------------------------------------------------


def test_a_proof_turns_its_ops_on(gpu):
    store.write(proof_of())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decide.answer(gpu)
    assert in_use(gpu) == set(OPS) - {"softmax"}
    why = regfast.build_info()["cuda_kernels"]["cuda:0"]
    assert why.startswith("on by the proof of 2026-11-29: linear, log_softmax")
    assert why.endswith("on PyTorch: softmax (wrong)")


def test_a_choice_that_the_build_does_not_know_turns_nothing_on(gpu, monkeypatch):
    store.write(proof_of(choices={"bfloat16 huge": "sm90"}))
    use = _C.use_cuda_kernels

    def refuse(device, ops, choices):  # as csrc/cuda/ops/choices.cpp does, where that is built
        if choices:
            raise ValueError("no choice of CUDA kernels is called bfloat16 huge: sm90")
        use(device, ops, choices)

    monkeypatch.setattr(_C, "use_cuda_kernels", refuse)
    with pytest.warns(
        UserWarning, match="the proof is none of this build .*bfloat16 huge.*run python -m regfast prove"
    ):
        decide.answer(gpu)
    assert in_use(gpu) == set()


def test_without_a_proof_the_command_is_named_once(gpu):
    with pytest.warns(UserWarning, match="there is no proof; python -m regfast prove") as told:
        decide.answer(gpu)
        decide.answer(gpu)
    assert len(told) == 1 and in_use(gpu) == set()
    assert regfast.build_info()["cuda_kernels"]["cuda:0"].startswith("off: there is no proof; python -m regfast prove")


@pytest.mark.parametrize("said", ["0", "1"])
@pytest.mark.parametrize("proven", [False, True])
def test_the_environment_decides_against_it(gpu, monkeypatch, said, proven):
    if proven:
        store.write(proof_of())
    monkeypatch.setenv("REGFAST_CUDA_KERNELS", said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decide.answer(gpu)
    assert in_use(gpu) == (set(OPS) if said == "1" else set())
    decision = decide.decide(decide.Machine(gpu))
    assert decision.why.startswith(f"{'on' if said == '1' else 'off'}: REGFAST_CUDA_KERNELS={said}")
    assert decision.choices == ({"bfloat16 large": "sm90"} if said == "1" and proven else {})


# Each op once, of tensors that are made by what it is given.
CALLS = {
    "linear": lambda t: regfast.linear(t(4, 8), t(6, 8), t(6)),
    "softmax": lambda t: regfast.softmax(t(4, 8), 0),
    "log_softmax": lambda t: regfast.log_softmax(t(4, 8), -1),
    "logsumexp": lambda t: regfast.logsumexp(t(4, 8), 0),
    "cross_entropy": lambda t: regfast.cross_entropy(t(4, 8), t(4, dtype=torch.int64)),
    "linear_cross_entropy": lambda t: regfast.linear_cross_entropy(t(4, 8), t(6, 8), t(4, dtype=torch.int64)),
    "linear_nll": lambda t: regfast.linear_mse_loss(t(4, 8), t(6, 8), t(4, 6), t(6)),
    "phm_linear": lambda t: regfast.phm_linear(t(4, 8), t(2, 2, 2), t(2, 3, 4), t(6)),
    "mse_loss": lambda t: regfast.mse_loss(t(4, 8), t(4, 8)),
}


@pytest.fixture
def first_tensors(gpu):
    """Ops of fake tensors that say that they are on the GPU: by the dispatcher, C++ and Python."""
    if torch.cuda.is_available():
        pytest.skip("where there is a GPU, a fake tensor is on it or on none")
    asked = []
    _C.ask_about_cuda_kernels(lambda device: (asked.append(device), decide.answer(device)))

    def call(*ops):
        with FakeTensorMode(), recorded() as calls:
            for op in ops:
                CALLS[op](partial(torch.empty, device=f"cuda:{gpu}"))
        return asked, [(call.op, call.why) for call in calls if call.path == "composite"]

    yield call
    _C.ask_about_cuda_kernels(decide.answer)


def test_the_first_tensor_of_a_device_asks(gpu, first_tensors):
    store.write(proof_of())
    asked, composites = first_tensors("log_softmax", "softmax", "logsumexp")
    assert asked == [gpu] and composites == [("softmax", f"no kernels in use on cuda:{gpu}")]


def test_every_op_asks_by_its_own_name(gpu, first_tensors):
    """A name that C++ does not know would be an error of that op's first CUDA tensor."""
    assert list(CALLS) == list(_C.CUDA_OPS)
    with pytest.warns(UserWarning, match="there is no proof"):
        _, composites = first_tensors(*CALLS)
    assert [op for op, _ in composites] == list(CALLS)
    for op in CALLS:
        _C.use_cuda_kernels(gpu, [op], [])
        _, composites = first_tensors(*CALLS)
        assert [name for name, _ in composites] == [name for name in CALLS if name != op]


def test_a_warning_that_is_an_error_is_one_of_the_call(gpu, first_tensors):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="there is no proof"):
            first_tensors("softmax")
        asked, composites = first_tensors("softmax")
    assert asked == [gpu] and len(composites) == 1


def test_a_device_that_cannot_be_asked_has_no_kernels(gpu, monkeypatch):
    def fail(self):
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr(decide.Machine, "identity", fail)
    decide.answer(gpu)
    assert in_use(gpu) == set()
    assert "CUDA driver initialization failed" in regfast.build_info()["cuda_kernels"]["cuda:0"]


def test_devices_beyond_those_counted_have_none():
    assert not _C.cuda_kernels_in_use("softmax", 64) and not _C.cuda_kernels_in_use("softmax", -1)
    with pytest.raises(ValueError, match="from 0 to 63, got 64"):
        _C.use_cuda_kernels(64, [], [])
    with pytest.raises(ValueError, match="no op with CUDA kernels is called soft"):
        _C.use_cuda_kernels(63, ["soft"], [])


# ---- the machine and the command -----------------------------------------------------------------------------------


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
    assert len(told.splitlines()) == 1 and "the proof cannot be written to" in told and "REGFAST_PROOFS" in told


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
    assert "could not be written: [Errno 28] No space left on device" in capsys.readouterr().err


def test_the_ledger_is_made_of_the_predictions():
    path = machine.Path(__file__).parent.parent / "KERNELS.md"
    if not path.exists():
        pytest.skip("there is no KERNELS.md beside these tests")
    within = path.read_text().split(roofline.BEGIN)[1].split(roofline.END)[0]
    assert within.strip() == roofline.table()
    assert roofline.predicted("cross_entropy fwd", 89) == roofline.predicted("cross_entropy fwd", 80)
    assert roofline.predicted("gemm_sm90 bf16", 80) is None and roofline.predicted("gemm_sm80 fp64", 90) is None
