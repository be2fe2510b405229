# From a clean clone, `make train` runs the main job and `make test` the tests.
#
# Each makes what it needs: a virtual environment in the clone, one per interpreter
# version, reused when it is there and installed into again when pyproject.toml changed.

PYTHON ?= python3
ARGS ?=

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := .venv-$(VERSION)
PY := $(VENV)/bin/python

# A caller's own environment, active or not, must not leak into the clone's.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_USER PIP_TARGET PIP_PREFIX

EXTRAS_train := train
EXTRAS_test := train,test,aot,notebooks
EXTRAS_notebooks := train,notebooks
EXTRAS_benchmark := benchmark
EXTRAS_docs := docs

# Most of a test's time is compiling, which keeps one core busy.
WORKERS ?= 2
# The tests of a file share fixtures and compiled programs, so one worker runs them all.
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help train test test-smoke test-slice test-all test-gpu lint coverage notebooks benchmark docs types clean python-found
.DEFAULT_GOAL := help

help:
	@echo 'make train       train the tiny preset on 8 fake CPU devices'
	@echo 'make test        lint, and all tests but those marked long'
	@echo 'make test-smoke  one case of every test that make test runs'
	@echo 'make test-slice  one of 28 slices of the long tests: SLICE=1 to 28'
	@echo 'make test-all    lint, and all tests'
	@echo 'make test-gpu    every case of the kernels, on the GPU that is here'
	@echo 'make lint        ruff check and ruff format --check'
	@echo 'make types       mypy, strict on usp_jax and train'
	@echo 'make coverage    make test with a coverage report'
	@echo 'make notebooks   run the notebooks and keep what they show'
	@echo 'make benchmark   attention against ringattention and XLA on the CPU'
	@echo 'make docs        build the documentation into site/; a warning is an error'
	@echo 'make clean       remove the virtual environments and the caches'
	@echo 'PYTHON=python3.12 chooses the interpreter (now: $(PYTHON));'
	@echo "ARGS='...' is passed to the program: make test ARGS='-k ring'"

train: $(VENV)/.installed-train
	$(PY) -m train tiny $(ARGS)

test: lint
	$(PYTEST) -m 'not long' $(ARGS)

test-smoke: $(VENV)/.installed-test
	$(PYTEST) -m 'not long' --one-case-each --hypothesis-profile=smoke $(ARGS)

test-slice: $(VENV)/.installed-test
	$(PYTEST) -m long --slice=$(or $(SLICE),$(error say which of the 28: SLICE=1)) $(ARGS)

test-all: lint
	$(PYTEST) --hypothesis-profile=long $(ARGS)

lint: $(VENV)/.installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

test-gpu: $(VENV)/.installed-test
	USP_JAX_TEST_PLATFORM=cuda $(PY) -m pytest -n 8 tests/test_kernels.py $(ARGS)

coverage: $(VENV)/.installed-test
	$(PY) -m coverage run -m pytest -m 'not long' $(ARGS)
	$(PY) -m coverage combine
	$(PY) -m coverage report

notebooks: $(VENV)/.installed-notebooks
	$(PY) notebooks/execute.py $(ARGS)

benchmark: $(VENV)/.installed-benchmark
	$(PY) -m benchmarks.attention_cpu $(ARGS)

types: $(VENV)/.installed-test
	$(PY) -m mypy

# The link to the repository on each page of the site.
REPOSITORY_URL ?= $(filter https://%,$(shell git config --get remote.origin.url))

docs: $(VENV)/.installed-docs
	REPOSITORY_URL=$(REPOSITORY_URL) NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

clean:
	rm -rf .venv-* .cache .hypothesis .pytest_cache .ruff_cache .mypy_cache
	rm -rf .coverage* *.egg-info build dist site

# The stamps are touched last, so that an interrupted installation is done again.
$(VENV)/.installed-%: pyproject.toml $(VENV)/.created
	@echo "== installing usp_jax[$(EXTRAS_$*)] into $(VENV), minutes the first time"
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS_$*)]'
	@touch $@

$(VENV)/.created: | python-found
	@echo "== making the virtual environment $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu" \
	       "install python$(VERSION)-venv, or name another one: PYTHON=..." >&2; \
	  exit 1; }
	@touch $@

python-found:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "usp_jax needs Python 3.11 or newer, but PYTHON=$(PYTHON)" \
	       "$(if $(VERSION),is Python $(VERSION),does not run);" \
	       "name another one: make test PYTHON=python3.12" >&2; \
	  exit 1; }
