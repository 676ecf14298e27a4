"""`make gpu` without a GPU: parts that fail, hang or cannot start, the results file, the exit status."""

import importlib.util
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from util import ROOT

PATH = ROOT / "bench" / "gpu.py"
if not PATH.exists():
    pytest.skip("there are no benchmarks beside these tests", allow_module_level=True)

CASE = {
    "name": "softmax 2 x 8 bf16 fwd",
    "gemm": "",
    "median_s": {"regfast": 2e-6, "eager": 3e-6},
    "ratio": {"eager": 1.5},
    "share": 0.876543,
    "bound": "copy_gb_s",
    "peak_mib": {"regfast": 12345.6},
}


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_gpu", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_gpu", module)  # dataclasses look there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BUILD", tmp_path / "build")
    module.BUILD.mkdir()
    return module


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def read(path):
    return json.loads(path.read_text())


def test_parts_do_not_stop_each_other(gpu, tmp_path):
    run = gpu.Run({"gpu": "none"}, tmp_path / "new" / "none.json", {"GREETING": "hello"})
    run.part("good", python("import os; print(os.environ['GREETING'], os.environ['OTHER'])"), 30, OTHER="you")
    assert [part["detail"] for part in read(run.path)["parts"]] == ["hello you"]
    run.part("bad", python("raise ValueError('no such kernel')"), 30)
    run.part("hangs", python("print('begun', flush=True); import time; time.sleep(60)"), 1)
    run.part("absent", ["no-such-program-anywhere"], 30)
    run.part("late", python("print('never')"), 30, gpu.SECONDS)
    assert [part.ok for part in run.parts] == [True, False, False, False, False]
    # compute-sanitizer, where it may not look at the device, and where it has found fault with a case.
    run.part("refused", python("raise SystemExit('Device not supported')"), 30, 0, '"begin"')
    run.part("at fault", python("print('{\"begin\": 0}', flush=True); raise SystemExit('a hazard')"), 30, 0, '"begin"')
    assert [(part.ok, part.detail) for part in run.parts[5:]] == [
        (True, "left out, it cannot run here: Device not supported"),
        (False, "a hazard"),
    ]
    details = [part.detail for part in run.parts]
    assert details[:3] == ["hello you", "ValueError: no such kernel", "stopped after 1 s"]
    assert "no-such-program" in details[3] and details[4] == "not run: the time is over"
    parts = read(run.path)["parts"]
    assert [part["detail"] for part in parts] == details
    assert "log" not in parts[0] and "Traceback" in parts[1]["log"] and parts[2]["log"] == "begun"
    assert read(run.path)["passed"] is False


@pytest.mark.parametrize("failing", [None, "build", "prove"])
def test_whole_run(gpu, tmp_path, monkeypatch, capsys, failing):
    """With a pretended GPU and parts that are not run, but whose results stand in their files."""
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=80 << 30,
        L2_cache_size=50 << 20,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    seen = []

    def part(self, name, command, limit, keep=0, begun="", **environment):
        seen.append((name, environment, self.environment))
        self.add(gpu.Part(name, name != failing, 1.0, "done"))
        if name == "prove":
            (gpu.BUILD / "proofs").mkdir()
            (gpu.BUILD / "proofs" / "nvidia-h100-80gb.json").write_text('{"ops": {"softmax": ""}}')
        if name == "benchmarks: rows":
            lines = [json.dumps({"ceilings": {"copy_gb_s": 3000.0}}), json.dumps(CASE), '{"name": "cut']
            (gpu.BUILD / "rows_aten.jsonl").write_text("\n".join(lines))

    monkeypatch.setattr(gpu.Run, "part", part)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "results")])
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/somewhere/{name}")
    assert gpu.main() == (0 if failing is None else 1)
    result = read(tmp_path / "results" / "nvidia-h100-80gb.json")
    assert result["passed"] is (failing is None) and result["machine"]["architecture"] == 90
    assert all(e["REGFAST_CUDA_KERNELS"] == "1" and e["REGFAST_CUDA_ARCHS"] == "90a" for *_, e in seen)
    kernels = {name: environment.get("REGFAST_CUDA_GEMM") for name, environment, _ in seen}
    if failing == "build":
        assert list(kernels) == ["build"]
        return
    assert result["ceilings"] == {"copy_gb_s": 3000.0}
    assert [case["share"] for case in result["cases"]] == [0.8765]
    assert {part["name"] for part in result["parts"]} == set(kernels)
    assert kernels["prove"] is kernels["racecheck"] is None and list(kernels)[1] == "prove"
    assert kernels["op tests"] == kernels["benchmarks: linear, gemm sm80"] == "sm80"
    assert result["proof"] == {"ops": {"softmax": ""}}
    printed = capsys.readouterr().out
    assert "88% of copy" in printed and "12346" in printed


def test_without_a_gpu(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "finds no NVIDIA GPU" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--nonsense"])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 2
