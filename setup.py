"""Builds the one extension, regfast._C, against the torch of the environment (no build isolation).

REGFAST_CUDA=auto: with the CUDA kernels where this torch has CUDA and there is an nvcc of its release; 0: without;
1: with them, or an error. REGFAST_CUDA_ARCHS="80 90a": for these architectures only. csrc/cuda/kernels.py compiles the
kernels: they are free of torch, and what ptxas says of them is kept.

REGFAST_SANITIZE=address,undefined: C++ under these sanitizers of the compiler, whose library the process that imports
the extension has to load first; `make asan` does.
"""

import contextlib
import glob
import importlib.util
import os
import re
import subprocess
import sys
import threading

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # it would fail on pyproject.toml's license, in many lines
    raise SystemExit(f"regfast: expected setuptools 77 or newer to build with, got {setuptools.__version__}")
try:
    import torch
except ModuleNotFoundError:
    raise SystemExit(
        "regfast: expected the torch that is to import regfast in the environment that builds it, got none: install "
        "torch, then build with pip install --no-build-isolation"
    ) from None
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

LEAST_TORCH = "2.11"
REQUIRES = ["platformdirs", "rich"]  # besides torch

# No -m flags: each ISA file opens its own target region, so that one binary runs everywhere.
CXX_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0", "-Wall", "-std=c++20"]
# Of warnings about torch's headers, a pragma says which are none; precompiled headers lose it.
CXX_FLAGS += [flag for path in include_paths() for flag in ("-isystem", path)]
SANITIZE = os.environ.get("REGFAST_SANITIZE", "")
if SANITIZE and (strange := set(SANITIZE.split(",")) - {"address", "leak", "thread", "undefined"}):
    raise SystemExit(
        "regfast: REGFAST_SANITIZE: expected some of address, leak, thread and undefined, with commas between them, "
        f"got {', '.join(sorted(strange))}"
    )
# Type information of torch's classes, which vptr asks for, is hidden. With every report the process ends.
SANITIZE_FLAGS = [f"-fsanitize={SANITIZE}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"] if SANITIZE else []
if SANITIZE:
    CXX_FLAGS += [*SANITIZE_FLAGS, "-O1", "-g1", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]
JOBS = os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
if not JOBS.isdecimal() or JOBS == "0":
    raise SystemExit(f"regfast: MAX_JOBS: expected how many files to compile at a time, got {JOBS}")


def cuda_toolkit():
    """The module that compiles the kernels and the toolkit to do it with, or None where there is to be no CUDA."""
    wanted = os.environ.get("REGFAST_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"regfast: REGFAST_CUDA: expected auto, 0 or 1, got {wanted}")
    if wanted == "0" or not os.path.exists("csrc/cuda"):
        return None
    spec = importlib.util.spec_from_file_location("kernels", "csrc/cuda/kernels.py")
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    try:
        return kernels, kernels.Toolkit(torch.version.cuda)
    except kernels.NoToolkit as reason:
        if wanted == "1":
            raise SystemExit(f"regfast: REGFAST_CUDA=1, but {reason}") from None
        print(f"regfast: built without CUDA kernels: {reason}")
        return None


CUDA = cuda_toolkit()


@contextlib.contextmanager
def progress():
    """Of ninja's output the lines that are a compiler's whole command as a count, seconds and the file."""
    os.environ.setdefault("NINJA_STATUS", "[%f/%t, %e s] ")
    sys.stdout.flush()
    output, (read, write) = os.dup(1), os.pipe()
    os.dup2(write, 1)
    os.close(write)

    def shorten():
        with open(read, errors="replace") as lines, open(output, "w") as shown:
            for line in lines:
                command = re.match(r"(\[\d+/\d+.*?\] ).* -c (?:\S*/csrc/)?(\S+\.cpp) -o ", line)
                shown.write("".join(command.groups()) + "\n" if command else line)
                shown.flush()

    reader = threading.Thread(target=shorten)
    reader.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(output, 1)  # the pipe's last writer, so that its reader ends
        reader.join()


class Build(BuildExtension):
    """Keeps objects between builds, each torch and kind of build apart; setuptools would use a temporary folder."""

    def finalize_options(self):
        super().finalize_options()
        self.force = True  # to link: what lies in the library's place may be of another torch
        kind = ("-cuda" if CUDA else "") + (f"-{SANITIZE}" if SANITIZE else "")
        self.build_temp = f"build/torch-{torch.__version__}{kind}"

    def build_extensions(self):
        if CUDA:
            kernels, toolkit = CUDA
            self.extensions[0].extra_objects = kernels.build(toolkit, self.build_temp, int(JOBS))
        self.precompile()
        with progress():
            super().build_extensions()

    def precompile(self):
        """torch's headers, which take g++ longer to read than our files to compile: it finds torch_api.h here first.

        Another compiler, or a g++ that would not take what it wrote, reads the header itself, as if this were not here.
        """
        compiler = os.environ.get("CXX", "c++").split()
        if "Free Software Foundation" not in subprocess.check_output([*compiler, "--version"], text=True):
            return
        folder = os.path.abspath(f"{self.build_temp}/precompiled")
        self.extensions[0].include_dirs.insert(0, folder)
        header, compiled = f"{folder}/shared/torch_api.h", f"{folder}/shared/torch_api.h.gch"
        os.makedirs(os.path.dirname(header), exist_ok=True)
        if os.path.lexists(header):
            os.remove(header)
        os.symlink(os.path.abspath("csrc/shared/torch_api.h"), header)
        newest = max(map(os.path.getmtime, ["setup.py", *glob.glob("csrc/shared/*.h"), torch.version.__file__]))
        if os.path.exists(compiled) and os.path.getmtime(compiled) > newest:
            return
        flags = [*self.compiler.compiler_so[1:], *CXX_FLAGS]
        flags += [f"-I{path}" for path in (*self.extensions[0].include_dirs, *self.compiler.include_dirs)]
        command = [*compiler, *flags, "-x", "c++-header", header, "-o", f"{compiled}.part"]
        print("regfast: torch's headers are compiled first, about half a minute", flush=True)
        done = subprocess.run(command, capture_output=True, text=True)  # that it is a header is worth a warning to g++
        if done.returncode != 0:
            raise SystemExit(f"{done.stderr}\nregfast: torch's headers are not compiled")
        os.replace(f"{compiled}.part", compiled)


def metadata() -> dict:
    """Version and requirements. What is compiled fits the torch of this environment alone, and says so in both; the
    source distribution fits any."""
    with open("regfast/__init__.py") as file:
        version = re.search(r'^__version__ = "(.*)"', file.read(), re.MULTILINE)[1]
    if not {"bdist_wheel", "dist_info", "editable_wheel"} & set(sys.argv):
        return {"version": version, "install_requires": [f"torch>={LEAST_TORCH}", *REQUIRES]}
    number = torch.__version__.split("+")[0]
    device = f"cu{torch.version.cuda.replace('.', '')}" if CUDA else "cpu"
    return {"version": f"{version}+torch{number}.{device}", "install_requires": [f"torch=={number}", *REQUIRES]}


ROOMS = ["", "shared", "autograd", "cpu", "cpu/ops", "cpu/drivers", "cpu/isa"] + (["cuda/ops"] if CUDA else [])
cuda_options = {}
if CUDA:
    toolkit = CUDA[1]
    cuda_options = {
        "library_dirs": toolkit.libraries,
        "libraries": ["cudart", "c10_cuda"],
    }

setup(
    **metadata(),
    ext_modules=[
        CppExtension(
            "regfast._C",
            sorted(os.path.relpath(path) for room in ROOMS for path in glob.glob(f"csrc/{room}/*.cpp")),
            include_dirs=[os.path.abspath("csrc")] + ([CUDA[1].include] if CUDA else []),
            extra_compile_args={"cxx": CXX_FLAGS},
            extra_link_args=SANITIZE_FLAGS,
            **cuda_options,
        )
    ],
    cmdclass={"build_ext": Build},
)
