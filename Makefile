# Everything a newcomer types. `make tune` and `make test` do all the set-up.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: tune test test-all test-torch test-python lint types types-mypy types-pyright docs bench wheels-gpu clean

tune: .venv/installed
	$(BIN)/elsa-tune --device auto

test: .venv/installed-timm .venv/share/nvdisasm-12.8/nvdisasm
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

test-all: .venv/installed-timm .venv/share/nvdisasm-12.8/nvdisasm
	$(BIN)/python -m pytest -n 2 --dist worksteal

# What reaches into torch, on another version of it: make test-torch VERSION=2.9.1. Its build for GPUs, where there is no other, is gigabytes.
OF_TORCH := override operator dispatch attn_mask varlen states modules
test-torch:
	test -n "$(VERSION)" || { echo "say which: make test-torch VERSION=2.9.1"; exit 2; }
	$(PYTHON) -m venv .venv-torch/$(VERSION)
	.venv-torch/$(VERSION)/bin/python -m pip install --quiet torch==$(VERSION) --editable . pytest pytest-xdist
	.venv-torch/$(VERSION)/bin/python -m pytest -n 2 --dist worksteal $(OF_TORCH:%=tests/test_%.py)

# What differs between versions of Python: the package, its commands, a kernel and a call. With another one: make test-python PYTHON=python3.14
OF_PYTHON := package pages nouns cpp dispatch
test-python: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal $(OF_PYTHON:%=tests/test_%.py)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	for version in 311 312 313 314; do $(BIN)/ruff check --quiet --select E9,F,PLE --target-version py$$version . || exit 1; done

# With everybody's types as the oldest Python on Linux, by two checkers; as other Pythons and systems with Python's own types alone, and by the
# second with torch's. Each is a process of its own: make -j 2 types.
ELSEWHERE := linux-3.11 linux-3.12 linux-3.13 linux-3.14 win32-3.10 darwin-3.10
ALONE := --no-site-packages --ignore-missing-imports --allow-subclassing-any --allow-untyped-decorators --no-warn-return-any --no-warn-unused-ignores
types: types-mypy types-pyright types-pyright-Windows types-pyright-Darwin $(ELSEWHERE:%=types-%)

types-mypy: .venv/installed-dev
	$(BIN)/mypy

types-pyright: .venv/installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pyright --pythonpath $(BIN)/python --project tests/typed_user.json

types-pyright-%: .venv/installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python --pythonplatform $* --pythonversion 3.14 $$(find elsa_tune -name '*.py' -not -path '*/transformers/*')

types-%: .venv/installed-dev
	$(BIN)/mypy $(ALONE) --platform $(firstword $(subst -, ,$*)) --python-version $(lastword $(subst -, ,$*)) --cache-dir .mypy_cache/$*

# The site, in site/: a broken link or anchor is an error. Open site/index.html.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: .venv/installed-bench
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/masks.py
	$(BIN)/python benchmarks/calls.py
	$(BIN)/python benchmarks/models.py
	$(BIN)/python benchmarks/gradients.py
	$(BIN)/python examples/finetune.py --write

# What benchmarks/gpu.sh installs on a GPU machine that has no network.
wheels-gpu: .venv/installed
	$(BIN)/python benchmarks/_gpu_wheels.py download .wheels

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-%: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

# timm alone: it asks for torchvision, whose wheels on PyPI do not import beside a torch for CPUs, and its models use nothing of it.
.venv/installed-timm: .venv/installed-dev
	$(BIN)/python -m pip install --quiet --no-deps 'timm>=1.0.31,<2'
	touch $@

# NVIDIA's last disassembler that reads sm_50 to sm_72, from the wheel of an old Triton; without it those tests skip.
.venv/share/nvdisasm-12.8/nvdisasm: .venv/installed
	-$(BIN)/python -m pip download --quiet --no-deps --dest $(@D) triton==3.4.0
	-cd $(@D) && $(abspath $(BIN))/python -c "import glob, zipfile; w = glob.glob('*.whl')[0]; open('nvdisasm', 'wb').write(zipfile.ZipFile(w).read('triton/backends/nvidia/bin/nvdisasm'))" && chmod +x nvdisasm
	-rm -f $(@D)/*.whl

clean:
	rm -rf .venv .venv-torch build dist site *.egg-info
