# Everything a developer runs. Needs Python >= 3.11 and a C++17 compiler; the rest is set up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= outputs/digits
DIST ?= dist
# Workers of the tests; those that share what takes minutes to compile stay together.
PARALLEL ?= -n 2 --dist loadgroup --benchmark-disable
# What `wheel-check` runs.
WHEEL_TESTS ?= readme block functional gradients conv conv_block adjoint checkpointing scan norm depth activations
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
CXX_SOURCES := $(shell find csrc tests benchmarks -name '*.h' -o -name '*.c' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# The build finds the pinned cmake and ninja of the environment first.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test test-long sanitize coverage check lint format bench bench-quick gpu-check accuracy wheel wheel-check package-check docs docs-serve clean

demo: $(VENV)/.built  ## the main job: train on real digits, smooth against i.i.d. initialisation
	$(BIN)/python -m odeblock train --output $(OUTPUT)

test: check $(VENV)/.built  ## lint, types and tests, with the lines that they reach; minutes
	$(BIN)/pytest $(PARALLEL) --cov

test-long: $(VENV)/.built  ## what is too long for every push
	HYPOTHESIS_PROFILE=nightly $(BIN)/pytest $(PARALLEL) -m "long or not long"

sanitize: $(VENV)/.built  ## the CPU core and the emulated GPU kernels under address, undefined and thread sanitizers
	$(BIN)/pytest $(PARALLEL) -m sanitizers

coverage: $(VENV)/.built  ## which lines all tests reach, however long, to outputs/coverage
	$(BIN)/pytest $(PARALLEL) -m "long or not long" --cov --cov-report=html:outputs/coverage

check: lint $(VENV)/.built  ## lint and types, seconds
	$(BIN)/mypy
	$(BIN)/stubtest odeblock._core --ignore-missing-stub --mypy-config-file tests/stubtest.ini

lint: $(VENV)/.dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(VENV)/.dependencies
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(VENV)/.built  ## speed and memory against what a user would pick instead; an hour, on a quiet machine
	mkdir -p outputs
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-json=outputs/bench.json $(BENCH)
	$(BIN)/python benchmarks/report.py outputs/bench.json --output outputs/bench

bench-quick:  ## whether every benchmark still runs
	$(MAKE) bench BENCH=--quick

gpu-check:  ## all that a GPU has to show, with the Python at hand: no environment, no package index
	$(PYTHON) benchmarks/gpu_check.py

accuracy: $(VENV)/.built  ## errors of gradients against float64, table and figure; a quarter of an hour
	$(BIN)/python benchmarks/accuracy.py --output outputs/accuracy

wheel: $(VENV)/.dependencies  ## an sdist and, built from it, a wheel for this Python and any Linux as new as this
	rm -f $(DIST)/odeblock-*.tar.gz $(DIST)/odeblock-*-linux_*.whl
	$(BIN)/python -m build --sdist --no-isolation --outdir $(DIST)
	ODEBLOCK_NATIVE=ON ODEBLOCK_CUDA=$(or $(ODEBLOCK_CUDA),OFF) $(BIN)/pip wheel --no-deps -w $(DIST) $(DIST)/*.tar.gz
	$(BIN)/auditwheel repair --wheel-dir $(DIST) $(DIST)/*-linux_*.whl
	rm $(DIST)/*-linux_*.whl

package-check: $(VENV)/.dependencies  ## the wheel in a new environment, and one built without a compiler
	$(BIN)/python tests/check_package.py

docs: $(VENV)/.dependencies  ## the documentation's site, to outputs/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.dependencies  ## the same in a browser, as one writes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

wheel-check:  ## the wheel against another PyTorch, gigabytes to download: make wheel wheel-check TORCH=2.6.0
	$(if $(TORCH),,$(error TORCH: expected a version, as in TORCH=2.6.0))
	$(PYTHON) -m venv .venv-torch-$(TORCH)
	.venv-torch-$(TORCH)/bin/pip install torch==$(TORCH) "$$(echo $(DIST)/*-$$($(PYTHON) -c 'import sys; print("cp%d%d" % sys.version_info[:2])')-*.whl)[test]"
	.venv-torch-$(TORCH)/bin/pytest --benchmark-disable $(WHEEL_TESTS:%=tests/test_%.py)

clean:
	rm -rf $(VENV) build dist outputs odeblock/_core*.so *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.dependencies: requirements-dev.txt requirements-dev.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c requirements-dev.lock || \
	  { echo "this package index lacks a version of requirements-dev.lock: others are taken" && \
	    $(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt; }
	touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	ODEBLOCK_NATIVE=ON $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@
