# make demo   set everything up and run the main job
# make test   set everything up and pass the tests
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# CPU unless told otherwise: `make demo JAX_PLATFORMS=cuda`. The test environment holds
# plugins for accelerators this machine may lack, so JAX must not choose by itself.
JAX_PLATFORMS ?= cpu
export JAX_PLATFORMS

# Most of a test's time is compilation, on one core. Two jobs want 10 GB of memory.
TEST_JOBS ?= 2

.PHONY: demo test test-slow lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.base
	$(BIN)/python -m experiments.generate $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder \
	  -m "not slow and not gpu and not tpu" $(ARGS)

# Programs as users compile them: these tests run for long.
test-slow: $(VENV)/.test
	XLA_FLAGS= JAX_DISABLE_MOST_OPTIMIZATIONS=0 \
	$(BIN)/python -m pytest -m "slow" -o timeout=1800 $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info

# Stamps: a second call installs nothing; a changed pyproject.toml installs again.
$(VENV)/.base: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV) ..."
	$(PIP) install -e .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@echo "Installing test tools and the TPU and CUDA compilers (1 GB) ..."
	$(PIP) install -e ".[test]"
	@touch $@

$(BIN)/python:
	@python=$${PYTHON:-$$(sh tools/find_python.sh)} && [ -n "$$python" ] && \
	echo "Creating $(VENV) with $$python" && "$$python" -m venv $(VENV)
