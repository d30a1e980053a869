# Everything a person runs.  `make install` needs python3 (3.11-3.13), make and a C library; the
# rest comes from pinned wheels.  Debian packages that some tests need: packages.txt.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?= ./data
PORT   ?= 8420
NODES  ?= 9
SCHEME ?= rs-6-3
TREE   ?=

export RAY_USAGE_STATS_ENABLED = 0

.PHONY: install up test check demo bench clean lock

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

up: install
	$(BIN)/haversack up --data $(DATA) --port $(PORT) --nodes $(NODES) --scheme $(SCHEME)

# Two processes, one a core.  A file of tests that start cells stays in one of them.
test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/sim tests/property tests/unit
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/integration tests/probe

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

demo: install
	$(BIN)/haversack demo $(if $(TREE),--tree $(TREE))

bench: install
	$(BIN)/python -m bench

clean:
	rm -rf $(VENV) build dist *.egg-info

lock:
	$(BIN)/python -m pip install --quiet pip-tools
	$(BIN)/pip-compile --quiet --extra dev --generate-hashes --allow-unsafe --strip-extras \
	    --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-header \
	    --output-file requirements.txt pyproject.toml requirements.in
