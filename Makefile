# make demo       the whole way once on synthetic ECGs, in minutes on a CPU; leaves everything in runs/demo
# make test       format, lint, types, tests; the kernels' tests a second time in Triton's interpreter
# make resources  every tile of every kernel compiled for four GPUs, none needed; minutes
# make bench      the benchmark suite
# make clean      remove the virtual environment and runs/demo
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := runs/demo
PYTEST := $(BIN)/pytest --numprocesses $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 4 ? cores : 4)))
# These set up Triton themselves, each in a process of its own.
ONCE := --ignore=tests/kernels/resources --ignore=tests/kernels/conv/test_backends.py

.PHONY: demo test resources bench clean
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

test: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) --dist loadfile  # a file's tests together, as they share what is slow to make
	TRITON_INTERPRET=1 $(PYTEST) --dist worksteal $(ONCE) tests/kernels

resources: $(INSTALLED)
	$(BIN)/python -m ecgot.kernels.resources --spills none

bench: $(INSTALLED)
	$(BIN)/pytest benchmarks

clean:
	rm -rf $(VENV) $(DEMO)
