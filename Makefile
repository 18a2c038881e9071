# make demo | test | torture | check | bench: each installs what it needs into .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
ARGS   ?=
# files of tests that run at a time: most of them wait for brokers and containers, not for the processor
WORKERS ?= 4

.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fiq needs Python >= 3.11: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# one stamp a lock file: a target installs only what it needs, and only when the lock changed
$(VENV)/.run: requirements/run.txt pyproject.toml | $(BIN)/python
	$(PIP) install --require-hashes -r requirements/run.txt
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.run
	$(PIP) install --require-hashes -r requirements/dev.txt
	@touch $@

install: $(VENV)/.run ## install fiq into .venv
	@echo 'installed; for the command "fiq":  export PATH="$(abspath $(BIN)):$$PATH"'

up: $(VENV)/.run ## run the whole pipeline on this machine until Ctrl-C (ARGS="--port 7009")
	$(BIN)/fiq up $(ARGS)

demo: $(VENV)/.run ## run the pipeline on an embedded cluster, kill parts of it, verify the corpus
	$(BIN)/fiq demo $(ARGS)

test: $(VENV)/.dev ## run every test (ARGS="-k name" to choose, WORKERS=0 for one process)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

torture: $(VENV)/.dev ## the crash tests in full: 500 kills, 2,000 power cuts, full disks, bit flips, drawn requests
	FIQ_TORTURE=long $(BIN)/python -m pytest tests/torture $(DRAWN) $(REPEATED) $(ARGS)
# tests that do again and again what the others do a few times
REPEATED := tests/integration/persister/test_volumes.py tests/integration/cli/test_lost_disk_returns.py
# tests that draw what they send: more of it
DRAWN := tests/integration/ingest/test_fuzz.py tests/integration/ingest/test_openapi_conformance.py

check: $(VENV)/.dev ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## apply ruff's formatting and safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## measure against the named references; prints Markdown and JSON (ARGS="--only at-work" to choose)
	$(BIN)/python -m benchmarks $(ARGS)

bench-corpus: $(VENV)/.dev ## measure the corpus alone: commits, growth; prints Markdown
	$(BIN)/python -m benchmarks.corpus_commits
	$(BIN)/python -m benchmarks.corpus_growth
	$(BIN)/python -m benchmarks.consultation_list --names 100000

bench-soak: $(VENV)/.dev ## five minutes of load on the whole product: memory of every process; prints Markdown
	$(BIN)/python -m benchmarks.soak $(ARGS)

bench-page: $(VENV)/.dev ## the page in a real browser: first view, and what followers cost; prints Markdown
	$(BIN)/python -m benchmarks.browser $(ARGS)

lock: $(VENV)/.dev ## renew requirements/*.txt from pyproject.toml
	$(BIN)/uv pip compile $(LOCK) --extra services --extra embedded --group build pyproject.toml -o requirements/run.txt
	$(BIN)/uv pip compile $(LOCK) --all-extras --group build --group test --group check --group lock -c requirements/run.txt pyproject.toml -o requirements/dev.txt
	$(BIN)/uv pip compile $(LOCK) --extra services -c requirements/run.txt pyproject.toml -o requirements/image.txt
	$(BIN)/uv pip compile $(LOCK) -c requirements/run.txt --group build -o requirements/build.txt
LOCK := -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate --no-header --upgrade

clean: ## remove the environment and every cache
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

.PHONY: help install up demo test torture check format bench bench-corpus bench-soak bench-page lock clean
