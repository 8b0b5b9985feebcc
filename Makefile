# `make demo` and `make test` do all the set-up on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-slow test-browser torture check docs build-embedded study benchmarks clean

demo: $(VENV)/.installed
	$(BIN)/diffpref demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

test-browser: $(VENV)/.installed-dev
	scripts/install_chromium.sh
	$(BIN)/python -m pytest -m browser

# Ten minutes or more: kills training runs a hundred times and compares what they come to with uncut ones.
torture: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/torture.py

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

# An hour or more on two cores: trains the embedded base model and samples its preference set again.
build-embedded: $(VENV)/.installed
	$(BIN)/python -m diffpref.embedded.build all

study: $(VENV)/.installed
	$(BIN)/python benchmarks/study.py

benchmarks: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[benchmarks]'
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/store.py

clean:
	rm -rf $(VENV) site

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "diffpref needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml constraints.txt $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@ $(VENV)/.installed
