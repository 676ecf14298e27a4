"""How the CUDA kernels are built: the architectures, what is read from ptxas, and that spills end a build."""

import importlib.util
import os
import stat

import pytest
from util import ROOT

PATH = ROOT / "csrc" / "cuda" / "kernels.py"
if not PATH.exists():
    pytest.skip("there are no sources beside these tests", allow_module_level=True)
spec = importlib.util.spec_from_file_location("kernels", PATH)
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)

SYMBOL = "_ZN2rf4cuda45_GLOBAL__N__d0bf689d_12_gemm_sm80_cu_11ad72ba9gemm_sm80I6__halfEEvNS0_8GemmTaskE"


def log_of(arch: str, registers: int, stores: int, loads: int, shared: str = "") -> str:
    return (
        "nvcc -c gemm_sm80.cu\n"
        "ptxas info    : 0 bytes gmem\n"
        f"ptxas info    : Compiling entry function '{SYMBOL}' for 'sm_{arch}'\n"
        f"ptxas info    : Function properties for {SYMBOL}\n"
        f"    {stores} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers, {shared}528 bytes cmem[0]\n"
        "ptxas info    : Compile time = 12.000 ms\n"
    )


def rows_of(tmp_path, *logs: str) -> list[dict]:
    path = tmp_path / "gemm_sm80.ptxas"
    path.write_text("".join(logs))
    return kernels.resources([path])


def test_what_ptxas_says_is_read(tmp_path):
    rows = rows_of(tmp_path, log_of("80", 96, 0, 0), log_of("90a", 128, 0, 0, "4096 bytes smem, "))
    assert [(r["kernel"], r["arch"], r["registers"], r["shared"], r["spills"]) for r in rows] == [
        ("gemm_sm80", "80", 96, 0, 0),
        ("gemm_sm80", "90a", 128, 4096, 0),
    ]
    kernels.check_spills(rows)
    assert "| `gemm_sm80.cu` | `gemm_sm80` | 1 | 0 to 4096 | 96 | 128 |" in kernels.table(rows)


def test_a_spill_ends_the_build_unless_it_is_listed(tmp_path, monkeypatch):
    rows = rows_of(tmp_path, log_of("80", 96, 0, 0), log_of("86", 255, 8, 12))
    with pytest.raises(SystemExit, match=r"gemm_sm80.*sm_86.*20 bytes"):
        kernels.check_spills(rows)
    monkeypatch.setitem(kernels.SPILLS, "gemm_sm80", 20)
    kernels.check_spills(rows)
    monkeypatch.setitem(kernels.SPILLS, "gemm_sm80", 19)
    with pytest.raises(SystemExit):
        kernels.check_spills(rows)


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A stand-in for nvcc that claims to be of a given release."""

    def make(release: str) -> None:
        path = tmp_path / "bin" / "nvcc"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f'#!/bin/sh\ncase $1 in --version) echo "release {release}, V{release}.1";; '
            f'*) echo "#$ TOP={tmp_path}";; esac\n'
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))

    return make


@pytest.mark.parametrize(
    "release, asked, code, ptx",
    [
        ("13.0", "", "80 86 89 90a 100a 120", "90"),
        ("12.8", "", "80 86 89 90a 100a 120", "90"),
        ("12.4", "", "80 86 89 90a", "90"),
        ("13.0", "80 90a", "80 90a", "90"),
        ("13.0", "80,86", "80 86", "80"),  # without sm_90a no PTX of 9.0: a Hopper would run it
    ],
)
def test_architectures(nvcc, monkeypatch, release, asked, code, ptx):
    nvcc(release)
    monkeypatch.setenv("REGFAST_CUDA_ARCHS", asked)
    flags = kernels.Toolkit(release).code_flags()
    expected = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in code.split()]
    assert flags == [*expected, f"-gencode=arch=compute_{ptx},code=compute_{ptx}"]


def test_toolkits_that_do_not_fit_are_refused_in_words(nvcc, monkeypatch):
    nvcc("13.0")
    for torch_cuda, words in (("12.8", "13.0 and torch of CUDA 12.8"), (None, "without CUDA")):
        with pytest.raises(kernels.NoToolkit, match=words):
            kernels.Toolkit(torch_cuda)
    monkeypatch.setenv("REGFAST_CUDA_ARCHS", "75")
    with pytest.raises(SystemExit, match=r"REGFAST_CUDA_ARCHS.*expected.*80.*got 75"):
        kernels.Toolkit("13.0").architectures()
    monkeypatch.setenv("CUDA_HOME", os.devnull)
    with pytest.raises(kernels.NoToolkit, match="no nvcc"):
        kernels.Toolkit("13.0")


def test_only_what_changed_is_compiled(nvcc, tmp_path, monkeypatch):
    nvcc("13.0")
    script = tmp_path / "bin" / "nvcc"
    script.write_text(
        script.read_text()
        + f'for last; do :; done\necho "$last" >> {tmp_path}/compiled\ncase $1 in -std*) touch "$last";; esac\n'
    )
    toolkit = kernels.Toolkit("13.0")
    compiled = tmp_path / "compiled"

    def build() -> int:
        compiled.write_text("")
        objects = kernels.build(toolkit, str(tmp_path / "out"), 2)
        assert objects == sorted(objects) and all(os.path.exists(path) for path in objects)
        return len(compiled.read_text().splitlines())

    sources = len(list(PATH.parent.glob("*.cu")))
    assert build() == sources
    assert build() == 0
    monkeypatch.setenv("REGFAST_CUDA_ARCHS", "80")
    assert build() == sources  # other flags
    (tmp_path / "out" / "kernels" / "gemm.o").unlink()
    assert build() == 1
