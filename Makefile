# make demo   set up .venv and train a tiny model, on this CPU, in minutes
# make test   set up .venv and run the tests
# make lint   style
# make clean  remove .venv and build products (never runs/)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/tracerl demo

test: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile $(ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: an installation is repeated only when setup.py changes.
$(VENV)/installed: setup.py $(BIN)/python
	@echo "Installing into $(VENV); the first time this takes some minutes."
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: setup.py $(BIN)/python
	@echo "Installing into $(VENV); the first time this takes some minutes."
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $(VENV)/installed $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "tracerl_jax needs Python 3.11 or newer; this is `$(PYTHON) --version 2>&1`. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
