# A fresh clone needs only python3: every target creates the environment it uses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One process per core; torch itself stays on one thread per process so that they do not fight.
JOBS ?= 2
FUZZ_MINUTES ?= 60

.PHONY: env demo test check check-full audit bench docs clean

# torch is installed first and by its pin: any looser request lets pip choose a build with gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,eval,train]'
	touch $@

env: $(READY)

demo: $(READY)
	$(BIN)/headwise demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) -m 'not full'

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-full: check test audit
	$(BIN)/pytest -m full
	nice $(BIN)/python tests/hostile/long_run.py --minutes $(FUZZ_MINUTES)

# Known vulnerabilities of the pinned versions, as far as the service of pip-audit answers.
audit: $(READY)
	$(BIN)/python tests/hostile/audit.py

bench: $(READY)
	$(BIN)/python benchmarks/convert_speed.py

# Reference pages and tables that are made from the code.
docs: $(READY)
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build *.egg-info
