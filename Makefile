# make demo: convert the example model, verify it, generate, compare.   make test: the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard CMakeLists.txt formats/native/* loader/native/* converter/native/*)

.PHONY: demo test test-versions test-native lint clean

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

# The loader's tests on other versions of transformers than the pinned one.
test-versions:
	for version in 5.0.0 5.12.1 5; do \
	  sh -c 'set -e; venv=.venv-transformers-$$0; $(PYTHON) -m venv $$venv; \
	    grep -v -e ^transformers -e ^huggingface -e ^accelerate constraints.txt > $$venv/constraints.txt; \
	    $$venv/bin/python -m pip install -q -c $$venv/constraints.txt "transformers~=$$0" -e ".[dev]"; \
	    $$venv/bin/python -m pytest -q tests/test_loader_*.py' $$version || exit 1; \
	done

clean:
	rm -rf $(VENV) .venv-transformers-* build out
