# Everything from a machine with Python (3.11 to 3.13, with its headers), a C++ compiler and make. Each target first
# makes .venv and builds the extension into it if need be; another PyTorch: make test TORCH=torch==2.14.1

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

BIN := $(abspath $(VENV))/bin
# The build calls ninja, the linters and pytest by name.
export PATH := $(BIN):$(PATH)

# $(call toml,TABLE KEY...) prints a list of pyproject.toml, where alone the requirements are written.
toml = $$(python -c 'import functools, sys, tomllib; \
	print(*functools.reduce(dict.get, sys.argv[1:], tomllib.load(open("pyproject.toml", "rb"))))' $(1))

.PHONY: help build demo test kernels sanitize bench lint format wheel clean FORCE
.DELETE_ON_ERROR:

help:
	@echo "make demo | test | kernels | sanitize | bench | lint | format | wheel | clean"

build: $(VENV)/built

demo: $(VENV)/built
	python examples/linear_regression.py
	python examples/softmax_regression.py
	@echo "The pictures are in $(CURDIR)/examples/figures:" && ls examples/figures

# The kernels alone first: they need no torch and fail with less around them. pytest's last line closes the output.
test: kernels $(VENV)/built
	pytest

kernels:
	$(MAKE) -C tests/kernels test

sanitize:
	$(MAKE) -C tests/kernels sanitize

bench: $(VENV)/built
	mkdir -p build
	pytest bench --benchmark-only --benchmark-json=build/bench.json
	python bench/report.py build/bench.json

CPP_FILES = $(shell find csrc tests/kernels -name '*.h' -o -name '*.cpp')

lint: $(VENV)/linters
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(CPP_FILES)

format: $(VENV)/linters
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP_FILES)

wheel: $(VENV)/torch
	pip wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:
	$(MAKE) -C tests/kernels clean
	rm -rf build dist *.egg-info regfast/*.so examples/figures

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
	pip install --no-build-isolation --editable '.[test,bench]'
	touch $@

$(VENV)/linters: $(VENV)/made pyproject.toml
	pip install $(call toml,project optional-dependencies lint)
	touch $@
