# SPDX-License-Identifier: Apache-2.0
# Every command of the project; `make help` lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Set PYTHON to choose the interpreter of the environment; it must be 3.12 or newer.
PYTHON ?=
VENV ?= .venv
EXTRAS ?= dev
CUDA_VENV ?= .venv-cuda
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
ARGS ?=

# Compiled XLA programs are kept between runs, which makes a second test run several times faster.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
# Small ones too: the tests compile thousands, and their processes share them.
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0

.PHONY: help setup demo demo-diffusion demo-sudoku demo-rcd demo-losa sweep-demo test test-slow coverage lint format bench bench-gpu aot-tpu aot-cuda clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything that development needs

# A candidate counts only if it runs: a version manager leaves shims of versions it cannot start.
define FIND_PYTHON
for candidate in "$(PYTHON)" python3.12 python3.13 python3.14 python3 python \
    "$$HOME"/.pyenv/versions/3.1[2-9]*/bin/python "$$(uv python find '>=3.12' 2>/dev/null || true)"
do
  if [ -n "$$candidate" ] && path=$$("$$candidate" -c '
import sys, venv, ensurepip
sys.exit(1) if sys.version_info < (3, 12) else print(sys.executable)
  ' 2>/dev/null) && [ -n "$$path" ]; then
    echo "$$path"
    exit 0
  fi
done
echo "no Python >= 3.12 with venv found; install one (for example 'uv python install 3.12'," >&2
echo "'pyenv install 3.12' or your system's packages python3.12 and python3.12-venv)," >&2
echo "or name it: make setup PYTHON=/path/to/python3.12" >&2
exit 1
endef
export FIND_PYTHON

$(STAMP): pyproject.toml constraints.txt
	@[ -x $(BIN)/python ] || { python=$$(bash -c "$$FIND_PYTHON"); echo "environment: $$python"; \
	    "$$python" -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# The environment holds the TPU compiler, which would look for a TPU; the demo is for the CPU.
demo: export JAX_PLATFORMS ?= cpu
demo: setup ## train a small model on this machine and evaluate it
	$(BIN)/python -m train configs/train/demo.yaml --workdir runs/demo $(ARGS)
	$(BIN)/python -m eval configs/eval/demo.yaml --workdir runs/demo/eval

TRAIN = $(BIN)/python -m train
STUDENT = $(TRAIN) configs/train/cdlm_tiny.yaml --workdir runs/student
SUDOKU = $(TRAIN) configs/train/cdlm_sudoku.yaml --workdir runs/sudoku
RCD = $(TRAIN) configs/train/rcd_tiny.yaml

demo-diffusion: export JAX_PLATFORMS ?= cpu
demo-diffusion: setup ## distil a diffusion model with CDLM and compare accuracy and speed
	$(TRAIN) configs/train/tiny_teacher.yaml --workdir runs/teacher
	$(TRAIN) configs/train/cdlm_tiny_collect.yaml --workdir runs/trajectories
	$(STUDENT)
	$(STUDENT)_distillation objective.consistency=0 objective.mask_prediction=0
	$(STUDENT)_consistency objective.distillation=0 objective.mask_prediction=0 objective.consistency=1
	$(BIN)/python -m eval configs/eval/cdlm_tiny.yaml --workdir runs/cdlm $(ARGS)

demo-sudoku: export JAX_PLATFORMS ?= cpu
demo-sudoku: setup ## compare the losses of CDLM, three seeds each, where parallel decoding is hard
	$(TRAIN) configs/train/sudoku_teacher.yaml --workdir runs/sudoku_teacher
	$(TRAIN) configs/train/cdlm_sudoku_collect.yaml --workdir runs/sudoku_trajectories
	for seed in 0 1 2; do \
	  $(SUDOKU)_all_$$seed seed=$$seed && \
	  $(SUDOKU)_distillation_$$seed seed=$$seed objective.consistency=0 objective.mask_prediction=0 || exit 1; \
	done
	$(SUDOKU)_consistency_0 objective.distillation=0 objective.mask_prediction=0 objective.consistency=1
	$(BIN)/python -m eval configs/eval/cdlm_sudoku.yaml --workdir runs/cdlm_sudoku $(ARGS)

demo-rcd: export JAX_PLATFORMS ?= cpu
demo-rcd: setup ## train with and without residual context, three seeds each, and compare
	$(TRAIN) configs/train/sudoku_early.yaml --workdir runs/early
	for seed in 0 1 2; do \
	  $(RCD) --workdir runs/rcd_$$seed seed=$$seed && \
	  $(RCD) --workdir runs/seqd_$$seed seed=$$seed objective.residual.alpha_scale=0 || exit 1; \
	done
	$(RCD) --workdir runs/rcd_frozen_0 objective.cold_rows=0.25 \
	  objective.reference='{kind: hf, path: runs/seqd_0/export}'
	$(BIN)/python -m eval configs/eval/rcd_tiny.yaml --workdir runs/rcd $(ARGS)

demo-losa: export JAX_PLATFORMS ?= cpu
demo-losa: setup ## compare sparse attention to a long context with all of it
	$(TRAIN) configs/train/lookup_ar.yaml --workdir runs/lookup_ar
	$(TRAIN) configs/train/lookup_block.yaml --workdir runs/lookup_block
	$(TRAIN) configs/train/lookup_long.yaml --workdir runs/lookup_long
	$(BIN)/python -m eval configs/eval/losa_tiny.yaml --workdir runs/losa $(ARGS)

SWEEP = runs/weather_sweep
sweep-demo: export JAX_PLATFORMS ?= cpu
sweep-demo: setup ## simulate weather, train a family of emulators on it, fit scaling laws, forecast
	$(TRAIN) configs/train/simulate_weather.yaml --workdir runs/weather
	$(TRAIN) configs/sweeps/weather_tiny.yaml --workdir $(SWEEP)
	$(BIN)/python -m eval configs/eval/scaling_weather.yaml --workdir runs/weather_scaling
	$(BIN)/python -m eval configs/eval/forecast_weather.yaml --workdir runs/weather_forecast $(ARGS)

# Tests start many processes, which share bytecode even where the environment says not to write it.
test: export PYTHONDONTWRITEBYTECODE :=
test: setup ## run the default tests (WORKERS=2, ARGS="tests/x.py -k name")
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: setup ## run the tests that take minutes
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -m slow $(ARGS)

coverage: setup ## run the default tests and report the lines that none of them runs
	$(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term-missing:skip-covered $(ARGS)

lint: setup ## check style, formatting and types
	@failed=""; \
	$(BIN)/ruff check . || failed="$$failed ruff-check"; \
	$(BIN)/ruff format --check . || failed="$$failed ruff-format"; \
	$(BIN)/pyright --pythonpath $(BIN)/python || failed="$$failed pyright"; \
	[ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

format: setup ## format the code and apply safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## measure the speed of two small models and of the kernels on this machine
	$(BIN)/python -m eval configs/eval/speed.yaml $(ARGS)
	$(BIN)/python -m pallas_kernels.bench

bench-gpu: setup ## measure the speed of larger models and of the kernels on a GPU (needs the extra `cuda`)
	$(BIN)/python -m eval configs/eval/speed_gpu.yaml $(ARGS)
	$(BIN)/python -m pallas_kernels.bench

aot-tpu: setup ## compile the kernels for every TPU, without one
	$(BIN)/python -m tests.aot --targets v4,v5e,v5p,v6e --schedule $(ARGS)

aot-cuda: ## compile the kernels for CUDA GPUs, without one (makes .venv-cuda)
	$(MAKE) setup VENV=$(CUDA_VENV) EXTRAS=aot-cuda
	$(CUDA_VENV)/bin/python -m tests.aot --targets h100,h200,a100 --sass $(ARGS)

clean: ## remove the environments, caches and build outputs; runs/ stays
	rm -rf $(VENV) $(CUDA_VENV) .cache .pytest_cache .ruff_cache .hypothesis build dist htmlcov .coverage .coverage.*
