# Each target makes the virtual environment it needs; nothing but Python 3.11 and pip is asked of the machine.
#   make demo        prune two networks trained on handwritten digits, minimize them, write out/
#   make demo-cycle  prune, minimize and train one of them in cycles, with a picture
#   make test        the tests that are quick                        (under 10 minutes on two cores)
#   make test-all    those, and the slow ones: torchvision and timm  (.venv-zoo, several GB)
#   make fuzz        20,000 models drawn at random, resumable; ARGS="--seed 7 --count 1000"
#   make mutants     breaks one line at a time and shows that the tests notice  (an hour)
#   make check       lint, types, test, wheel
#   make bench       the same masked models through other tools, table and plot (hours; ARGS narrow it)
#   make docs        the site, under out/site
# Another torch:     make test TORCH="torch==2.6.0"        Another Python: make test PYTHON=python3.12

PYTHON ?= python3.11
JOBS   ?= 2
# Neighbours stay in one process, where they share what torch.export made; who is done first takes from the other's end.
PYTEST  = -m pytest -n $(JOBS) --dist worksteal
TORCH  ?= torch==2.13.0
# torchvision is built against one torch, so the slow tests and the benchmarks have an environment of their own.
TORCH_ZOO ?= torch==2.14.1 torchvision==0.29.1

VENV := .venv
ZOO  := .venv-zoo
DOCS := .venv-docs
ARGS ?=
SETUP := setup.cfg pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help demo demo-cycle test test-all fuzz mutants coverage check lint format types wheel bench docs clean

help:
	@sed -n 's/^#   make /make /p' Makefile

demo: $(VENV)/demo.stamp
	$(VENV)/bin/python -m benchmarks.demo $(ARGS)

demo-cycle: $(VENV)/demo.stamp
	$(VENV)/bin/python -m benchmarks.demo.cycle $(ARGS)

test: $(VENV)/test.stamp
	$(VENV)/bin/python $(PYTEST) $(ARGS)

fuzz: $(VENV)/test.stamp
	$(VENV)/bin/python -m benchmarks.fuzz $(ARGS)

test-all: $(ZOO)/zoo.stamp
	$(ZOO)/bin/python $(PYTEST) -m "" $(ARGS)

mutants: $(VENV)/test.stamp
	$(VENV)/bin/python -m benchmarks.mutants $(ARGS)

coverage: $(VENV)/test.stamp
	$(VENV)/bin/python $(PYTEST) --cov $(ARGS)

check: lint types test wheel

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/test.stamp
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# srfx/passes is a link to passes/, so one package name covers both.
types: $(VENV)/test.stamp
	$(VENV)/bin/mypy srfx

wheel: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest tests/test_packaging.py

bench: $(ZOO)/bench.stamp
	$(ZOO)/bin/python -m benchmarks.peers $(ARGS)

docs: $(DOCS)/docs.stamp
	$(DOCS)/bin/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(ZOO) $(DOCS) build dist out *.egg-info .coverage htmlcov .hypothesis .mypy_cache .pytest_cache .ruff_cache

# ensurepip is not part of every Python; a pip outside can fill an environment that has none.
%/pip.stamp:
	$(PYTHON) -m venv --clear --without-pip $*
	$(PYTHON) -m pip --python $*/bin/python install --quiet pip
	@touch $@

$(VENV)/torch.stamp: $(VENV)/pip.stamp
	$(VENV)/bin/pip install --quiet $(TORCH)
	@touch $@

$(VENV)/test.stamp: $(VENV)/torch.stamp $(SETUP)
	$(VENV)/bin/pip install --quiet -e ".[test,lint]"
	@touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp $(SETUP)
	$(VENV)/bin/pip install --quiet -e ".[demo]"
	@touch $@

$(ZOO)/zoo.stamp: $(ZOO)/pip.stamp $(SETUP)
	$(ZOO)/bin/pip install --quiet $(TORCH_ZOO)
	$(ZOO)/bin/pip install --quiet -e ".[test,zoo]"
	@touch $@

# The pages are made from the sources as text: no torch is needed.
$(DOCS)/docs.stamp: $(DOCS)/pip.stamp $(SETUP)
	$(DOCS)/bin/pip install --quiet "mkdocs-material>=9.5" "mkdocstrings[python]>=0.26" ruff
	@touch $@

$(ZOO)/bench.stamp: $(ZOO)/zoo.stamp
	$(ZOO)/bin/pip install --quiet -e ".[bench,peers,report]"
	@touch $@
