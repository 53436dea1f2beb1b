# Two commands do everything: `make quickstart` and `make test`. PYTHON chooses the interpreter of .venv/.
PYTHON ?= python3
VENV := .venv/bin

.DEFAULT_GOAL := setup
.NOTPARALLEL:
.PHONY: help setup setup-dev quickstart test test-cluster test-site lint types bench soak clean

help:  ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: python  ## prepare .venv/: Helios and real vLLM (the CPU build where there is no GPU)
	@$(PYTHON) scripts/setup.py quickstart

setup-dev: python
	@$(PYTHON) scripts/setup.py dev

quickstart: setup  ## publish, mount, serve and ask a model (MODEL=directory or org/name, HELIOS_ONCE=1)
	@exec $(VENV)/helios quickstart

test: setup-dev  ## everything CI runs: lint, types, the wheels, all tests
	@exec $(VENV)/python scripts/test.py

test-cluster: setup-dev  ## against a real Kubernetes API server, whose programs KUBEBUILDER_ASSETS has
	$(VENV)/python -m pytest tests/cluster

test-site: setup-dev  ## against a real cluster with the chart in it; tests/site/conftest.py says what is needed
	$(VENV)/python -m pytest -p no:xdist tests/site

lint: setup-dev  ## ruff
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

types: setup-dev  ## mypy, strict
	$(VENV)/mypy

bench: setup-dev  ## side-by-side measurements; results under benchmarks/
	@exec $(VENV)/python -m benchmarks

soak: setup-dev  ## many rounds of killing, restarting and verifying (MINUTES=10, KILLS=100 of registries, 200 of a mount's worker); every crash point; models; faults behind a router; requests nobody would send
	@$(VENV)/python scripts/soak.py
	@$(VENV)/python scripts/soak.py --kills 200
	@$(VENV)/python scripts/soak.py --crashes
	@$(VENV)/python scripts/soak.py --models 200
	@$(VENV)/python scripts/soak.py --registry $(or $(KILLS),100)
	@$(VENV)/python scripts/soak.py --router $(or $(MINUTES),10)
	@exec $(VENV)/python scripts/soak.py --fuzz 200

clean:  ## remove what the commands above made in this directory (not HELIOS_HOME)
	rm -rf .venv .venvs .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

.PHONY: python
python:
	@command -v $(PYTHON) >/dev/null || sh scripts/install-python.sh
