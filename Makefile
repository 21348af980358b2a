# make demo   the whole way once on synthetic ECGs, in minutes on a CPU; leaves everything in runs/demo
# make test   format, lint, types, the kernels' resources, tests
# make bench  the benchmark suite
# make clean  remove the virtual environment and runs/demo
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := runs/demo

.PHONY: demo test bench clean
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
	$(BIN)/python -m ecgot.kernels.resources --spills none
	$(BIN)/pytest
	TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels

bench: $(INSTALLED)
	$(BIN)/pytest benchmarks

clean:
	rm -rf $(VENV) $(DEMO)
