# `make demo` and `make test` work from a fresh clone: each makes .venv on first use. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test check clean

demo: $(VENV)/.stamp-demo
	$(BIN)/partita demo

test: $(VENV)/.stamp-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.stamp-test
	PATH="$(abspath $(BIN)):$$PATH" scripts/check

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-demo: $(INPUTS) | $(VENV)/bin/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[demo,report]'
	touch $@

$(VENV)/.stamp-test: $(INPUTS) | $(VENV)/bin/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,demo,report,zoo]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
