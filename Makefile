# Two commands: `make demo` and `make test`, and `make test-all` for the long way. Each sets up its own environment in
# .venv from nothing but Python 3.11 to 3.13 and pip. Another interpreter: `make test PYTHON=python3.12`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
WORKERS ?= 2

.PHONY: demo test test-all lint clean

demo: .venv/ready
	$(BIN)/fedhyper compare --preset demo

# Each file in one process, so that tests of it share what they compile; --dist loadgroup, which could say this test by
# test, groups nothing with pytest 9.2 and pytest-xdist 3.8.
test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# The full product as well: every method with every strategy, dtype and sweep, of which `make test` runs a sum that proves
# the same (tests/conftest.py).
test-all: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --all

lint: .venv/ready
	$(BIN)/ruff check --fix .

.venv/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.13 found: install one, or say which: make test PYTHON=/path/to/python3.12"; exit 1; }
	@# Debian ships Python without ensurepip; virtualenv brings its own pip where venv cannot make one.
	$(PYTHON) -m venv --clear .venv 2>/dev/null || { rm -rf .venv .bootstrap \
		&& $(PYTHON) -m pip install --quiet --target .bootstrap virtualenv \
		&& PYTHONPATH=.bootstrap $(PYTHON) -m virtualenv --quiet .venv; }
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv .bootstrap .pytest_cache .ruff_cache .hypothesis
