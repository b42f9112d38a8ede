# `make demo` and `make test` do everything on a machine with Python, make, git and a C/C++ compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c .ci/constraints.txt
SAY_BUILD := echo "setting up $(VENV): the first time this compiles llama.cpp (llama-cpp-python), some 10 minutes on two cores"

.PHONY: demo test lint format bench browser optimum clean help

help:
	@echo "make demo    set up and run the main job on the embedded model, offline: export, run, compare"
	@echo "make test    set up and pass the tests"
	@echo "make lint    ruff and mypy"
	@echo "make format  rewrite the sources in the project's style"
	@echo "make browser install what the web page needs from npm"
	@echo "make optimum run our ONNX folders with optimum, in a separate environment"
	@echo "make bench   encoding speed against the C quantizer"
	@echo "make clean   remove the environment and caches"

demo: $(VENV)/.run
	$(BIN)/smolexport demo

test: $(VENV)/.dev browser
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

# What the web page and its tests need from npm; without npm those tests skip, saying so.
browser:
	@if command -v npm >/dev/null; then $(MAKE) -s examples/browser/node_modules/.installed; \
	else echo "npm is not here: the tests of the web page will be skipped"; fi

examples/browser/node_modules/.installed: examples/browser/package-lock.json
	@cd examples/browser && npm ci --no-audit --no-fund --loglevel=error && touch $(notdir $(@D))/.installed \
	  || echo "npm ci failed: the tests of the web page will be skipped"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Its environment is $(VENV)-optimum.  With SMOLEXPORT_OPTIMUM_PYTHON naming the Python in it, `pytest` runs these tests
# with the others, and tests.benchmarks.onnx_decode measures optimum's graph.
optimum: $(VENV)/.dev $(VENV)-optimum/.made
	SMOLEXPORT_OPTIMUM_PYTHON=$(abspath $(VENV)-optimum/bin/python) \
	  $(BIN)/python -m pytest tests/converters/test_onnx_optimum.py

$(VENV)-optimum/.made: .ci/optimum.txt
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check -q -r $<
	@touch $@

bench: $(VENV)/.dev
	$(BIN)/python -m tests.benchmarks.quant_kernels

$(VENV)/.run: pyproject.toml .ci/constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(SAY_BUILD)
	$(PIP) -e '.[all]'
	@touch $@

$(VENV)/.dev: pyproject.toml .ci/constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(SAY_BUILD)
	$(PIP) -e '.[all,dev]'
	@touch $@ $(VENV)/.run

clean:
	rm -rf examples/browser/node_modules $(VENV) $(VENV)-optimum .pytest_cache .mypy_cache .ruff_cache .hypothesis
