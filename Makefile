# Everything a person does with this project, one word each. `make help` lists the words.
# PIP_* environment variables are honoured, e.g. PIP_EXTRA_INDEX_URL for PyTorch's CPU builds (see docs/inference.md).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA GPU torch is pinned to a release with a CPU build; with one, pip may take the newest CUDA build.
CONSTRAINT := $(if $(shell nvidia-smi -L 2>/dev/null),,-c constraints-cpu.txt)
CORE := $(VENV)/.core
INSTALLED := $(VENV)/.installed
MODEL ?=

.PHONY: help setup chat test test-slow coverage docs lint format bench bench-gpu stories-data stories clean
.DEFAULT_GOAL := help

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## make .venv and install llmkit with every extra and the test requirements

# What pip has to say goes to standard error: the output of `make -s chat` is the reply and nothing else.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINT)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "llmkit needs Python 3.11 or newer, this is %s; set PYTHON=python3.x" % sys.version.split()[0])'
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints-cpu.txt | $(BIN)/python
	@echo 'Setting up $(VENV) with every extra (once, a few minutes)...' >&2
	@$(PIP_INSTALL) -e '.[all,docs,test]' >&2
	@touch $(CORE) $@

# Without a compiler there are no native kernels, and PyTorch runs the model.
$(CORE): pyproject.toml | $(BIN)/python
	@echo 'Setting up $(VENV) (once, about a minute)...' >&2
	@if command -v $(firstword $(CXX)) >/dev/null || command -v clang++ >/dev/null; then $(PIP_INSTALL) -e . >&2; \
	else echo 'No C++ compiler here: installing PyTorch to run the model, which takes longer.' >&2; $(PIP_INSTALL) -e '.[torch]' >&2; fi
	@touch $@

chat: $(CORE)  ## talk to the embedded model (or MODEL=folder-or-hub-id)
	@$(BIN)/llmkit chat $(MODEL)

# A file of tests stays in one process, whose fixtures (tiny models, quantized folders) its tests share.
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist loadfile

test: $(INSTALLED)  ## run the tests, in random order, on all cores (a few minutes)
	@$(PYTEST)

test-slow: $(INSTALLED)  ## run the long checks too
	@$(PYTEST) -m 'not gpu and not network'

coverage: $(INSTALLED)  ## run the tests and print which lines of llmkit/ they reach; under 90% is a failure
	@$(PYTEST) --cov=llmkit --cov-report=term --cov-fail-under=90

docs: $(INSTALLED)  ## write the references of commands and recipes, and that of the API to build/docs/index.html
	@$(BIN)/python docs/generate.py && $(BIN)/python docs/generate.py --api build/docs

lint: $(INSTALLED)  ## ruff, mypy, the GitHub workflows, banned words, and whether the generated pages are current
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/python docs/check_words.py && $(BIN)/python docs/generate.py --check

format: $(INSTALLED)  ## let ruff lay out the code
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

bench: $(INSTALLED)  ## measure a model: speed, memory, time to first token (MODEL=folder-or-hub-id)
	@$(BIN)/llmkit bench $(MODEL)

bench-gpu: $(INSTALLED)  ## measure 4 bits and QLoRA on a CUDA GPU against bitsandbytes (MODEL=folder-or-hub-id; without: an 8B shape)
	@$(BIN)/python -m benchmarks.bench_gpu $(MODEL)

DATA ?= ../shared/data
stories-data: $(INSTALLED)  ## write the training text of the embedded model (needs the DATA folder)
	$(BIN)/python recipes/stories_sampler.py $(DATA) runs/stories-data/samples --megabytes 9
	$(BIN)/python recipes/stories_data.py $(DATA) runs/stories-data

stories: stories-data  ## train the embedded model again and judge it (two hours)
	$(BIN)/llmkit finetune recipes/stories.yaml
	$(BIN)/python recipes/stories_eval.py runs/stories/model --data $(DATA)

clean:  ## remove .venv and caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
