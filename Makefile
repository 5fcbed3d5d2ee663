# Two commands on a bare machine: `make demo` and `make test`.
# `make test MARKERS=slow` runs the other tests.

# The first of these that runs and can create environments. The newest jax needs
# Python 3.12. A name on the path may be a shim for an inactive version.
PYTHONS := python3.13 python3.12 python3 python3.11
USABLE := import ensurepip, sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(PYTHONS); do \
  $$p -c '$(USABLE)' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
MARKERS ?= not slow
BIN := $(VENV)/bin

.PHONY: demo test fuzz soak lint docs dist release clean

# Trains AT and AT-AWP on the embedded digits, measures the loss around their
# weights and writes a page that compares them.
demo: $(VENV)/.installed
	$(BIN)/python experiments/main.py \
	  --config=experiments/configs/digits_at.py --workdir=runs/demo/AT
	$(BIN)/python experiments/main.py \
	  --config=experiments/configs/digits_awp.py --workdir=runs/demo/AT-AWP
	$(BIN)/python experiments/main.py --mode=landscape \
	  --config=experiments/configs/digits_awp.py --workdir=runs/demo/AT-AWP \
	  --compare_to=runs/demo/AT --config.landscape.plane_points=0
	$(BIN)/python experiments/compare.py runs/demo/AT runs/demo/AT-AWP \
	  --output=runs/demo/comparison.png

# All tests but those marked slow: trainings of several epochs, and runs in
# processes that are killed and restarted.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist=worksteal -m '$(MARKERS)'

# Thousands of broken files and random settings; some minutes for each test.
fuzz: $(VENV)/.installed-dev
	AWP_FUZZ_EXAMPLES=2000 $(BIN)/python -m pytest -n 2 tests/fuzz

# Kills, stops and damages runs at random moments; some hours.
soak: $(VENV)/.installed
	$(BIN)/python -m benchmarks.soak

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site, in site/: warnings, such as broken links, are errors.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The source distribution and the wheel, as PyPI checks them.
dist: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*

# Installs both distributions into environments of their own and uses them there.
release: dist
	for file in dist/*.whl dist/*.tar.gz; do \
	  rm -rf build/clean && $(PYTHON) -m venv build/clean && \
	  build/clean/bin/pip install --quiet "$$file" && \
	  (cd build/clean && bin/python "$(CURDIR)/benchmarks/installed.py") || exit 1; \
	done

$(VENV)/.installed: requirements.txt pyproject.toml
	@test -n '$(PYTHON)' || { echo 'No Python 3.11 or later that can make' \
	  'environments was found. Name one: make PYTHON=...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
