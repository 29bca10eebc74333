# Every target sets up what it needs; PYTHON names the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt constraints.txt $(shell find csrc -type f 2>/dev/null)
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo study second-look demo-checkpoint test test-slow bench gpu-check lint clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(VENV)/installed  ## a virtual environment with the package built in it

# torch first and by itself: with it there, no other requirement can choose another build.
$(VENV)/installed: $(SOURCES)
	@echo "Setting up $(VENV): a few minutes the first time."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,eval,judge,test]'
	$(BIN)/python -m vittle_kernels
	touch $@

demo: setup  ## tune a small LLaVA on digit scenes, plainly and with the bottleneck
	$(BIN)/vittle demo --output runs/demo

study: setup  ## tune the demo's model by every method, five seeds each, and compare: hours
	$(BIN)/vittle study --output runs/study

second-look: setup  ## VPG-C's experiment, five seeds a condition: hours
	$(BIN)/python -m vittle.demo.second_look --output runs/second_look

demo-checkpoint: setup  ## make the small LLaVA that the demo starts from
	$(BIN)/python -m vittle.demo.checkpoint

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup lint  ## every test but the slow ones
	$(BIN)/python -m pytest

test-slow: setup  ## what is too slow for every change
	$(BIN)/python -m pytest -m slow

bench: setup  ## the microbenchmarks, for this machine
	$(BIN)/python benchmarks/bench_fused_ib.py --output runs/bench
	$(BIN)/python benchmarks/bench_layer.py --output runs/bench
	$(BIN)/python benchmarks/bench_scaling.py --output runs/bench

STAGE ?= build
MINUTES ?= 7
COMMIT ?= $(shell git rev-parse HEAD 2>/dev/null)
RESULTS ?= benchmarks/results
gpu-check:  ## STAGE=build|test|sanitize|op|layer|step on a GPU machine, with the packages of PYTHON
	PYTHONPATH=.:python $(PYTHON) benchmarks/gpu_check.py $(STAGE) --minutes $(MINUTES) --commit '$(COMMIT)' --output $(RESULTS)

clean:  ## remove the environment, builds and runs
	rm -rf $(VENV) build runs *.egg-info vittle_kernels/*.so .pytest_cache .mypy_cache .ruff_cache
