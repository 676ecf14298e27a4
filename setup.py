"""Builds the one extension, regfast._C, against the torch of the environment (no build isolation)."""

import glob
import os

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# No -m flags: each ISA file opens its own target region, so that one binary runs everywhere.
CXX_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0", "-Wall"]

os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))


class Build(BuildExtension):
    """Keeps objects between builds, apart for each torch, where setuptools would use a temporary folder."""

    def finalize_options(self):
        super().finalize_options()
        self.build_temp = f"build/torch-{torch.__version__}"


setup(
    ext_modules=[
        CppExtension(
            "regfast._C",
            sorted(
                os.path.relpath(path)
                for folder in ("csrc", "csrc/autograd", "csrc/cpu")
                for path in glob.glob(f"{folder}/*.cpp")
            ),
            extra_compile_args={"cxx": CXX_FLAGS},
        )
    ],
    cmdclass={"build_ext": Build},
)
