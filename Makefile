# `make` or `make help` lists the targets. Every target sets up what it needs, on a fresh machine too.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
PIP = $(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
# Two processes' worth of threads fight over two cores; each test process gets one.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

# What a user needs. torch first and pinned: an unpinned torch pulls gigabytes of CUDA packages.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch (200 MB) ..."
	@$(PIP) --upgrade pip
	@$(PIP) torch
	@echo "Installing hf-recycle with transformers and datasets ..."
	@$(PIP) --editable .
	touch $@

# What the tests and the checks of style need beside it.
$(VENV)/.developer: $(VENV)/.installed
	@echo "Installing what tests and lint need ..."
	@$(PIP) --editable '.[test,lint,tensorboard]'
	# Without its compiled kernels, which a CPU has no use for; its setup imports torch, hence no build isolation.
	@$(PIP) setuptools wheel ninja
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	@$(PIP) --editable '.[docs]'
	touch $@

.PHONY: install
install: $(VENV)/.developer ## Make the virtual environment, with all that tests and lint need

.PHONY: demo
demo: $(VENV)/.installed ## Pretrain a small BERT with neuron recycling on the built-in corpus (minutes on two cores)
	$(BIN)/hf-recycle train demo --resume_from_checkpoint true

.PHONY: cycle
cycle: $(VENV)/.installed ## Show the vicious cycle, and how immunity and matched_normal break it
	$(BIN)/hf-recycle train vicious-cycle --output_dir runs/cycle-plain
	$(BIN)/hf-recycle train vicious-cycle --recycle_immunity 6 --output_dir runs/cycle-immunity
	$(BIN)/hf-recycle train vicious-cycle --recycle_reinit matched_normal --output_dir runs/cycle-matched-normal

PYTEST = $(TEST_ENV) $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: test
test: install ## Run the tests, but for those of test-long
	$(PYTEST) -m "not long"

.PHONY: test-long
test-long: install ## Run the tests that launch many processes or train for half a minute each
	$(PYTEST) -m long

.PHONY: test-fast
test-fast: install ## Run the tests that take no more than seconds, with a third of the cases of each
	$(PYTEST) -m "not slow"

.PHONY: lint
lint: install ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: install ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench
bench: $(VENV)/.installed ## Measure speed and memory against the stock Trainer (twenty minutes on two idle cores)
	$(BIN)/python -m benchmarks $(ROWS)

.PHONY: wheel
wheel: $(VENV)/.installed ## Build the wheel into dist/
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

.PHONY: reference
reference: $(VENV)/.installed ## Renew the pages of arguments, methods and commands from the code
	$(BIN)/python docs/reference.py

.PHONY: docs
docs: $(VENV)/.docs ## Build the documentation site into build/site; a warning is an error
	$(BIN)/zensical build --clean --strict --config-file mkdocs.yml

.PHONY: clean
clean: ## Remove the virtual environment and what was built
	rm -rf $(VENV) dist build
