# Two commands for a fresh machine with Python, pip and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast test-slow test-long lint types format browser demo-teacher clean

demo: $(VENV)/.installed
	$(BIN)/fdkit demo --output runs/demo --overwrite

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow and not distributed and not long"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto -m "slow and not long"

test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto -m long --timeout 1800

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Debian's Chromium, in which the tests open report pages; without it, or where it cannot be had, those tests skip.
browser:
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; }

# Pretrains the embedded teacher again (about an hour on two cores) and puts it into the package.
demo-teacher: $(VENV)/.installed
	$(BIN)/python benchmarks/make_demo_teacher.py

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
