# Two commands on a bare machine with Python 3.11+ and make:
#   make demo   trains a small language model in three lanes on real text and draws who learns fastest
#   make test   lints, type-checks and tests
# Both make .venv, install what they need into it, and reuse it the next time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a test worker: two workers that each use every core are slower than either alone.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8

.PHONY: demo test lint clean

demo: $(VENV)/demo.stamp
	$(BIN)/cggr race --budget 35s

test: lint
	$(PYTEST)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "CGGR needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/demo.stamp: requirements/demo.txt requirements/constraints.txt pyproject.toml | $(VENV)/made.stamp
	$(BIN)/python -m pip install -r requirements/demo.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/test.stamp: requirements/test.txt $(VENV)/demo.stamp
	$(BIN)/python -m pip install -r requirements/test.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
