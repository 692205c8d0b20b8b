# `make demo` and `make test` need only Python, make and a C++ compiler: each sets up .venv itself.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
SOURCES := $(shell find src -type f -not -path '*/__pycache__/*' -not -name '*.so') CMakeLists.txt pyproject.toml constraints.txt README.md

.PHONY: demo test lint smoke test-wheel test-sanitized bench results clean

demo: $(VENV)/.installed
	$(BIN)/hyperadam demo

test: lint
	$(BIN)/python -m pytest --numprocesses=logical --dist=worksteal --cov --cov-report=
	$(BIN)/coverage report
	for part in rule optim weights; do \
		$(BIN)/coverage report --fail-under=95 --include="*/$$part/*" >/dev/null || exit 1; \
	done

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every task under every optimizer that the machine has the memory for (with 24 GB the bundled weights
# up to ResNet-18), some minutes; `make test` has a part of it.
smoke: $(VENV)/.installed-dev
	HYPERADAM_SMOKE=all $(BIN)/python -m pytest -q tests/evaluation/test_smoke.py

# The wheel in an environment of its own, away from the source and from the network.
test-wheel: $(VENV)/.installed-dev
	PYTHON=$(PYTHON) BUILD=$(abspath $(BIN))/python scripts/test-wheel

# The CPU kernel's tests under the address and undefined-behaviour sanitizers: some minutes.
test-sanitized: $(VENV)/.installed-dev
	PYTHON=$(abspath $(BIN))/python scripts/test-sanitized

# Times and memory, for benchmarks/results: an hour on an idle machine with 24 GB. DATA_DIR is a folder
# with MNIST's parquet files.
bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks all --out benchmarks/results --data-dir $(DATA_DIR)

# The committed results: hours for each suite; interrupted, it goes on. See scripts/results for
# DATA_DIR and OFFICIAL.
SUITES ?= digits ablations paper-100 paper-2000
results: $(VENV)/.installed-dev
	for suite in $(SUITES); do \
		PATH=$(abspath $(BIN)):$$PATH scripts/results $$suite || exit 1; \
	done

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SOURCES) | $(VENV)/bin/python
	$(PIP_INSTALL) .
	touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(VENV)/bin/python
	$(PIP_INSTALL) '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis
