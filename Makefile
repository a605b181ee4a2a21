# Everything a user or a contributor runs. `make` or `make help` lists the targets.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# Tests run tiny models, for which more threads are slower.
TEST_ENV := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

# Processes that run tests, a file of them at a time.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install quickstart study test test-slow check format clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## make .venv and install the pinned packages into it

# The stamp is older than what it was made from only when a dependency may have changed.
$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: there is no $(PYTHON); install Python >= 3.11 or run make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Meshift needs Python >= 3.11, but $(PYTHON) is $$($(PYTHON) --version 2>&1); run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "make: $(PYTHON) cannot make a virtual environment; install its venv module (Debian: apt install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[dev,quickstart]'
	@touch $@

quickstart: $(VENV)/.installed  ## align a small language model with RLHF on this machine's CPU (ARGS="..." is passed on)
	$(BIN)/python recipes/quickstart.py $(ARGS)

study: $(VENV)/.installed  ## PPO against DPO: the study at its small setting (ARGS="--setting recipes/study/full.yaml")
	$(BIN)/python -m recipes.study $(ARGS)

test: $(VENV)/.installed  ## run the tests (ARGS="-k batch" is passed on)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(VENV)/.installed  ## run the tests that need minutes or the real model
	$(TEST_ENV) $(BIN)/python -m pytest -m slow $(ARGS)

check: $(VENV)/.installed  ## formatter, linter, types, import contracts, budgets
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(TEST_ENV) $(BIN)/python -m pytest tests/architecture

format: $(VENV)/.installed  ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove .venv and every cache in this folder; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
