# Every target is one line that calls the command line; `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
PRESET ?= auto
RUN ?= latest
ENGINE ?=
MODEL ?=
A ?=
B ?=
ARGS ?=
# A name as one word of the shell, whatever stands in it.
quoted = '$(subst ','\'',$(1))'
BIN := $(VENV)/bin
# The requirements file follows the machine: CUDA present or not.
CUDA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
REQUIREMENTS ?= $(if $(CUDA),requirements.txt,requirements-cpu.txt)

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev setup-unsloth doctor data preview train chat serve eval agent-eval export score report compare test test-faults test-fuzz test-rehearsal lint bench gpu-check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk -F ':.*?## ' '{printf "  make %-14s %s\n", $$1, $$2}'
	@echo '  variables: PRESET=auto|cpu|nano|smoke|t4|l4|a100|paper|seed  RUN=latest  ARGS="--train.epochs 4"'

$(VENV)/.installed: requirements.txt requirements-cpu.txt pyproject.toml
	@echo "setting up $(VENV) from $(REQUIREMENTS) ($(if $(CUDA),CUDA found,no CUDA device found))"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.installed-unsloth: $(VENV)/.installed requirements-cpu-unsloth.txt
	$(if $(CUDA),,$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-cpu-unsloth.txt)
	@touch $@

setup: $(VENV)/.installed ## set up .venv from the requirements file that fits this machine
setup-dev: $(VENV)/.installed-dev ## add the tools for tests, lint and types
setup-unsloth: $(VENV)/.installed-unsloth ## without CUDA: add Unsloth's CPU backend

doctor: setup ## what this machine has and lacks for a config, with the fix
	$(BIN)/tinyagent-fast doctor --preset $(call quoted,$(PRESET)) $(ARGS)

data: setup ## download the published dataset into data/
	$(BIN)/tinyagent-fast data download $(ARGS)

preview: setup ## show rows with their supervised tokens in colour
	$(BIN)/tinyagent-fast preview --preset $(call quoted,$(PRESET)) $(ARGS)

train: setup ## train (PRESET=auto picks the preset for this machine)
	$(BIN)/tinyagent-fast train --preset $(call quoted,$(PRESET)) $(ARGS)

chat: setup ## type requests, see their plans and graphs (RUN=latest or MODEL=file.gguf)
	$(BIN)/tinyagent-fast chat $(if $(MODEL),--model $(call quoted,$(MODEL)),--run $(call quoted,$(RUN))) $(ARGS)

serve: setup ## the same as a web page on this machine (RUN=latest or MODEL=file.gguf)
	$(BIN)/tinyagent-fast serve $(if $(MODEL),--model $(call quoted,$(MODEL)),--run $(call quoted,$(RUN))) $(ARGS)

eval: setup ## measure plan success of a run (RUN=latest ENGINE=auto|torch|gguf|vllm MODEL=file.gguf)
	$(BIN)/tinyagent-fast eval --run $(call quoted,$(RUN)) $(if $(ENGINE),--engine $(call quoted,$(ENGINE))) $(if $(MODEL),--model $(call quoted,$(MODEL))) $(ARGS)

agent-eval: setup ## task success of a run: its plans are carried out in a sandbox (RUN=latest)
	$(BIN)/tinyagent-fast agent-eval --run $(call quoted,$(RUN)) $(if $(MODEL),--model $(call quoted,$(MODEL))) $(ARGS)

export: setup ## merged weights and GGUF files of a run, proved (RUN=latest)
	$(BIN)/tinyagent-fast export --run $(call quoted,$(RUN)) $(ARGS)

score: setup ## score a run's predictions again
	$(BIN)/tinyagent-fast score $(call quoted,runs/$(RUN)) $(ARGS)

report: setup ## a run as one HTML page and as Markdown (RUN=latest)
	$(BIN)/tinyagent-fast report --run $(call quoted,$(RUN)) $(ARGS)

compare: setup ## two runs on the same queries, and which plans flipped (A=run B=run)
	$(BIN)/tinyagent-fast compare $(call quoted,$(A)) $(call quoted,$(B)) $(ARGS)

test: setup-dev setup-unsloth ## run the tests that need no GPU, on all cores (ARGS="-n 0": on one)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m "not gpu and not slow" $(ARGS)

test-faults: setup-dev ## break commands off, and compare with what came of no kill
	$(BIN)/python tests/faults/kills.py $(ARGS)

test-fuzz: setup-dev ## feed 100,000 hostile inputs to all that is read from users and models
	$(BIN)/python tests/faults/fuzz.py $(ARGS)

test-rehearsal: setup-dev setup-unsloth ## a whole training by Unsloth's GPU kernels on a CPU (minutes)
	$(BIN)/python -m pytest -m slow tests/training/test_unsloth_rehearsal.py $(ARGS)

lint: setup-dev ## ruff and mypy --strict
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: setup ## measure training, evaluation and data against the usual ways (ARGS=--quick)
	$(BIN)/python benchmarks/bench.py $(ARGS)

gpu-check: ## on a CUDA machine: measure, and write one JSON into benchmarks/results/
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py $(ARGS)

clean: ## remove caches; runs and data stay
	rm -rf .cache .mypy_cache .ruff_cache .hypothesis unsloth_compiled_cache
