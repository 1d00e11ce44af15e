# `make test` and `make demo` set up everything they need, virtual environment included.
#   PIP_CONSTRAINT=file   pin versions (continuous integration does)
#   VENV=folder           where the virtual environment goes
#   DEMO=--check          options of the demonstration; this one fails where an expectation is missed

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUILD := build/cpp

.PHONY: test demo install cpp-test python-test lint clean

test: cpp-test python-test

# The package as a user gets it, plus what the tests need.
install: $(BIN)/python
	$(BIN)/pip install --quiet --upgrade --no-build-isolation ".[test]"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "pip>=24" "setuptools>=77" wheel
	$(BIN)/pip install --quiet "torch>=2.10" numpy "pybind11>=2.13" cmake ninja
	if command -v nvcc >/dev/null && [ "$$FLUX_CUDA" != OFF ]; then $(BIN)/pip install --quiet nvidia-cutlass==4.2.0.0; fi

# `pytest`, not `python -m pytest`: the installed package is tested, not the folder next door.
python-test: install
	$(BIN)/pytest python_tests

cpp-test: $(BIN)/python
	@test -e /usr/include/gtest/gtest.h || test -n "$$GTEST_ROOT" || \
	  (echo "GoogleTest is needed (apt: libgtest-dev); trying to install it"; apt-get update -qq && apt-get install -qq -y libgtest-dev)
	PATH="$$PWD/$(BIN):$$PATH" cmake -S . -B $(BUILD) -G Ninja -DFLUX_TESTS=ON -DFLUX_OPS=OFF -DFLUX_PYBIND=OFF -DFLUX_CUDA=OFF
	PATH="$$PWD/$(BIN):$$PATH" cmake --build $(BUILD)
	PATH="$$PWD/$(BIN):$$PATH" ctest --test-dir $(BUILD) --output-on-failure --parallel 2

demo: install
	$(BIN)/flux-ext demo $(DEMO)

lint: $(BIN)/python
	$(BIN)/pip install --quiet ruff mypy clang-format==19.1.7
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'cpp_tests/*.h' 'cpp_tests/*.cpp')

clean:
	rm -rf build dist *.egg-info $(VENV) flux_ext/*.so
