"""The package as it is shipped: sdist, the wheel, used from elsewhere, and the check of torch's version at import."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import regfast

ROOT = Path(__file__).resolve().parent.parent
BUILT_FOR = regfast.build_info()["torch"]


def run(*command, cwd=None, **environment) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="which files are the project's is known where git tracks them")
def test_sdist_holds_every_file_of_the_project_and_nothing_else(tmp_path):
    listed = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
    files = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    # What only a checkout needs is hidden: settings of git, of editors and of continuous integration.
    files = {name for name in files if not name.startswith(".") and (ROOT / name).exists()}
    built = {"regfast/_C.cpython-311-x86_64-linux-gnu.so", "csrc/cpu/gemm.o", "tests/__pycache__/util.cpython-311.pyc"}
    built |= {f"{folder}/build/native/gemm.o" for folder in ("tests/kernels", "tests/cuda_on_host")}
    built |= {"examples/figures/next_token.png", "build/torch/kernels/gemm.o", "tests/kernels/build/simde/gemm.d"}
    copy = tmp_path / "copy"
    for name in files | built:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if name in files:
            shutil.copy(ROOT / name, copy / name)
        else:
            (copy / name).touch()

    made = run("-c", "from setuptools import build_meta; print(build_meta.build_sdist('made'))", cwd=copy)
    assert made.returncode == 0, made.stdout + made.stderr
    (archive,) = (copy / "made").iterdir()
    with tarfile.open(archive) as tar:
        packed = {member.name.split("/", 1)[1] for member in tar.getmembers() if member.isfile()}
    generated = {name for name in packed if name.startswith("regfast.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert sorted(packed - generated) == sorted(files)


@pytest.mark.slow  # the extension is linked again; compiled it is only where build/ has no objects of this torch
def test_wheel_works_from_another_directory(tmp_path):
    # The build finds ninja by name, which an environment that is not activated does not have on its PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path / "wheel")
    built = run("-m", "pip", "wheel", *options, ROOT, PATH=path)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "wheel").glob("regfast-*.whl")

    names = zipfile.ZipFile(wheel).namelist()
    assert {"regfast/py.typed", "regfast/_C.pyi", "regfast/cli/info.py"} <= set(names)
    assert any(name.startswith("regfast/_C.") for name in names)
    assert any(name.endswith("/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"regfast"}  # no tests, no sources beside it

    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    installed = run("-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    code = f"""
import pathlib, torch, regfast
assert pathlib.Path(regfast.__file__).is_relative_to({str(site)!r}), regfast.__file__
x, w = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3)
target = torch.tensor([0, 3, 1, 2, 0])
loss = regfast.cross_entropy(regfast.linear(x, w), target)
loss.backward()
expected = torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w), target)
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(x.grad, torch.autograd.grad(expected, x)[0])
"""
    used = run("-c", code, cwd=elsewhere, PYTHONPATH=str(site))
    assert used.returncode == 0, used.stderr


def import_under(torch_version: str) -> subprocess.CompletedProcess:
    return run("-c", f"import torch; torch.__version__ = {torch_version!r}; import regfast")


def test_another_torch_is_refused_in_one_sentence():
    done = import_under("2.12.7")
    assert done.returncode != 0
    message = done.stderr.rstrip().splitlines()[-1]
    assert message.startswith("ImportError: ")
    assert "2.12.7" in message and BUILT_FOR.split("+")[0] in message


def test_another_build_of_the_same_torch_is_accepted():
    done = import_under(BUILT_FOR.split("+")[0] + "+local")
    assert done.returncode == 0, done.stderr
