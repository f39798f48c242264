# make demo, make test and make lint each set up .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs/demo
BIN := $(VENV)/bin

.PHONY: demo test lint clean

# glibc would give each step's temporaries back to the kernel, which then has to clear their pages again.
TUNABLES := glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736
TUNABLES := $(TUNABLES):glibc.malloc.hugetlb=1

demo: $(VENV)/.installed
	GLIBC_TUNABLES=$(TUNABLES) $(BIN)/python -m diffdis_jax.demo --out=$(RUNS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q $(TESTS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs
