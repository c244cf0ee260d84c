# `make demo` and `make test` do everything on a fresh Debian or Ubuntu with Python 3.10 or newer.
#
#   PYTHON    the interpreter that .venv is made with         make test PYTHON=python3.12
#   PIP_ARGS  extra arguments for pip, such as an index       make demo PIP_ARGS="--index-url ..."
#   ARGS      extra arguments for the command that is run     make test ARGS="-k philox"
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
DEMO ?= runs/demo
BASE ?= HEAD

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q $(PIP_ARGS)
STAMP := $(VENV)/.installed
# What an editable install does not pick up by itself.
INPUTS := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint docs bench bench-gpu bench-compare bench-report clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install:  ## make .venv and install everything into it; does nothing when up to date
	@# A .venv that does not run (an interrupted or a moved one) is as good as none.
	@$(BIN)/python -c 'from importlib.util import find_spec as f; assert f("pip") and f("torch") and f("editr2_kernels")' \
		>/dev/null 2>&1 || rm -f $(STAMP)
	@$(MAKE) -s $(STAMP)  # -s: no word when there is nothing to do

$(STAMP): $(INPUTS)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" sh scripts/preflight.sh
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		echo "[1/3] making $(VENV)"; rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@echo "[2/3] installing torch (the largest part)"
	@$(PIP) -c constraints.txt torch
	@echo "[3/3] installing editr2 and building its operators"
	@$(PIP) -c constraints.txt -e '.[test,dev,docs,tensorboard,bench,judges]'
	@touch $@

demo: install  ## train the small model that ships with the package; writes a report
	@$(BIN)/editr2 train --preset edit-r2-nft --train.iterations 40 --out $(DEMO) --profile $(ARGS)

test: install  ## the tests, in up to four processes of one thread each
	@$(BIN)/python -m pytest tests -q -n auto --maxprocesses 4 --dist worksteal $(ARGS)

test-all: install  ## and the whole of the tables that `make test` runs a part of (long)
	@$(BIN)/python -m pytest tests -q -n auto --maxprocesses 4 --dist worksteal --exhaustive $(ARGS)

lint: install  ## ruff (rules and format), mypy, and who may import whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache --no-logo

docs: install  ## the documentation as a site, in site/; a broken link is an error
	@# Not --quiet: a warning that is not said is none to --strict either.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "site/index.html"

bench: install  ## the benchmarks that run on this machine's CPU; ARGS=--full for the whole grid
	@$(BIN)/python -m pytest bench -q -m 'not gpu' $(ARGS)

bench-gpu: install  ## the benchmarks that need a CUDA device
	@$(BIN)/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || { \
		echo "bench-gpu needs a CUDA device and a CUDA build of torch; 'editr2 doctor' tells which is missing"; exit 1; }
	@$(BIN)/python -m pytest bench -q -m gpu --timeout 900 $(ARGS)
	@$(BIN)/python -m bench full_size kontext-grpo-80gb --rollout.sessions 1

bench-compare: install  ## this tree against commit BASE, in turns: make bench-compare BASE=main ARGS="-k sde"
	@$(BIN)/python -m bench compare $(BASE) $(ARGS)

bench-report: install  ## docs/performance.md and its plots, from the rows in bench/results
	@$(BIN)/python -m bench report $(ARGS)

clean:  ## remove what was built, .venv included; runs/ stays
	@rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@rm -f kernels/editr2_kernels/_native.* kernels/editr2_kernels/_cuda.* kernels/editr2_kernels/_build_info.json
	@find editr2 kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
