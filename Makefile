# make demo, make shapes, make test, make check, make engines, make lint, make docs and make figures each set up
# .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Python compiles what it imports, which is a small part of what is installed.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
RUNS ?= runs/demo
# Huge pages: a network's large temporaries cost 12 to 27 % less CPU time.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# jemalloc, where it is installed, keeps the memory of a step for the next one. glibc gives it back, and clears it anew.
JEMALLOC := $(firstword $(wildcard /usr/lib/*/libjemalloc.so.2 /usr/lib64/libjemalloc.so.2 /usr/lib/libjemalloc.so.2))
demo shapes: export LD_PRELOAD ?= $(JEMALLOC)
demo shapes: export MALLOC_CONF ?= thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0
# Python keeps what it compiles, also where the environment says otherwise: a command's imports take half as long then.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo shapes test test-all test-slow check coverage mutations engines lint docs figures lock clean

demo: $(VENV)/.installed
	$(BIN)/python -m diffdis_jax.demo --out=$(RUNS)
	$(BIN)/python -m diffdis_jax.report --workdir=$(RUNS)/diffdis --out=$(RUNS)/report.html

# The model that comes with the package: the demo's, longer. Stopped, it resumes.
SHAPES ?= runs/shapes
shapes: $(VENV)/.installed
	$(BIN)/python -m diffdis_jax.train --config=shapes:autoencoder --workdir=$(SHAPES)/autoencoder \
	  --config.num_steps=7200
	$(BIN)/python -m diffdis_jax.train --config=shapes --workdir=$(SHAPES)/diffdis \
	  --config.init_from=$(SHAPES)/autoencoder --config.num_steps=3000
	$(BIN)/python -m diffdis_jax.evaluate --workdir=$(SHAPES)/diffdis --tasks=zero_shot,generation_accuracy \
	  --out=$(SHAPES)/diffdis/evaluation.json
	$(BIN)/python -c 'from diffdis_jax.data import shapes; print(*shapes.CLASSNAMES, "a picture of a", sep="\n")' \
	  >$(SHAPES)/words.txt
	$(BIN)/python -m diffdis_jax.export_weights --workdir=$(SHAPES)/diffdis --out=$(SHAPES)/shapes.safetensors \
	  --dtype=bfloat16 --keep_tokens_of=$(SHAPES)/words.txt

# The icons of the experiments on emoji.
EMOJI ?= runs/emoji
EMOJI_DATA ?= data/emoji
# npm has the icons. Each package is pinned by its hash.
EMOJI_PACKAGES = from replication.emoji_packages import EMOJIBASE as e, ICONS as i; \
  print(*(f"{each.name}@{each.version}" for each in (e, *i.values())))
$(EMOJI_DATA)/dataset_info.json: | $(VENV)/.installed
	$(PIP) --editable '.[emoji]'
	mkdir -p $(EMOJI)/icons
	cd $(EMOJI)/icons && npm pack --silent $$(PYTHONPATH="$(CURDIR)" "$(abspath $(BIN))/python" -c '$(EMOJI_PACKAGES)')
	$(BIN)/python -m replication.prepare_emoji --source=$(EMOJI)/icons --out=$(EMOJI_DATA)

# As many processes as there are cores and memory for. The tests of a file stay in one process, where they share what
# they compile.
PYTEST = $(BIN)/python -m pytest -q -n auto --dist loadfile --durations=25

# The tests of every module and six runs from end to end: minutes. A case that takes over 20 s of CPU time fails.
test: $(VENV)/.installed-test
	$(PYTEST) $(TESTS)

# Kills, buckets, several processes, resizing, pages, records, launchers, the wheel: what CI runs behind `make test`.
test-slow: $(VENV)/.installed-test
	$(PYTEST) -m 'slow and not full' $(TESTS)

# Everything, with full size and what compiles for other machines: hours.
test-all: test test-slow
	$(PIP) --editable '.[slow]'
	$(PYTEST) -m full --ignore=tests/engines $(TESTS)

# Before each commit: style, types, imports, the fastest test of each equation, and a training step.
EQUATIONS := method/test_schedules.py method/test_samplers.py method/test_losses.py method/test_guidance.py \
  method/test_fusion.py method/test_alignment.py method/test_joint.py method/test_algorithms.py \
  models/test_attention.py models/test_layers.py training/test_step.py::test_joint_loss_is_the_equations_on_the_same_keys
check: lint
	$(BIN)/python -m pytest -q tests/test_imports.py $(addprefix tests/,$(EQUATIONS))

# Lines and branches of the package that `make test` runs, also in the commands that it starts.
coverage: $(VENV)/.installed-test
	CASE_SECONDS=120 $(BIN)/python -m coverage run -m pytest -q -n auto --dist loadfile $(TESTS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered

# Forty changes of the equations, chosen by a seed. The fast tests must find nearly all; half a minute each.
mutations: $(VENV)/.installed-test
	$(BIN)/python tests/mutate.py --count=40

# The launchers under real engines, as root, in minutes. What is not installed is skipped, with the line that installs it.
engines: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -m full -rs tests/engines

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The pages in docs/ as a site in site/.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The versions that CI and the image install, for every Python and machine. Those that are there stay where they can.
lock: $(VENV)/.installed-test
	$(BIN)/uv pip compile --quiet --universal --python-version=3.11 --all-extras --no-annotate \
	  --custom-compile-command="make lock" --output-file=requirements.lock pyproject.toml

# The figures of the book, from the records in replication/measured.
figures: $(VENV)/.installed-test
	$(BIN)/python -m replication.figures

# Before the folder is made, and of a folder that is there, since venv leaves its Python as it is.
CHECK_PYTHON = import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python " + sys.version.split()[0] + " is \
  too old; give one of 3.11 or later, such as: make PYTHON=python3.12 $@")
$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c '$(CHECK_PYTHON)' || { echo "$(VENV) has that Python: remove the folder first" >&2; exit 1; }
	$(PIP) --editable '.[own]'
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
