# Everything a newcomer types. `make tune` and `make test` do all the set-up.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: tune test lint types bench clean

tune: .venv/installed
	$(BIN)/elsa-tune --device auto

test: .venv/installed-dev
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

bench: .venv/installed-bench
	$(BIN)/python benchmarks/cpu.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-%: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
