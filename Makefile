# Needs GNU make and Python >= 3.11; everything else is installed into .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint docs bench bench-thorough clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench
# Two test processes of one thread each: the models in the tests are too small to be worth sharing out.
WORKERS ?= 2
# PYTHON=... is taken as given; without it the first of these that is new enough is used.
PYTHONS := $(if $(PYTHON),$(PYTHON),python3 python3.14 python3.13 python3.12 python3.11)
# Whole files to one process: what the tests of a file share, such as a finished run, is made once. The longest come
# first, as tests/conftest.py has them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

# The stamp is removed first and written last: without it a folder left by an interrupted install is rebuilt.
$(STAMP): pyproject.toml
	@python=; \
	for candidate in $(PYTHONS); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: needs Python >= 3.11; tried: $(PYTHONS) (python3 is $$(python3 --version 2>&1 || true))." >&2; \
	  echo "       Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; \
	fi; \
	if ! "$$python" -c 'import venv, ensurepip' 2>/dev/null; then \
	  echo "error: $$python lacks the venv module (on Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; \
	fi; \
	if [ ! -f $@ ]; then \
	  rm -rf $(VENV); \
	  echo "creating $(VENV) with $$("$$python" --version) and installing; the first time this downloads several GB"; \
	  "$$python" -m venv $(VENV); \
	else \
	  rm -f $@; \
	  echo "pyproject.toml changed: updating $(VENV)"; \
	fi; \
	$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev]'
	@touch $@

# Peers that benchmarks measure against.
$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[bench]'
	@touch $@

demo: $(STAMP)  ## train, see what blocks can spare, prune, distil and report on handwritten digits, end to end
	$(BIN)/python train.py "stage=[all,sensitivity]"

test: $(STAMP)  ## the everyday tests
	$(PYTEST)

test-slow: $(STAMP)  ## the slow tests: more processes, kills, compilers, exports; SLOW=tests/test_x.py::test_y names some
	$(PYTEST) -m slow $(SLOW)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)  ## write docs/configuration.md anew from conf/, the table of models, and the benchmarks' tables from their stored numbers
	$(BIN)/python docs/make_configuration.py
	$(BIN)/python docs/make_families.py
	$(BIN)/python benchmarks/pages.py

bench: $(BENCH_STAMP)  ## all benchmarks in quick form, each target beside what was measured: half an hour; BENCH=--help says more
	$(BIN)/python benchmarks/run.py $(BENCH)

bench-thorough: $(BENCH_STAMP)  ## as docs/benchmarks.md shows them, unattended, over hours; started again, it goes on
	$(BIN)/python benchmarks/run.py --thorough --resume $(BENCH)

clean:  ## remove .venv and every cache (results under runs/ and outputs/ stay)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
