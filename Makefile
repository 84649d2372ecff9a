# Each target also works by hand, in an environment of your own:
#   pip install -e .           and  python train.py
#   pip install -e '.[dev]'    and  pytest
#   pip install -e '.[docs]'   and  mkdocs build
#
# Variables, as in `make train ARGS="loss=cross_entropy"`:
#   ARGS         passed on to train.py or pytest
#   PYTHON       interpreter the environment is made with
#   VENV         directory of the environment; an existing one is used as it is
#   EXTRAS       extras to install with the package for `make train`, as in EXTRAS=gpu
#   JOBS         test processes
#   TORCH_INDEX  package index to take torch from beside pip's own; `none` for no other. By default
#                PyTorch's CPU index on a Linux machine without nvidia-smi, if it can be reached.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?=
JOBS ?= 2
ARGS ?=
TORCH_INDEX ?=
CPU_INDEX := https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.draftopd-run$(if $(EXTRAS),-$(EXTRAS))
DEV_STAMP := $(VENV)/.draftopd-dev
DOCS_STAMP := $(VENV)/.draftopd-docs

.DEFAULT_GOAL := help
# A half-made environment must not count as one.
.DELETE_ON_ERROR:
.PHONY: help train test lint typecheck format audit docs figures fuzz clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(RUN_STAMP) ## Install into .venv and train on the bundled target
	$(BIN)/python train.py $(ARGS)

# One torch thread a process: more would compete for the cores.
test: $(DEV_STAMP) ## Install with the dev extra, run all tests, list the slowest 30
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --durations=30 $(ARGS)

lint: $(DEV_STAMP) ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@$(MAKE) --no-print-directory typecheck

typecheck: $(DEV_STAMP) ## Check types only
	$(BIN)/mypy

format: $(DEV_STAMP) ## Sort imports, apply safe fixes and format
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format

# pip-audit has an environment of its own: its dependencies are none of ours.
audit: $(DEV_STAMP) $(VENV)/audit/bin/pip-audit ## Look up known vulnerabilities of what is installed (pip-audit)
	$(BIN)/python .ci/audit.py $(VENV)/audit/bin/pip-audit

$(VENV)/audit/bin/pip-audit:
	$(BIN)/python -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --disable-pip-version-check --quiet pip-audit

fuzz: $(DEV_STAMP) ## Fuzz what reads files and answers from elsewhere: ARGS="--seconds 600"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(ARGS)

figures: $(DEV_STAMP) ## Train, test and draw the main figure and table from scratch (benchmarks/studies/plateau.py)
	$(BIN)/python -m benchmarks.studies.plateau --from-scratch $(ARGS)

# The variable silences a notice of the theme's about other programs.
docs: $(DOCS_STAMP) ## Install with the docs extra and build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean: ## Remove caches and build outputs; runs and the environment stay
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("draftopd needs Python 3.10 or newer, this is " + sys.version.split()[0] + ": pass PYTHON=python3.12 or the like." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): pyproject.toml | $(BIN)/python
	$(call install,.$(if $(EXTRAS),[$(EXTRAS)]))

$(DEV_STAMP): pyproject.toml | $(BIN)/python
	$(call install,.[dev])
	@touch $(VENV)/.draftopd-run

$(DOCS_STAMP): pyproject.toml | $(BIN)/python
	$(call install,.[docs])

# An index that does not answer costs pip eight seconds and more for every package, so it is probed first.
define install
@index='$(TORCH_INDEX)'; \
if [ -z "$$index" ] && [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then \
	if $(BIN)/python -c 'import urllib.request as r; r.urlopen("$(CPU_INDEX)/torch/", timeout=5)' 2>/dev/null; \
	then index='$(CPU_INDEX)'; \
	else echo "PyTorch's CPU index cannot be reached; pip's own sources decide which build of torch is installed."; fi; \
fi; \
[ "$$index" = none ] && index=''; \
set -x; \
$(BIN)/python -m pip install --disable-pip-version-check $${index:+--extra-index-url "$$index"} -e '$(1)'
@touch $@
endef
