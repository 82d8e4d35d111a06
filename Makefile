# Everything from nothing: `make train` and `make test` make .venv, install into it, and run.

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/digits
BIN := $(VENV)/bin

.PHONY: train demo test test-slow test-all lint types clean

train: $(VENV)/.train
	$(BIN)/python -m train.main --config configs/digits.py --workdir $(WORKDIR)

# The walk of docs/your-own-pictures.md, on scikit-learn's digits as pictures: from scratch with five
# classes, from there to all ten at 80 and at 95 %, evaluated, exported, compiled.
DEMO ?= runs/demo
SMALL := --config configs/folder.py:resnet8 --config.data.path=$(DEMO)/pictures \
  --config.data.image_size=8 --config.data.crop_padding=1 --config.data.flip=False \
  --config.data.eval_fraction=0.2 --config.batch_size=32 --config.eval_every_epochs=10.0

demo: $(VENV)/.train
	$(BIN)/python examples/pictures.py digits $(DEMO)/pictures
	$(BIN)/python -m train.main $(SMALL) --config.epochs=20.0 --config.sparsity=0.8 \
	  --config.data.classes="('0', '1', '2', '3', '4')" --workdir $(DEMO)/five
	for sparsity in 0.8 0.95; do \
	  $(BIN)/python -m train.main $(SMALL) --config.epochs=20.0 --config.sparsity=$$sparsity \
	    --config.init_from=$(DEMO)/five --workdir $(DEMO)/ten-$$sparsity || exit; \
	done
	$(BIN)/python -m train.evaluate --model $(DEMO)/ten-0.95/model.npz
	$(BIN)/python -m train.export --model $(DEMO)/ten-0.95/model.npz --out $(DEMO)/exported
	$(BIN)/python examples/classify.py $(DEMO)/ten-0.95/model.npz $(DEMO)/pictures/7/00007.png

# Two processes, each of which has its own half; who is done first takes over from the other.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test: $(VENV)/.test
	$(PYTEST) -m "not slow"

# The slow ones, and TensorFlow for those that prepare a TFDS data set.
test-all: test test-slow

test-slow: $(VENV)/.prepare
	$(PYTEST) -m slow

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
