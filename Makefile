# `make demo` and `make test` work on a machine with nothing but Python 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The demo's environment holds what users install; the tests' one adds the tools and the peers to compare with.
DEMO_VENV ?= .demo-venv

# Installing builds the C kernels from these.
C_SOURCES = $(wildcard kernels/qlora_kernels/*.c kernels/qlora_kernels/*.h)

.PHONY: demo test lint bench soak docs clean

demo: $(DEMO_VENV)/ready
	$(DEMO_VENV)/bin/qlora-pipe demo

# The test processes fill the cores; more threads in each would only get in each other's way.
test: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/python -m pytest -n auto --dist loadgroup -m "not soak"

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/python benchmarks/cpu_nf4.py
	$(BIN)/python benchmarks/load.py

soak: $(VENV)/ready
	$(BIN)/python -m pytest -m soak -s

docs: $(VENV)/ready
	$(BIN)/python -m qlora_pipe.cli.document docs

$(DEMO_VENV)/ready: pyproject.toml constraints.txt $(C_SOURCES)
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/ready: pyproject.toml constraints.txt $(C_SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(DEMO_VENV) build dist *.egg-info kernels/qlora_kernels/*.so qlora-demo
