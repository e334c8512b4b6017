# Needs CPython >= 3.11, pip and make; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?= -n 2

# Small QR and SVD work belongs on one thread, and idle OpenMP threads must not spin.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
.PHONY: help venv demo up test fuzz lint format bench openapi docs clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(VENV)/.dev  ## create the virtual environment with everything a developer needs

demo: $(VENV)/.run  ## merge real adapters through the whole service, on loopback, in seconds
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

up: $(VENV)/.run  ## start API, Redis, storage and one worker on this machine
	$(BIN)/merganser up $(UP_ARGS)

test: $(VENV)/.dev  ## run the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

fuzz: $(VENV)/.dev  ## send the API many made-up requests (FUZZ_EXAMPLES of each operation and phase)
	FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-200} $(BIN)/python -m pytest -n0 -s tests/service/test_schemathesis.py

lint: $(VENV)/.dev  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## time the merge step against its floor and against PEFT
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

openapi: $(VENV)/.dev  ## write openapi.yaml from the app
	$(BIN)/python -m service.openapi

docs: $(VENV)/.dev  ## write docs/methods from the catalogue and docs/errors.md from the sources
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/errors_page.py

clean:  ## remove what the targets above made, the environment included
	rm -rf $(VENV) demo-output build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Two stamps, so that the demo does not wait for what only the tests need.
$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.run $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "CPython 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
