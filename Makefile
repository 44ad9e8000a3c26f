# Every habit has a target. Those that need Python packages make .venv first, and are instant when it is there.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: help install demo test lint types clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv with the package, its tools and everything the tests need

$(INSTALLED): setup.py constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(INSTALLED) ## Tell a story and answer a question with the built-in model
	@$(BIN)/fastllama complete "Once upon a time" --echo --seed 4
	@echo
	@echo "> What is the capital of France?"
	@echo "What is the capital of France?" | $(BIN)/fastllama chat --temperature 0

test: $(INSTALLED) ## Run all tests
	$(BIN)/python -m pytest

lint: $(INSTALLED) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## Check types
	$(BIN)/mypy

clean: ## Remove .venv and everything that was generated
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
