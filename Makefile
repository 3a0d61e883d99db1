# make demo: convert the example model, verify it, generate, compare.   make test: the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard CMakeLists.txt formats/native/* loader/native/* converter/native/*)

.PHONY: demo test test-versions test-native fuzz faults lint clean

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

test: $(VENV)/installed
	$(BIN)/python -m pytest -q

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# The native code's own tests under the address and undefined behaviour sanitizers.
test-native:
	cmake -S . -B build/sanitize -DMOE_BUILD_TESTS=ON -DMOE_SANITIZE=ON
	cmake --build build/sanitize --target test_kernels moe_solver_test
	build/sanitize/loader/native/test_kernels
	build/sanitize/converter/native/moe_solver_test

# The parsers under a coverage-guided fuzzer for SECONDS in all: what is found is kept in tests/fuzz/found.
SECONDS ?= 600
fuzz: $(VENV)/installed
	$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS)

# Conversions under injected faults for SECONDS in all: kills, power losses, damaged bytes, failing calls.
faults: $(VENV)/installed
	$(BIN)/python tests/faults/run.py --seconds $(SECONDS)

# Tests that see the version of a library: those that name transformers, the Hub or a model, or run a command.
VERSIONED = $(shell grep -lE 'transformers|huggingface_hub|HubServer|from_pretrained|run_command' tests/test_*.py)

# These with other versions than the pinned ones: the oldest of each library that pyproject.toml allows (torch stays), a
# transformers between, the newest transformers. About six minutes of processor time each.
test-versions: $(addprefix test-transformers-,oldest 5.12.0 newest)

test-transformers-%:
	$(PYTHON) -m venv .venv-$*
	grep -v -E '^(transformers|huggingface-hub|accelerate)=' constraints.txt > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install -q -c .venv-$*/constraints.txt -e '.[dev]' \
	  '$(if $(filter newest,$*),transformers<6,transformers==$*)'
	.venv-$*/bin/python -m pytest -q $(VERSIONED)

test-transformers-oldest:
	$(PYTHON) -m venv .venv-oldest
	sed -nE '/^dependencies/,/^]/s/^ *"([a-z-]+)>=([0-9.]+).*/\1==\2/p' pyproject.toml | grep -v '^torch=' > .venv-oldest/constraints.txt
	grep -E '^(torch|ruff|mypy|pyte|hypothesis|peft|atheris)=' constraints.txt >> .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install -q -c .venv-oldest/constraints.txt -e '.[dev]'
	.venv-oldest/bin/python -m pytest -q $(VERSIONED)

clean:
	rm -rf $(VENV) .venv-* build out
