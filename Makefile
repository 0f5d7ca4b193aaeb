# Every target sets up .venv by itself; a change of pyproject.toml sets it up again.
#   make demo                      the main job on embedded assets
#   make test                      all tests, with coverage; ARGS="-k bandit" picks some
#   make lint | format | clean
# Another interpreter: make test PYTHON=python3.12. Another torch build: make demo TORCH="torch==2.13.0 --index-url ..."

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DELETE_ON_ERROR:
.PHONY: demo test lint format clean

demo: .venv/.installed
	$(BIN)/dht demo --overwrite $(ARGS)

test: .venv/.installed-test
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered $(ARGS)

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist htmlcov .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dht needs Python 3.11 or newer, but $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "setting up .venv (torch is a large download) ..."
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) --editable .
	@touch $@

.venv/.installed-test: .venv/.installed
	@echo "adding the test tools to .venv ..."
	$(PIP) --editable '.[test]'
	@touch $@
