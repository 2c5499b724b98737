# make serve | make test | make install. Every target installs first what it needs.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Modules are compiled when they are first imported: most of what torch and ray bring never is.
PIP_FLAGS := --constraint constraints.txt --no-compile

.DEFAULT_GOAL := help
.PHONY: help install serve test check clean

help:
	@echo "make serve    install if needed, then serve the bundled model at http://$(HOST):$(PORT)"
	@echo "make test     install if needed, then check format, lint and types, and run the tests,"
	@echo "              those of the kernels once more in Triton's interpreter"
	@echo "make install  create $(VENV) and install focus-ray with the tested versions"
	@echo "make check    format, lint and types only"
	@echo "make clean    remove $(VENV), build outputs and caches"
	@echo
	@echo "PYTHON=$(PYTHON)  HOST=$(HOST)  PORT=$(PORT)"
	@echo "MODEL=  name, directory or hub id      ARGS=  further flags of focus-ray serve or pytest"

install: $(INSTALLED)

# The stamp is written last, so an interrupted installation is taken up again.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "focus-ray needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)."; \
	  echo "Name another one:  make install PYTHON=python3.12"; exit 1; } >&2
	@echo "==> environment in $(VENV) (first time: a few minutes, most of it torch and ray)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "==> torch"
	$(BIN)/python -m pip install $(PIP_FLAGS) torch
	@echo "==> focus-ray and what it needs"
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable '.[dev]'
	@touch $@
	@echo "==> installed; 'make serve' starts the server, '$(BIN)/focus-ray --help' shows the rest"

serve: $(INSTALLED)
	@exec $(BIN)/focus-ray serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

test: check
	scripts/test $(ARGS)

check: $(INSTALLED)
	scripts/check

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache
