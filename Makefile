# `make demo` and `make test` do everything on a machine with Python, make, git and a C/C++ compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c .ci/constraints.txt
SAY_BUILD := echo "setting up $(VENV): the first time this compiles llama.cpp (llama-cpp-python), some 10 minutes on two cores"

.PHONY: demo test lint format bench clean help

help:
	@echo "make demo    set up and run the main job on the embedded model, offline: export, play, compare"
	@echo "make test    set up and pass the tests"
	@echo "make lint    ruff and mypy"
	@echo "make format  rewrite the sources in the project's style"
	@echo "make bench   encoding speed against the C quantizer"
	@echo "make clean   remove the environment and caches"

demo: $(VENV)/.run
	$(BIN)/smolexport demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

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
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
