"""The package as it is shipped: sdist, the wheel, used from elsewhere, and the check of torch's version at import."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import regfast

ROOT = Path(__file__).resolve().parent.parent
BUILT_FOR = regfast.build_info()["torch"]
from_source = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="there are no sources beside these tests")


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


NUMBER = BUILT_FOR.split("+")[0]
TOOLS = ROOT / "packaging" / "wheels.py"


@pytest.fixture(scope="module")
def wheels():
    if not TOOLS.exists():
        pytest.skip(from_source.kwargs["reason"])
    spec = importlib.util.spec_from_file_location("wheels", TOOLS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Linked again; compiled it is only where build/ has no objects of this torch. torch itself is this environment's: the
# new one sees it, and what pip says of its requirements is about the wheel.
@pytest.mark.slow
def test_wheel_is_built_audited_and_used_in_a_new_environment(tmp_path, wheels):
    wheel = wheels.build(Path(sys.executable).parent, tmp_path, cuda=False)
    version = regfast.__version__
    assert wheel.name.startswith(f"regfast-{version}+torch{NUMBER}.cpu-cp")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"regfast/py.typed", "regfast/_C.pyi", "regfast/cli/info.py"} <= set(names)
    assert any(name.startswith("regfast/_C.") and name.endswith(".so") for name in names)
    assert any(name.endswith("/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"regfast"}  # no tests, no sources beside it
    fields = wheels.metadata(wheel)
    assert fields["Version"] == f"{version}+torch{NUMBER}.cpu"
    assert f"torch=={NUMBER}" in fields.get_all("Requires-Dist")
    assert fields["License-Expression"] == "BSD-3-Clause"
    if importlib.util.find_spec("auditwheel"):
        wheel = wheels.audited(Path(sys.executable), wheel)
        assert "manylinux" in wheel.name
        assert not any(".libs/" in name for name in zipfile.ZipFile(wheel).namelist())  # torch's are torch's

    new = wheels.environment(tmp_path / "new")
    wheels.run(new / "python", "-m", "pip", "uninstall", "--yes", "setuptools")  # older than torch asks for
    (site,) = (tmp_path / "new" / "lib").glob("python*/site-packages")
    (site / "torch_of_this_environment.pth").write_text(str(Path(torch.__file__).parent.parent))
    wheels.run(new / "python", "-m", "pip", "install", "--no-index", wheel, cwd=tmp_path, PYTHONPATH="")
    used = wheels.run(new / "python", "-c", wheels.TRIAL, cwd=tmp_path, PYTHONPATH="")
    assert used.startswith(str(site)), used


def test_every_wheel_of_a_release_is_in_the_list(wheels):
    done = run(TOOLS, "--list")
    listed = {tuple(one.values()) for one in json.loads(done.stdout)["include"]}
    assert len(listed) == 24 and (NUMBER, "3.11", "cpu") in listed
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    least = next(need.partition(">=")[2] for need in needs if need.startswith("torch"))
    assert {torch.rpartition(".")[0] for torch, *_ in listed} >= {least}


def failing_build(tmp_path, shadow: str, content: str) -> str:
    """The last line of a build in whose environment a package is replaced."""
    (tmp_path / f"{shadow}.py").write_text(content)
    done = run("setup.py", "--version", cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    return done.stderr.rstrip().splitlines()[-1]


@from_source
def test_a_build_without_torch_says_so_in_one_sentence(tmp_path):
    line = failing_build(tmp_path, "torch", "raise ModuleNotFoundError('No module named torch')")
    assert line.startswith("regfast: expected the torch that is to import regfast") and "--no-build-isolation" in line


@from_source
def test_a_build_by_an_old_setuptools_says_so_in_one_sentence(tmp_path):
    line = failing_build(tmp_path, "setuptools", "__version__ = '68.1.2'")
    assert line == "regfast: expected setuptools 77 or newer to build with, got 68.1.2"


@from_source
@pytest.mark.parametrize(
    "name, value", [("REGFAST_CUDA", "yes"), ("REGFAST_SANITIZE", "adress,undefined"), ("MAX_JOBS", "all")]
)
def test_a_variable_of_the_build_with_a_wrong_value_is_one_sentence(name, value):
    done = run("setup.py", "--version", cwd=ROOT, **{name: value})
    line = done.stderr.rstrip().splitlines()[-1]  # torch may have a warning before
    assert done.returncode and re.fullmatch(rf"regfast: {name}: expected .*, got {value.split(',')[0]}", line), (
        done.stderr
    )


SAID_BY_NINJA = """
import subprocess, sys
sys.argv = ["setup.py", "--version"]
exec(open("setup.py").read())
with progress():
    for line in ("[1/2, 0.5 s] c++ -O3 -c -c /a/csrc/cpu/x.cpp -o /a/x.o", "x.cpp:1: warning", "FAILED: /a/y.o"):
        subprocess.run(["echo", line])
print("after")
"""


@from_source
def test_a_build_counts_its_files_and_hides_no_other_line():
    done = run("-c", SAID_BY_NINJA, cwd=ROOT, REGFAST_CUDA="0")
    lines = done.stdout.splitlines()[1:]
    assert lines == ["[1/2, 0.5 s] cpu/x.cpp", "x.cpp:1: warning", "FAILED: /a/y.o", "after"], done.stderr


@from_source
def test_sources_that_are_not_built_are_refused_in_one_sentence(tmp_path):
    shutil.copytree(ROOT / "regfast", tmp_path / "regfast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "setup.py").touch()
    # An editable installation's finder would find the extension of the tree that it is of.
    without = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]; import regfast"
    done = run("-c", without, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    line = done.stderr.rstrip().splitlines()[-1]
    assert line.startswith(f"ImportError: regfast: expected an installed package, got its sources in {tmp_path}")


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
