# Two commands matter: `make run` shows that everything agrees, `make test` tests it. Each sets up
# what it needs first. VENV=0 uses the python at hand with the packages it has, and no network:
#     make PYTHON=python3 VENV=0 test
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

ifeq ($(VENV),0)
  PY := $(PYTHON)
  STAMP := build/setup-at-hand.stamp
else
  PY := $(VENV)/bin/python
  STAMP := $(VENV)/setup.stamp
endif

SOURCES := setup.py pyproject.toml requirements.lock $(shell find csrc -type f 2>/dev/null)
# Without an installed package (VENV=0), `kernels` must be on the path; it does no harm otherwise.
export PYTHONPATH := $(CURDIR)/kernels:$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
# xdist and the timeout are used where they are installed: a machine at hand may lack them.
PYTEST = $(PY) -m pytest $(shell $(PY) -c "import importlib.util as u; \
	print('-n $(JOBS) --dist worksteal' if u.find_spec('xdist') else '', \
	'--timeout 600' if u.find_spec('pytest_timeout') else '')" 2>/dev/null)

.PHONY: help setup run test check lint format wheel clean
help:
	@echo "make run      check every op, time it, run the model, and say whether all agree"
	@echo "make test     every test that runs on this machine"
	@echo "make check    lint and the fast tests (under 3 minutes)"
	@echo "make setup    the virtual environment, the dependencies and the C++ parts"
	@echo "make lint | format | wheel | clean"

setup: $(STAMP)

$(VENV)/setup.stamp: $(SOURCES)
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON): install python3 (3.10 or newer)"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { \
	  echo "could not make $(VENV): on Debian, apt-get install python3-venv"; rm -rf $(VENV); exit 1; }
	@echo "== dependencies (requirements.lock)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@echo "== deepkern and its C++ parts"
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(PY) -m deepkern
	@touch $@

build/setup-at-hand.stamp: $(SOURCES)
	$(PY) setup.py --quiet build_ext --inplace
	@$(PY) -m deepkern
	@mkdir -p build && touch $@

run: setup
	$(PY) -m bench

test: setup
	$(PYTEST)

check: lint
	$(PYTEST) -m "not slow"

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: setup
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

wheel: setup
	$(PY) -m pip wheel --quiet --no-deps --no-build-isolation -w dist .

clean:
	rm -rf build dist kernels/*.egg-info kernels/deepkern/*.so .venv
