# SPDX-License-Identifier: MIT

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RESULTS = docs/topics/performance/results.json

.PHONY: help demo venv install lint types test check docs bench bench-quick chaos clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/.demo ## show what postage does, on a broker that it brings along
	@$(BIN)/python demos/application/tour.py

venv: $(VENV)/.made ## make the virtual environment (PYTHON=python3.12, VENV=.venv)

install: $(VENV)/.installed ## install the package, editable, and the tools

lint: install ## look for mistakes and bad style
	$(BIN)/ruff check .

types: install ## check the types
	$(BIN)/mypy

test: install ## run the tests (ARGS="-k words"), also on RabbitMQ if it is installed
	$(BIN)/python -m $(if $(ARGS),pytest $(ARGS),tests)

check: lint types test ## all that a change must pass

docs: $(VENV)/.docs ## build the documentation in docs/_build
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build

bench: $(VENV)/.bench ## measure all, with peers, and write it into the documentation (45 minutes)
	$(BIN)/python -m benchmarks --json $(RESULTS) $(ARGS); status=$$?; \
	$(BIN)/python -m benchmarks report $(RESULTS) && exit $$status

bench-quick: install ## measure what has a target: under two minutes (ARGS=...)
	$(BIN)/python -m benchmarks --quick $(ARGS)

clean: ## remove all that these targets made
	rm -rf $(VENV) build dist docs/_build *.egg-info .*_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

chaos: install ## break everything under load (ARGS=..., POSTAGE_CHAOS_SECONDS=60)
	POSTAGE_CHAOS_SECONDS=$${POSTAGE_CHAOS_SECONDS:-60} $(BIN)/python -m pytest tests/chaos $(ARGS)

$(VENV)/.made:
	@$(PYTHON) -m venv --clear $(VENV) || { \
		echo "$(PYTHON) cannot make a virtual environment."; \
		echo "On Debian and Ubuntu: apt-get install python3-venv"; \
		exit 1; \
	} >&2
	@touch $@

$(VENV)/.installed: $(VENV)/.made setup.py setup.cfg pyproject.toml
	$(BIN)/pip install --quiet --editable '.[test,lint]'
	@touch $@

$(VENV)/.demo: $(VENV)/.made setup.py setup.cfg pyproject.toml
	@echo "Installing postage in $(VENV), and nothing elsewhere."
	@$(BIN)/pip install -qq --disable-pip-version-check --editable .
	@echo
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[bench]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	@touch $@
