# Everything from nothing: `make train` and `make test` make .venv, install into it, and run.

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/digits
BIN := $(VENV)/bin

.PHONY: train test test-all lint types clean

train: $(VENV)/.train
	$(BIN)/python -m train.main --config configs/digits.py --workdir $(WORKDIR)

test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not slow"

# With the slow tests, and TensorFlow for those that prepare a TFDS data set.
test-all: $(VENV)/.prepare
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.test
	$(BIN)/mypy

# A marker a set of extras, so that each is installed once and again when pyproject.toml changes.
$(VENV)/.train $(VENV)/.test $(VENV)/.prepare: $(VENV)/.%: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "feather-jax needs Python 3.11 or later; give one as PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(if $(filter prepare,$*),prepare$(comma)test,$*)]"
	touch $@

comma := ,

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
