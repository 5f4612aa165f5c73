# Two commands on a bare machine with Python 3.11+ and make:
#   make demo   trains a small language model in three lanes on real text and draws who learns fastest
#   make test   lints, type-checks and tests
# Both make .venv, install what they need into it, and reuse it the next time.
#   make test-tunix   trains Tunix's Llama 3 and Qwen 3 with cggr.jax, in .venv-tunix

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TUNIX := .venv-tunix
# One thread a test worker: two workers that each use every core are slower than either alone.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8

.PHONY: demo test test-tunix lint clean

demo: $(VENV)/demo.stamp
	$(BIN)/cggr race --budget 35s

test: lint
	$(PYTEST)

# An environment of its own: tunix wants an older safetensors than the rest, and no torch.
test-tunix: $(TUNIX)/test.stamp
	OMP_NUM_THREADS=1 JAX_PLATFORMS=cpu $(TUNIX)/bin/python -m pytest tests/test_tunix.py

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/made.stamp $(TUNIX)/made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "CGGR needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(@D)
	@touch $@

$(VENV)/demo.stamp: requirements/demo.txt requirements/constraints.txt pyproject.toml | $(VENV)/made.stamp
	$(BIN)/python -m pip install -r requirements/demo.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/test.stamp: requirements/test.txt $(VENV)/demo.stamp
	$(BIN)/python -m pip install -r requirements/test.txt
	@touch $@

# Without dependencies: google-tunix asks for many packages that its models never import.
$(TUNIX)/test.stamp: requirements/tunix.txt pyproject.toml | $(TUNIX)/made.stamp
	$(TUNIX)/bin/python -m pip install --no-deps -r requirements/tunix.txt
	$(TUNIX)/bin/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

clean:
	rm -rf $(VENV) $(TUNIX) build dist *.egg-info
