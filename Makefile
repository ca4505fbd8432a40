# Two commands set up a fresh machine: `make demo` runs the quickstart, `make test` the checks.
# PYTHON names the interpreter that makes .venv; without it the first fitting one is taken.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

export OMP_NUM_THREADS ?= 1

.PHONY: help demo install install-dev lint test slow test-slow clean

help:
	@echo "make demo      set up .venv and run the quickstart into runs/quickstart"
	@echo "make test      set up .venv and run ruff, mypy and the quick tests"
	@echo "make slow      the tests that train"
	@echo "make lint      ruff and mypy only"
	@echo "make install   set up .venv only"
	@echo "make clean     remove .venv and tool caches"

# All cores for the demo: the limit above is for test workers that run side by side.
demo: install
	env -u OMP_NUM_THREADS $(BIN)/openblip quickstart --out runs/quickstart

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# A stamp is written last, so an interrupted set-up is taken up again by the next call.
$(VENV)/.created:
	@for candidate in "$(PYTHON)" python3.13 python3.12 python3.11; do \
	  if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	    "$$candidate" -m venv $(VENV) || { \
	      echo "openblip: $$candidate cannot make a virtual environment; on Debian and Ubuntu, install python3-venv." >&2; exit 1; }; \
	    touch $@; exit 0; \
	  fi; \
	done; \
	found=$$("$(PYTHON)" --version 2>&1) || found="no working $(PYTHON)"; \
	echo "openblip needs Python 3.11, 3.12 or 3.13, and found $$found; install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; \
	exit 1

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP_INSTALL) --editable '.[serve]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.installed

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict openblip

test: lint
	$(BIN)/pytest -n 2 --dist loadgroup -m "not slow and not gpu"

slow test-slow: install-dev
	$(BIN)/pytest -m "slow and not gpu"

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
