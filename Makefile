# Every target sets up its own .venv. `make demo` is the place to start.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := runs/demo

.PHONY: setup demo demo-vae test lint types bench clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/vidit scenes $(DEMO)/data --clips 6000 --overwrite
	$(BIN)/vidit train configs.demo run_dir=$(DEMO)
	$(BIN)/vidit evaluate $(DEMO)
	$(BIN)/vidit report $(DEMO)

demo-vae: $(STAMP)
	$(BIN)/vidit scenes runs/demo-vae/data --clips 4000 --odds 1 1 1 --overwrite
	$(BIN)/vidit train configs.demo:vae
	$(BIN)/python -m benchmarks.vae_record runs/demo-vae configs/weights/demo_vae

# Two processes, a thread each: much of the suite waits for processes that it has started. What Python compiles is
# kept for the next of them, whatever the environment says.
test: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks.loop_overhead
	$(BIN)/python -m benchmarks.cpu_attention

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
