# `make run` and `make test` are all that a fresh machine with Python 3.11 and make needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BACKENDS ?= jax tensorflow torch
JOBS ?= auto
INSTALLED := $(VENV)/.installed

# docs/rows.md is compared only with a run of the whole suite.
WHOLE = $(if $(ARGS),,$(if $(filter 3,$(words $(BACKENDS))),yes))

.PHONY: run check test rows messages departures keras-tests nightly compat lint format bench bitwise clean

run: $(INSTALLED)  ## Train a GAN on handwritten digits, on the default backend. ARGS="--backend torch" for another.
	$(BIN)/handloom run gan-digits $(ARGS)

# One thread per operation: on a shared machine, threads that wait for each other cost more time than they save.
test: lint  ## Lint, then the whole suite on every backend, each in processes of its own. ARGS="-k feed" for a part.
	set -e; for backend in $(BACKENDS); do \
	    echo "== $$backend"; OMP_NUM_THREADS=1 KERAS_BACKEND=$$backend TF_CPP_MIN_LOG_LEVEL=3 \
	        $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --rows=build/rows/$$backend.json $(ARGS); \
	done
	$(if $(WHOLE),$(BIN)/python -m tests.rows.table build/rows --check)

# The files that fail first when something central breaks: under a minute a backend on two quiet cores.
FAST := tests/test_alive.py tests/test_errors.py tests/test_layers.py tests/test_messages.py tests/test_public_api.py \
    tests/util tests/trace/test_gradients.py tests/optimizers/test_minimize.py tests/data/test_sample_weight.py \
    tests/reporting/test_step.py tests/run/test_loop.py tests/checkpoint/test_encoding.py

check: ARGS := $(FAST)
check: test  ## Lint, types, and a minute of tests on every backend: before each commit.

rows: ARGS := tests/rows
rows: test  ## Run the rows, and write docs/rows.md from them.
	$(BIN)/python -m tests.rows.table build/rows

messages: $(INSTALLED)  ## Write docs/messages.md, all errors and warnings by code.
	$(BIN)/python docs/messages.py

departures: $(INSTALLED)  ## Write docs/departures.md, in what and why hl.Model differs from keras.Model, from its table.
	$(BIN)/python docs/departures.py

keras-tests: $(INSTALLED)  ## Run Keras's own tests on hl.Model; an hour. ARGS="--backend jax trainers" for a part.
	$(BIN)/python -m tools.keras_tests $(ARGS)

nightly: $(INSTALLED)  ## Kill runs at a hundred random instants, on every backend.
	set -e; for backend in $(BACKENDS); do \
	    echo "== $$backend"; HANDLOOM_KILLS=100 OMP_NUM_THREADS=1 KERAS_BACKEND=$$backend TF_CPP_MIN_LOG_LEVEL=3 \
	        $(BIN)/python -m pytest -n $(JOBS) -rP --show-capture=stdout tests/resume $(ARGS); \
	done

compat:  ## Try other versions, each set in an environment of its own: docs/compatibility.md. CELLS="torch-2.14" for some.
	$(PYTHON) -m tools.compat $(CELLS)

lint: $(INSTALLED)  ## Style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## Let ruff fix what it can.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## What a step costs, beside Keras's fit, a loop by hand, native torch, and eager execution.
	$(BIN)/python benchmarks/overhead.py $(ARGS)
	$(BIN)/python benchmarks/compiled.py

bitwise: $(INSTALLED)  ## Compare the bits of training with another revision: make bitwise BASE=main~3.
	rm -rf build/base && git worktree prune && git worktree add --force --detach build/base $(BASE)
	set -e; for backend in $(BACKENDS); do for tree in build/base .; do \
	    (cd $$tree && OMP_NUM_THREADS=1 KERAS_BACKEND=$$backend PYTHONPATH=. $(CURDIR)/$(BIN)/python -W ignore benchmarks/bitwise.py) \
	        > build/bits-$$(basename $$(cd $$tree && pwd)).json 2> build/bits.log || { tail -20 build/bits.log; exit 1; }; \
	done; diff build/bits-base.json build/bits-$$(basename $(CURDIR)).json && echo "$$backend: bitwise identical"; done
	git worktree remove --force build/base

clean:  ## Remove the virtual environment and the files of runs.
	rm -rf $(VENV) build runs .mypy_cache .pytest_cache .ruff_cache .hypothesis

# torch first, and by its exact version, which has a CPU build.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
