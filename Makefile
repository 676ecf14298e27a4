# Everything from a machine with Python (3.11 to 3.13, with its headers), a C++ compiler and make. Each target first
# makes .venv and builds the extension into it if need be; another PyTorch: make test TORCH=torch==2.14.1

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
JOBS ?= $(shell nproc)

BIN := $(abspath $(VENV))/bin
# The build calls ninja, the linters and pytest by name.
export PATH := $(BIN):$(PATH)

# $(call toml,TABLE KEY...) prints a list of pyproject.toml, where alone the requirements are written.
toml = $$(python -c 'import functools, sys, tomllib; \
	print(*functools.reduce(dict.get, sys.argv[1:], tomllib.load(open("pyproject.toml", "rb"))))' $(1))

.PHONY: help build demo test kernels kernel cuda_on_host asan tsan fuzz bench report sweep lint types docs docs-serve docs-look format sdist wheel cuda gpu clean FORCE
.DELETE_ON_ERROR:

# What the lines that begin with #: say of the targets below them.
help:
	@sed -n 's/^#: *//p' $(firstword $(MAKEFILE_LIST))

#: make build         .venv with torch, and the extension built into it
build: $(VENV)/built

#: make demo          trains the models of examples/ beside stock PyTorch
demo: $(VENV)/built
	python examples/demo.py

# The kernels alone first: they need no torch and fail with less around them. pytest's last line closes the output.
#: make test          builds, then the tests of the kernels and of the ops
test: kernels cuda_on_host $(VENV)/built
	REGFAST_TEST_CUDA_ON_HOST=1 pytest --numprocesses=$(JOBS) --dist=worksteal

#: make kernels       the C++ tests of the CPU kernels, without torch, on every instruction set and compiler at hand
kernels:
	$(MAKE) -C tests/kernels -j$(JOBS) --output-sync test

# Of a kernel's test, what is compiled and run is what ISA=, ONLY= and DTYPE= leave: seconds after a change.
#: make kernel        one kernel's C++ tests on one instruction set: ISA=avx2 ONLY=gemm DTYPE=f32 QUICK=1
kernel:
	$(MAKE) -C tests/kernels -j$(JOBS) --output-sync kernel

# The CUDA kernels on the CPU: alone, then as a module through which pytest runs the ops' tests on one more device.
#: make cuda_on_host  the CUDA kernels on the CPU, without nvcc or GPU; then the module that pytest needs for them
cuda_on_host: $(VENV)/torch
	$(MAKE) -C tests/cuda_on_host -j$(JOBS) --output-sync test extension PYTHON=$(BIN)/python

# Under the address and undefined-behaviour sanitizers: the kernels alone, then the Python tests in a tree of their own,
# so that theirs is the extension that is found. Python itself is not built with the sanitizer, whose library therefore
# comes first, with that of C++, whose exceptions it watches. Large results are the allocator's, which it watches too, and
# none is kept. TESTS= are pytest's arguments.
#: make asan          kernel tests and Python tests under the address and undefined-behaviour sanitizers
ASAN_TREE := build/asan
TESTS ?= -m "not slow"
asan: $(VENV)/built
	$(MAKE) -C tests/kernels -j$(JOBS) --output-sync asan
	REGFAST_SANITIZE=address,undefined REGFAST_CUDA=0 python setup.py --quiet build --build-lib $(ASAN_TREE)
	rm -rf $(ASAN_TREE)/tests && cp -r tests examples pyproject.toml $(ASAN_TREE) && rm -rf $(ASAN_TREE)/tests/*/build
	cd $(ASAN_TREE) && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0:$(ASAN_OPTIONS) UBSAN_OPTIONS=print_stacktrace=1:$(UBSAN_OPTIONS) PYTHONPATH=$$PWD \
		REGFAST_POOL=0 pytest --numprocesses=$(JOBS) --dist=worksteal $(TESTS)

# Only where the sanitizer sees every thread's steps: not through torch, whose OpenMP it does not know.
#: make tsan          kernel tests, whose threads are their own, under the thread sanitizer
tsan:
	$(MAKE) -C tests/kernels -j$(JOBS) --output-sync tsan

# SEED= gives the same cases again, CASES= so many of them at most, CASE= one of them, OPS= those of some ops. Freed
# memory is overwritten, so that who reads it gets another number.
#: make fuzz          random calls of every op against PyTorch and float64: SECONDS=60 SEED= CASES= CASE= OPS=
SECONDS ?= 60
fuzz: $(VENV)/built
	MALLOC_PERTURB_=165 OMP_WAIT_POLICY=passive python -m tests.fuzz --jobs $(JOBS) --seconds $(SECONDS) \
		$(if $(SEED),--seed $(SEED)) $(if $(CASES),--cases $(CASES)) $(if $(CASE),--case $(CASE)) $(if $(OPS),--ops $(OPS))

#: make bench         benchmarks against PyTorch, then their tables and plots
bench: $(VENV)/built
	mkdir -p build
	pytest bench --benchmark-only --benchmark-json=build/bench.json
	python bench/report.py build/bench.json

#: make report        bench/results as one interactive page that needs nothing else, build/docs/report.html
report: $(VENV)/built
	python bench/page.py

# SECONDS=, SEED=, CASES=, CASE= and OPS= as for fuzz, THREADS= all by default, JSON= a file for all results.
#: make sweep         random calls of every op timed beside PyTorch's, the slowest first: SECONDS=60 SEED= THREADS= JSON=
sweep: $(VENV)/built
	python bench/sweep.py --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(if $(CASES),--cases $(CASES)) \
		$(if $(CASE),--case $(CASE)) $(if $(OPS),--ops $(OPS)) $(if $(THREADS),--threads $(THREADS)) $(if $(JSON),--json $(JSON))

CPP_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

#: make lint          ruff and clang-format, without changing a file
lint: $(VENV)/linters
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(CPP_FILES)

# tests/typed_use.py is a user's file, with what is right and what has to be found wrong.
#: make types         mypy --strict and pyright on the package and on a file that uses all of it
types: $(VENV)/built $(VENV)/checkers
	mypy --strict
	pyright

# Without network, and an error for each warning: a link to nothing, a picture that is missing, a docstring that does not parse.
#: make docs          the documentation's site, in build/docs
docs: report $(VENV)/writers
	sphinx-build --fail-on-warning --keep-going --quiet -c docs . build/docs
	@echo "The site is in $(CURDIR)/build/docs: make docs-serve shows it"

#: make docs-serve    shows it at http://localhost:8000
docs-serve: docs
	python -m http.server --directory build/docs 8000

# The browser is the system's: chromium, or another that calls itself so.
#: make docs-look     looks at the site in a browser, on a phone and on a desk, and leaves build/screenshots
docs-look: docs $(VENV)/looker
	python docs/look.py

#: make format        both, changing files
format: $(VENV)/linters
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP_FILES)

# How each file of the extension was compiled last, for clangd and other tools that read C++.
#: make compile_commands.json   how each C++ file is compiled, for clangd
compile_commands.json: $(VENV)/built
	ninja -C "$$(dirname "$$(ls -t build/torch-*/build.ninja | head -n 1)")" -t compdb compile > $@

#: make sdist         the source distribution, in dist/
sdist: $(VENV)/torch
	rm -f dist/regfast-*.tar.gz
	python -c 'from setuptools import build_meta; print(build_meta.build_sdist("dist"))'

#: make wheel         the wheel, in dist/
wheel: $(VENV)/torch
	pip wheel --no-build-isolation --no-deps --wheel-dir dist .

# The CUDA kernels on any machine with nvcc, for all architectures or those of REGFAST_CUDA_ARCHS="80 90a": the wheel,
# used by all tests of the CPU where no sources lie beside it; what ptxas says of a build for all goes into KERNELS.md.
#: make cuda          a wheel with the CUDA kernels, on any machine with nvcc, tested without a GPU
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV ?= .venv-cuda
CUDA_BIN := $(abspath $(CUDA_VENV))/bin
cuda:
	rm -f dist/regfast-*.whl
	REGFAST_CUDA=1 $(MAKE) wheel VENV=$(CUDA_VENV) TORCH='$(CUDA_TORCH)'
	$(CUDA_BIN)/pip install --force-reinstall --no-deps dist/regfast-*.whl
	$(CUDA_BIN)/pip install "$$(echo dist/regfast-*.whl)[test]"
	test -n "$(REGFAST_CUDA_ARCHS)" || python3 csrc/cuda/kernels.py build/torch-*-cuda/kernels/*.ptxas --into KERNELS.md
	rm -rf build/cuda && mkdir -p build/cuda && cp -r tests examples pyproject.toml build/cuda
	rm -rf build/cuda/tests/*/build
	cd build/cuda && $(CUDA_BIN)/python -P -c 'import regfast; info = regfast.build_info(); print(info); assert info["cuda"]'
	cd build/cuda && $(CUDA_BIN)/pytest -q -m "not slow" --numprocesses=$(JOBS) --dist=worksteal

# On a machine with an NVIDIA GPU, by the python3 that has torch, without network: builds, proves and measures.
#: make gpu           builds, proves and measures the CUDA kernels on an NVIDIA GPU
gpu: export PATH := $(subst $(BIN):,,$(PATH))
gpu:
	$(PYTHON) bench/gpu.py

#: make clean         removes all that was built but the environments
clean:
	$(MAKE) -C tests/kernels clean
	$(MAKE) -C tests/cuda_on_host clean
	rm -rf build dist *.egg-info regfast/*.so examples/figures compile_commands.json

# The files below are stamps: what they stand for is done if they are newer than what they depend on.

$(VENV)/made:
	$(PYTHON) -m venv $(VENV)
	touch $@

# Holds the requirement that it was made for, so that another TORCH installs that one and builds again.
$(VENV)/torch: $(VENV)/made FORCE
	@echo '$(TORCH)' | cmp -s - $@ || { set -ex; \
		pip install $(TORCH) $(call toml,build-system requires); \
		echo '$(TORCH)' > $@; }

$(VENV)/built: $(VENV)/torch setup.py pyproject.toml $(shell find csrc -type f)
	python setup.py --quiet build_ext --inplace
	pip install --no-build-isolation --editable '.[test,bench]'
	touch $@

$(VENV)/checkers: $(VENV)/made pyproject.toml
	pip install $(call toml,project optional-dependencies types)
	touch $@

$(VENV)/looker: $(VENV)/made pyproject.toml
	pip install $(call toml,project optional-dependencies look)
	touch $@

$(VENV)/writers: $(VENV)/made pyproject.toml
	pip install $(call toml,project optional-dependencies docs)
	touch $@

$(VENV)/linters: $(VENV)/made pyproject.toml
	pip install $(call toml,project optional-dependencies lint)
	touch $@
