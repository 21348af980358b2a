# make demo       the whole way once on synthetic ECGs, in minutes on a CPU; leaves everything in runs/demo
# make quick      format, lint, types, and the tests that end within 90 seconds on two cores
# make test       format, lint, types, tests; the kernels' tests a second time in Triton's interpreter
# make test-all   the same with the tests marked slow
# make format     format the sources and fix what ruff can fix
# make resources  every tile of every kernel compiled for four GPUs, none needed; minutes
# make bench      the benchmark suite
# make examples   the examples of ecgot.compat, with what they print
# make hf-kernel  the transport kernels as a folder for Hugging Face's Kernel Hub, in runs/hf-kernel
# make clean      remove the virtual environment and runs/demo
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := runs/demo
CORES := $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 4 ? cores : 4)))
PYTEST := $(BIN)/pytest --numprocesses $(CORES)
# Modules with examples in their docstrings, which are tests too.
EXAMPLES := $(shell grep -rl --include='*.py' '>>>' ecgot)
# What Triton's interpreter repeats. Those left out set up Triton themselves, each in a process of its own.
INTERPRETED := tests/kernels tests/benchmarks/test_kernel_cases.py \
	--ignore=tests/kernels/resources --ignore=tests/kernels/conv/test_backends.py
# The repository's rules and the subpackages whose tests take seconds: what make quick runs.
FAST := $(wildcard tests/test_*.py) tests/bench/test_stopwatch.py tests/data tests/eval/test_auroc.py tests/runs \
	tests/text tests/kernels/conv/test_conv1d.py tests/kernels/ot/test_properties.py
SELECT := -m 'not slow'

.PHONY: demo quick test test-all check format resources bench examples hf-kernel clean
.DELETE_ON_ERROR:

$(INSTALLED): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ecgot needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	rm -rf $(DEMO)
	$(BIN)/ecgot synth $(DEMO)/data --records 2000 --seed 0
	$(BIN)/ecgot train --data $(DEMO)/data --out $(DEMO)/run --cache $(DEMO)/cache encoder.name=resnet1d_tiny align.epochs=6
	$(BIN)/ecgot evaluate $(DEMO)/run --data $(DEMO)/data --cache $(DEMO)/cache --examples 5

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

quick: check
	$(PYTEST) --dist loadfile $(SELECT) $(FAST)

test: check
	$(PYTEST) --dist loadfile $(SELECT) --doctest-modules tests $(EXAMPLES)  # a file's tests share what is slow to make
	TRITON_INTERPRET=1 $(PYTEST) --dist worksteal $(SELECT) $(INTERPRETED)

test-all: SELECT :=
test-all: test

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

resources: $(INSTALLED)
	$(BIN)/python -m ecgot.kernels.resources --spills none

bench: $(INSTALLED)
	$(BIN)/pytest benchmarks

examples: $(INSTALLED)
	$(BIN)/pytest -s tests/test_examples.py

hf-kernel: $(INSTALLED)
	$(BIN)/python -m tools.hf_kernel runs/hf-kernel

clean:
	rm -rf $(VENV) $(DEMO)
