# Two commands do everything on a fresh machine, installation included: `make quickstart` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/
# modules are compiled when they are first imported, also where the environment forbids it, as in many containers:
# to compile all of them ahead is a third of the installation's work, not to keep what was compiled half of every start
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(RUN)pip install --quiet --no-compile --constraint constraints.txt

.PHONY: help install quickstart test test-slow lint types format docs clean
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(VENV)/.installed ## a virtual environment with everything in it

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch torchvision
	$(INSTALL) --editable '.[dev]'
	@$(RUN)aligndet compare --help > /dev/null  # compiles what all commands import
	@touch $@

quickstart: install ## the main job on built-in data: does pre-training help?
	$(RUN)aligndet quickstart

test: lint types ## lint, types and the fast tests
	$(RUN)pytest --numprocesses auto --dist worksteal --durations=8

test-slow: install ## the tests that take minutes
	$(INSTALL) --editable '.[dev,ray]' s3fs 'moto[s3]' flask flask-cors
	$(RUN)pytest -m slow --durations=8
	$(RUN)pytest tests/test_fuzz.py --hypothesis-profile thorough

lint: install ## style, and that imports point down only
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)lint-imports

types: install ## mypy, strict
	$(RUN)mypy

format: install ## mends what can be mended
	$(RUN)ruff check --fix .
	$(RUN)ruff format .

docs: install ## the documentation as a site in site/, built strictly
	$(RUN)mkdocs build --strict --quiet

clean: ## removes the environment and all caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist site src/*.egg-info
