# Two commands matter: `make run` shows that everything agrees, `make test` tests it. Each sets up
# what it needs first. VENV=0 uses the python at hand with the packages it has, and no network:
#     make PYTHON=python3 VENV=0 test
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

# A compiler that comes or goes is a reason to build again.
BUILD := $(if $(shell command -v $(firstword $(CXX))),native,plain)
ifeq ($(VENV),0)
  PY := $(PYTHON)
  STAMP := build/$(BUILD)-$(shell $(PYTHON) -c "import sys; print(sys.implementation.cache_tag)").stamp
else
  PY := $(VENV)/bin/python
  STAMP := $(VENV)/$(BUILD).stamp
endif

SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)
PIP := $(PY) -m pip --disable-pip-version-check
# Without an installed package (VENV=0), `kernels` must be on the path; it does no harm otherwise.
export PYTHONPATH := $(CURDIR)/kernels:$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
# xdist and the timeout are used where they are installed: a machine at hand may lack them.
PYTEST = $(PY) -m pytest $(shell $(PY) -c "import importlib.util as u; \
	print('-n $(JOBS) --dist worksteal' if u.find_spec('xdist') else '', \
	'--timeout 1200' if u.find_spec('pytest_timeout') else '')" 2>/dev/null)

.PHONY: help setup browser run test check proof sanitize lint format docs wheel clean
help:
	@echo "make run      check every op, time it, run the model, and say whether all agree"
	@echo "make test     every op and backend at chosen shapes (goal: 10 minutes)"
	@echo "make proof    all tiles, schedules, planted bugs, fuzzing (goal: 30 minutes)"
	@echo "make sanitize the native CPU ops under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make check    lint and the fast tests (under 3 minutes)"
	@echo "make setup    the virtual environment, the dependencies and the C++ parts"
	@echo "make browser  Chromium, for the tests of the HTML pages (as root, with apt-get)"
	@echo "make docs     the HTML site of docs/, in build/site"
	@echo "make lint | format | wheel | clean"

setup: $(STAMP)

$(VENV)/dependencies.stamp: requirements.lock
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { \
	  echo "$(PYTHON) is missing or too old: install Python 3.10 or newer, or name one with PYTHON=..."; \
	  exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { \
	  echo "could not make $(VENV): on Debian, apt-get install python3-venv"; rm -rf $(VENV); exit 1; }
	@echo "== dependencies (requirements.lock)"
	$(PIP) install -r requirements.lock
	@touch $@

$(VENV)/$(BUILD).stamp: $(VENV)/dependencies.stamp $(SOURCES)
	@echo "== deepkern and its C++ parts"
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@$(PY) -m deepkern
	@touch $@

# --force: the compiler's flags may have changed, and setuptools looks at the sources alone.
build/$(BUILD)-%.stamp: $(SOURCES)
	$(PY) setup.py --quiet build_ext --inplace --force
	@$(PY) -m deepkern
	@mkdir -p build && touch $@

browser:
	@if command -v chromium >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get -qq update && apt-get -qq install -y chromium; \
	else echo "no chromium, and not root with apt-get: the browser tests are skipped"; fi

run: setup
	$(PY) -m bench

test: setup
	$(PYTEST) -m "not proof"

proof: setup
	$(PYTEST) -m proof

# The package in build/sanitize is links to this one, with another _C. TESTS=... runs other tests.
# The sanitizers intercept exceptions, so libstdc++ is loaded before Python, too.
TESTS ?= tests/cpu tests/test_every_op.py
sanitize: sanitize-address sanitize-thread
sanitize-%: setup
	rm -rf build/sanitize/$*/path && mkdir -p build/sanitize/$*/path
	cp -rs $(CURDIR)/kernels/deepkern build/sanitize/$*/path/
	rm -f build/sanitize/$*/path/deepkern/_C*.so
	DEEPKERN_SANITIZE=$* $(PY) setup.py --quiet build_ext --build-lib build/sanitize/$*/path \
	  --build-temp build/sanitize/$*/objects
	ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1" \
	  PYTHONPATH=$(CURDIR)/build/sanitize/$*/path:$(CURDIR) \
	  LD_PRELOAD="$$($(CXX) -print-file-name=lib$(if $(filter address,$*),asan,tsan).so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	  $(PY) -m pytest -q -p no:cacheprovider -o pythonpath= -m "not gpu" -k cpu $(TESTS)

check: lint
	$(PYTEST) -m "not slow and not gpu and not proof"

lint: setup
	@if [ "$(VENV)" = 0 ] && ! $(PY) -c "import ruff" 2>/dev/null; then \
	  echo "$(PY) has no ruff: nothing is linted"; \
	else set -ex; $(PY) -m ruff check .; $(PY) -m ruff format --check .; fi

format: setup
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

$(VENV)/docs.stamp: requirements-docs.lock
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
	  echo "the theme of the site needs Python 3.11 or newer: name one with PYTHON=..."; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -r requirements-docs.lock
	@touch $@

# Strict: a warning, such as a link to nothing, is an error. Needs neither torch nor a network.
docs: $(if $(filter-out 0,$(VENV)),$(VENV)/docs.stamp)
	$(PY) docs/figures.py
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet
	@echo "build/site/index.html"

# build/lib may hold files that the package has no more; setuptools would pack them.
wheel: setup
	rm -rf build/lib* build/bdist*
	$(PIP) wheel --quiet --no-deps --no-build-isolation -w dist .
	@ls dist/*.whl

clean:
	rm -rf build dist kernels/*.egg-info kernels/deepkern/*.so .venv
