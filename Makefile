# make demo    set up .venv and solve a few problems, small slice drafting, large slice verifying
# make test    set up .venv and run the tests; ARGS is passed to pytest: make test ARGS="-m 'not slow'"
# make lint    ruff, its formatter as a check, mypy; make format rewrites
#
# Needs Python 3.11 or newer with venv, and make. The first call takes some minutes, later calls
# install nothing until pyproject.toml, setup.py or constraints.txt change.
#
# WORKERS    processes that run tests side by side; 0 for none but pytest's own
# PYTHON     the interpreter .venv is made from
# PIP_ARGS   more for pip; on Linux without a GPU this avoids several GB of CUDA packages:
#            make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP_ARGS ?=
ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
# Source packages build with the setuptools of .venv, so pip fetches no build environments.
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --prefer-binary \
	--use-pep517 --no-build-isolation --constraint constraints.txt $(PIP_ARGS)
INPUTS := pyproject.toml setup.py constraints.txt
TYPES := $(VENV)/types

# torch and transformers are not compiled to bytecode when installed, which would double that
# time: the first import compiles the fraction that is used, and must be allowed to keep it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/run.stamp
	@$(BIN)/cascade demo $(ARGS)

test: $(VENV)/test.stamp
	@# A file's tests stay together: they share what takes long to make.
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy follows folders, not package-dir: show it the tree as it is installed.
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/cascade
	@ln -s "$(CURDIR)"/cascade/* "$(CURDIR)/kernels" "$(CURDIR)/policies" $(TYPES)/cascade/
	cd $(TYPES) && ../bin/mypy --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache --package cascade

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .ci/*/build .ci/*/*.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "cascade needs Python 3.11 or newer: install it," \
		"or name one with make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "cascade needs Python 3.11 or newer; $(PYTHON) is not" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: $(INPUTS) | $(BIN)/python
	@echo "installing torch, transformers and cascade into $(VENV) ..."
	@$(PIP) --no-compile setuptools torch transformers
	@$(PIP) pycosat >$(VENV)/pycosat.log 2>&1 || \
		{ echo "pycosat did not build, see $(VENV)/pycosat.log: no zebra puzzles"; $(PIP) ./.ci/pycosat; }
	@$(PIP) --editable '.[eval]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	@$(PIP) --editable '.[eval,cluster,serve,test]'
	@touch $@
