# `make` or `make help` lists the targets. Every target sets up what it needs, on a fresh machine too.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
# Two processes' worth of threads fight over two cores; each test process gets one.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

# torch first and pinned: an unpinned torch pulls gigabytes of CUDA packages.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test,lint,tensorboard]'
	# Without its compiled kernels, which a CPU has no use for; its setup imports torch, hence no build isolation.
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) setuptools wheel ninja
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --no-build-isolation deepspeed
	touch $@

.PHONY: install
install: $(VENV)/.installed ## Make the virtual environment

.PHONY: demo
demo: install ## Pretrain a small BERT with neuron recycling on the built-in corpus (minutes on two cores)
	$(BIN)/hf-recycle train demo

.PHONY: cycle
cycle: install ## Show the vicious cycle, and how immunity and matched_normal break it
	$(BIN)/hf-recycle train vicious-cycle --output_dir runs/cycle-plain
	$(BIN)/hf-recycle train vicious-cycle --recycle_immunity 6 --output_dir runs/cycle-immunity
	$(BIN)/hf-recycle train vicious-cycle --recycle_reinit matched_normal --output_dir runs/cycle-matched-normal

.PHONY: test
test: install ## Run all tests
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: test-fast
test-fast: install ## Run the tests that take no more than seconds each
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

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
bench: install ## Measure speed and memory against the stock Trainer (twenty minutes on two idle cores)
	$(BIN)/python -m benchmarks $(ROWS)

.PHONY: wheel
wheel: install ## Build the wheel into dist/
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

.PHONY: clean
clean: ## Remove the virtual environment and what was built
	rm -rf $(VENV) dist build
