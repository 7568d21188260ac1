# A fresh machine needs Python 3.11 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= outputs/mini
JOBS ?= 2
UV := $(shell command -v uv 2>/dev/null)
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: quickstart test test-fast lint format gpu-proof clean

quickstart: $(VENV)/.installed-base  ## the whole path on handwritten digits: data, training, evaluation, report
	$(BIN)/python -m internvl_mpo.quickstart --output $(OUTPUT)

test: $(VENV)/.installed-test lint  ## the whole suite
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS)
	$(BIN)/python -m pytest -m slow -n $(JOBS)

test-fast: $(VENV)/.installed-test  ## without the tests that train or generate for long
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS)

gpu-proof: $(VENV)/.installed-test  ## speed, memory and numbers on the GPU here, in ten minutes
	$(BIN)/python bench/gpu_proof.py --minutes 10

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) outputs build *.egg-info

# The target is pip, not python: a `venv` that fails for want of ensurepip leaves a python behind.
$(VENV)/bin/pip:
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed, this is ' + sys.version if sys.version_info < (3, 11) else 0)"
	@before=$$(test ! -e $(VENV) || echo there); \
	if $(if $(UV),$(UV) venv --quiet --seed --allow-existing --python "$(PYTHON)",$(PYTHON) -m venv) $(VENV) > /dev/null; \
	then exit 0; fi; \
	test -n "$$before" || rm -rf $(VENV); \
	echo "no environment could be made in $(VENV): install venv with pip (Debian, Ubuntu: apt install python3-venv) or uv, then run make again" >&2; \
	exit 1

$(VENV)/.installed-base: $(VENV)/bin/pip setup.py constraints.txt
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/bin/pip setup.py constraints.txt
	$(PIP) --editable ".[all]"
	touch $@
