# make demo, make test, make lint and make docs each set up .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Python compiles what it imports, which is a small part of what is installed.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
RUNS ?= runs/demo
# Python keeps what it compiles, also where the environment says otherwise: a command's imports take half as long then.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint docs clean

# Huge pages, where the kernel leaves that to programs: a step's temporaries are tens of megabytes, and new each time.
demo: $(VENV)/.installed
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python -m diffdis_jax.demo --out=$(RUNS)

# Two processes, whatever the machine: a file's tests share what they compile, and each process takes several GB. The
# longest files go first, as tests/conftest.py orders them.
test: $(VENV)/.installed-test
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The pages in docs/ as a site in site/.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

# clip_benchmark, whose metrics the tests compare with, alone: it requires data sets' and models' packages of which those
# need none.
$(VENV)/.installed-test: $(VENV)/.installed Makefile
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps 'clip_benchmark>=1.6.1,<1.7'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) runs site
