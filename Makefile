# `make run` and `make test` are all that a fresh machine with Python 3.11 and make needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BACKENDS ?= jax tensorflow torch
JOBS ?= auto
INSTALLED := $(VENV)/.installed

# The rows' table is compared with what they showed when all of them ran.
WHOLE = $(if $(ARGS),,$(if $(filter 3,$(words $(BACKENDS))),yes))

.PHONY: run test rows nightly lint format bench bitwise clean

run: $(INSTALLED)  ## Train a GAN on handwritten digits, on the default backend. ARGS="--backend torch" for another.
	$(BIN)/handloom run gan-digits $(ARGS)

# One thread an operation: on a shared machine, threads that wait for each other cost tests more than they save.
test: lint  ## Lint, then the whole suite on every backend, each in processes of its own. ARGS="-k feed" for a part.
	set -e; for backend in $(BACKENDS); do \
	    echo "== $$backend"; OMP_NUM_THREADS=1 KERAS_BACKEND=$$backend TF_CPP_MIN_LOG_LEVEL=3 \
	        $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --rows=build/rows/$$backend.json $(ARGS); \
	done
	$(if $(WHOLE),$(BIN)/python -m tests.rows.table build/rows --check)

rows: ARGS := tests/rows
rows: test  ## What must work, row by row, shown anew: docs/rows.md.
	$(BIN)/python -m tests.rows.table build/rows

nightly: $(INSTALLED)  ## Runs killed at a hundred random instants, on every backend.
	set -e; for backend in $(BACKENDS); do \
	    echo "== $$backend"; HANDLOOM_KILLS=100 OMP_NUM_THREADS=1 KERAS_BACKEND=$$backend TF_CPP_MIN_LOG_LEVEL=3 \
	        $(BIN)/python -m pytest -n $(JOBS) -rP --show-capture=stdout tests/resume $(ARGS); \
	done

lint: $(INSTALLED)  ## Style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## Mend what a machine can mend.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## What a step costs, beside Keras's fit, a loop by hand, native torch, and op by op.
	$(BIN)/python benchmarks/overhead.py $(ARGS)
	$(BIN)/python benchmarks/compiled.py

bitwise: $(INSTALLED)  ## Whether training leaves the same bits as at another revision: make bitwise BASE=main~3.
	rm -rf build/base && git worktree prune && git worktree add --force --detach build/base $(BASE)
	set -e; for backend in $(BACKENDS); do for tree in build/base .; do \
	    (cd $$tree && OMP_NUM_THREADS=1 KERAS_BACKEND=$$backend PYTHONPATH=. $(CURDIR)/$(BIN)/python -W ignore benchmarks/bitwise.py) \
	        > build/bits-$$(basename $$(cd $$tree && pwd)).json 2> build/bits.log || { tail -20 build/bits.log; exit 1; }; \
	done; diff build/bits-base.json build/bits-$$(basename $(CURDIR)).json && echo "$$backend: the same bits"; done
	git worktree remove --force build/base

clean:  ## Remove the virtual environment and what runs left.
	rm -rf $(VENV) build runs .mypy_cache .pytest_cache .ruff_cache .hypothesis

# torch first, and by its exact version: there is a CPU build of just that one.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
