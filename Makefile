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

# Tests that see the version of transformers; and with the oldest libraries, those that name the Hub or run a command too.
VERSIONED = $(shell grep -rlE --include='test_*.py' 'from transformers|import transformers' tests)
VERSIONED_oldest = $(shell grep -rlE --include='test_*.py' 'transformers|huggingface_hub|HubServer|from_pretrained|run_command' tests)

# These with other versions than the pinned ones: the oldest of each library that pyproject.toml allows (torch stays), a
# transformers between, the newest transformers. Other versions lie in a folder before the environment's own packages.
VERSIONS = oldest 5.12.0 newest
test-versions: $(addprefix test-transformers-,$(VERSIONS))

test-transformers-%: $(VENV)/installed
	rm -rf build/versions/$*
	$(BIN)/python -m pip install -q --upgrade --target build/versions/$* $(or $(PACKAGES_$*),transformers==$*)
	@if [ "$$(PYTHONPATH=build/versions/$* $(TRANSFORMERS))" = "$$($(TRANSFORMERS))" ]; then \
	  echo 'the environment has this release: make test ran its tests'; \
	else \
	  PYTHONPATH=build/versions/$* $(BIN)/python -m pytest -q $(or $(VERSIONED_$*),$(VERSIONED)); \
	fi

TRANSFORMERS = $(BIN)/python -c 'import transformers; print(transformers.__version__)'
PACKAGES_newest = 'transformers<6'
PACKAGES_oldest = $(shell sed -nE '/^dependencies/,/^]/s/^ *"([a-z-]+)>=([0-9.]+).*/\1==\2/p' pyproject.toml | grep -vE '^(torch|hqq)=')

clean:
	rm -rf $(VENV) build out
