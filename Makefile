# Needs nothing but make and Python 3.11 or later. `make` alone lists the targets.
# Another interpreter: `make PYTHON=python3.12 up` (after `make clean`, if .venv was made with a different one).

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PEERS := .venv-peers
FEAST := 0.67.0
FUZZER := .venv-fuzz
ATHERIS := 3.0.0
# More arguments for pytest, e.g. `make quick ARGS="-k registry"`.
ARGS ?=
# `make lock UPGRADE=1` takes the newest versions; otherwise only what pyproject.toml asks for changes.
UPGRADE ?=
LOCK := $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links $(if $(UPGRADE),--upgrade)

# Keep compiled modules, even if the environment says otherwise: compiling them takes every test process three seconds.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help up unit quick test check format bench bench-peers torture soak durability fuzz screenshots lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

up: $(STAMP) ## Run everything on this machine: cache, queue, API and worker (Ctrl-C stops it)
	@exec $(BIN)/profiles up

unit: $(STAMP) ## Run the tests that need no server: pure code and SQLite
	@$(BIN)/python -m pytest -q -m "not slow" --hypothesis-profile quick -n 2 --dist worksteal tests/unit $(ARGS)

quick: $(STAMP) ## Run the fast tests: unit and integration
	@$(BIN)/python -m pytest -q -m "not slow" --hypothesis-profile quick -n 3 --dist worksteal tests/unit tests/integration $(ARGS)

test: $(STAMP) ## Run all tests
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

check: $(STAMP) ## Check format, lint, types and the direction of imports
	@$(BIN)/ruff format --quiet --check . || { echo "Not formatted: run 'make format', or see '$(BIN)/ruff format --diff .'." >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(STAMP) ## Format the code and fix what the linter can fix
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format .

bench: $(STAMP) ## Measure latency and throughput against references
	@$(BIN)/python -m tests.bench $(ARGS)

bench-peers: $(STAMP) $(PEERS)/bin/feast ## Measure against Feast (installed into .venv-peers)
	@$(BIN)/python -m tests.bench.peers $(PEERS)/bin

torture: $(STAMP) ## Cause random faults and check every answer (longer: ARGS="--minutes 30 --seed 2")
	@$(BIN)/python -m tests.torture $(ARGS)

soak: $(STAMP) ## Watch memory during ten minutes of mixed load (shorter: ARGS="--minutes 2")
	@$(BIN)/python -m tests.torture --mode soak $(ARGS)

durability: $(STAMP) ## Kill API processes 500 times during ingest (fewer: ARGS="--kills 50")
	@$(BIN)/python -m tests.torture --mode durability $(ARGS)

fuzz: $(STAMP) $(FUZZER)/atheris ## Look for faults with generated input, for a quarter of an hour
	@$(BIN)/python -m tests.fuzz $(FUZZER) $(ARGS)

# Not in the lock: its wheels are for Linux on x86-64 and few versions of Python.
$(FUZZER)/atheris:
	@echo "Installing atheris $(ATHERIS) into $(FUZZER) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --target $(FUZZER) "atheris==$(ATHERIS)"

# Not in the lock: Feast is measured, and nothing depends on it.
$(PEERS)/bin/feast:
	@echo "Installing Feast $(FEAST) into $(PEERS) ..."
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install -qq --disable-pip-version-check "feast[redis]==$(FEAST)"

screenshots: $(STAMP) ## Take pictures of the admins' pages of a running `make up` (needs Chromium; ARGS=--decisions=6000 adds a roll-out)
	@$(BIN)/python -m tests.browser.screenshots $(ARGS)

lock: $(STAMP) ## Write both lock files anew from pyproject.toml (UPGRADE=1 takes the newest versions)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check uv
	@$(LOCK) --all-extras --group dev --output-file requirements.lock
	@# The image gets the runtime alone, in the versions that the tests ran with.
	@$(LOCK) --extra otel --extra postgres --extra scoring --constraints requirements.lock --output-file docker/requirements.lock

clean: ## Remove .venv, caches and var/ (with the local database)
	@rm -rf .venv $(PEERS) $(FUZZER) .node var build dist htmlcov .coverage *.egg-info
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find app tests -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# Made once, and again when the lock or the project's metadata change. The build tools come from the lock too, so
# nothing enters that is not pinned by hash.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or later is needed; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | head -n 1)" >&2; \
		echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing into .venv (once; takes about a minute) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
