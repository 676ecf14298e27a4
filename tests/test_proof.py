"""Which CUDA kernels are in use: the proof's file, what turns them on and off, and what a user is told."""
# ruff: noqa: F811  # fixtures are taken from proof_examples.py by their names

import json
import os
import sys
import threading
import warnings
from dataclasses import replace

import pytest
from proof_examples import CALLS, GPU, OPS, first_tensors, gpu, in_use, proof_of, proofs  # noqa: F401

import regfast
from regfast import _C
from regfast.proof import decide, store

pytestmark = pytest.mark.no_kernels("no GPU is there")


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
    """Where it turns all kernels on, products stay those that were fastest, and no rows are PyTorch's."""
    if proven:
        store.write(proof_of(choices={"bfloat16 large": "sm90", "softmax long": "aten"}))
    monkeypatch.setenv("REGFAST_CUDA_KERNELS", said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decide.answer(gpu)
    assert in_use(gpu) == (set(OPS) if said == "1" else set())
    decision = decide.decide(decide.Machine(gpu))
    assert decision.why.startswith(f"{'on' if said == '1' else 'off'}: REGFAST_CUDA_KERNELS={said}")
    assert decision.choices == ({"bfloat16 large": "sm90"} if said == "1" and proven else {})


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
