# Needs python3 and a C++ compiler. The first target to run sets up a virtual environment in .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out

.PHONY: train study test lint format bench clean

train: $(VENV)/ready
	$(BIN)/python -m benchmarks.train_digits --out $(OUT)
	$(BIN)/python -m benchmarks.study_digits --out $(OUT)

study: $(VENV)/ready
	$(BIN)/python -m benchmarks.study_digits --out $(OUT)

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*/*.h csrc/*/*.cpp
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*/*.h csrc/*/*.cpp

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks

# torch first: the build compiles against the one that it finds.
$(VENV)/ready: pyproject.toml setup.py $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[dev]"
	@$(BIN)/python -m dracopt_ext
	@touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info dracopt_ext/_C*.so dracopt_ext/_build_info.py
