# Two commands on a bare machine with Python 3.11+ and make:
#   make demo   trains a small language model in three lanes on real text and draws who learns fastest
#   make test   lints, type-checks and tests
# Both make .venv, install what they need into it, and reuse it the next time.
#   make docs   builds the documentation into site/, in .venv too
#   make test-tunix   trains Tunix's Llama 3 and Qwen 3 with cggr.jax, in .venv-tunix
# On a machine with an NVIDIA GPU:
#   make bench        measures kernels and losses; BENCH="statistics --quick" for a part of it
#   make test-gpu     the complete suite and compute-sanitizer, with the packages of PYTHON

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TUNIX := .venv-tunix
# One thread a test worker: two workers that each use every core are slower than either alone.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8

# Without torch's cache of memory, where what lies beyond an array is rarely a fault.
SANITIZE := PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1

.PHONY: demo test docs test-tunix test-gpu bench lint clean

demo: $(VENV)/demo.stamp
	$(BIN)/cggr race --budget 35s

test: lint
	$(PYTEST)

docs: $(VENV)/docs.stamp
	$(BIN)/python -m mkdocs build --strict

# An environment of its own: tunix wants an older safetensors than the rest, and no torch.
test-tunix: $(TUNIX)/test.stamp
	OMP_NUM_THREADS=1 JAX_PLATFORMS=cpu $(TUNIX)/bin/python -m pytest tests/test_tunix.py

bench: $(VENV)/bench.stamp
	$(BIN)/cggr bench $(BENCH)

# Without an environment of its own: torch, jax and triton are those that the machine's driver suits.
test-gpu:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
		|| { echo "make test-gpu needs a PYTHON whose torch sees a CUDA device" >&2; exit 1; }
	OMP_NUM_THREADS=1 XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) -m pytest -n logical --maxprocesses 12
	@command -v compute-sanitizer >/dev/null \
		|| { echo "compute-sanitizer is not on PATH: memcheck and racecheck are skipped"; exit 0; }; \
	for tool in memcheck racecheck; do \
		echo "compute-sanitizer --tool $$tool"; \
		$(SANITIZE) --tool $$tool $(PYTHON) -m pytest -q -m "not large" \
			tests/test_kernels_cuda.py tests/test_kernels_attention.py || exit 1; \
	done

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

$(VENV)/docs.stamp: requirements/docs.txt $(VENV)/demo.stamp
	$(BIN)/python -m pip install -r requirements/docs.txt
	@touch $@

$(VENV)/test.stamp: requirements/test.txt requirements/docs.txt $(VENV)/demo.stamp
	$(BIN)/python -m pip install -r requirements/test.txt
	@touch $@

$(VENV)/bench.stamp: requirements/constraints.txt $(VENV)/demo.stamp
	$(BIN)/python -m pip install -c requirements/constraints.txt --no-build-isolation -e '.[benchmark]'
	@touch $@

# Without dependencies: google-tunix asks for many packages that its models never import.
$(TUNIX)/test.stamp: requirements/tunix.txt pyproject.toml | $(TUNIX)/made.stamp
	$(TUNIX)/bin/python -m pip install --no-deps -r requirements/tunix.txt
	$(TUNIX)/bin/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

clean:
	rm -rf $(VENV) $(TUNIX) build dist site *.egg-info
