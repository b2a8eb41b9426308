# A thin wrapper: every target runs `python -m effkit ...` in .venv, which is made where it is missing.
# Paths are relative and no script in .venv/bin is called by name, so a folder with spaces in its name works.

PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -c requirements.lock
HAS_PIP := $(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip

.DEFAULT_GOAL := help
.PHONY: help tour test check lab notebooks bench clean

help:
	@echo 'make tour       install what is missing, then all eight paradigms in one table'
	@echo 'make lab        JupyterLab on your own copies of the notebooks, in work/'
	@echo 'make test       everything: lint, types, tests, exercises, notebooks'
	@echo 'make check      lint, types and the fast tests'
	@echo 'make notebooks  execute every notebook in place'
	@echo 'make bench      the benchmarks'
	@echo 'make clean      remove results and caches; .venv and work/ stay'

tour lab: .venv/.installed
	$(PY) -m effkit $@

test check notebooks bench: .venv/.installed-dev
	$(PY) -m effkit $@

# Stamps say which set is installed, so that a second run installs nothing.
.venv/.installed: pyproject.toml requirements.lock | $(PY)
	@$(HAS_PIP)
	$(PIP) -e .
	@touch $@

.venv/.installed-dev: pyproject.toml requirements.lock | $(PY)
	@$(HAS_PIP)
	$(PIP) -e '.[peers,dev]'
	@touch .venv/.installed $@

# Order-only above: a .venv made by hand, with a torch of your choice in it, is kept.
$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'effkit needs Python 3.11 or later, and $(PYTHON) is not: make PYTHON=/path/to/python3.12 ...'; exit 1; }
	$(PYTHON) -m venv --clear .venv || { rm -rf .venv; exit 1; }

clean:
	rm -rf results build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find effkit tests -name __pycache__ -prune -exec rm -rf {} +
