# A fresh machine needs Python 3.11 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= outputs/mini
JOBS ?= 2
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: quickstart test test-fast lint format clean

quickstart: $(VENV)/.installed-base  ## the whole path on handwritten digits: data, training, evaluation, report
	$(BIN)/python -m internvl_mpo.quickstart --output $(OUTPUT)

test: $(VENV)/.installed-test lint  ## the whole suite
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS)
	$(BIN)/python -m pytest -m slow

test-fast: $(VENV)/.installed-test  ## without the tests that train or generate for long
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) outputs build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed, this is ' + sys.version if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-base: $(VENV)/bin/python setup.py constraints.txt
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/bin/python setup.py constraints.txt
	$(PIP) --editable ".[all]"
	touch $@
