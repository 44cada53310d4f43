# What a maintainer types; CI runs .ci/run, which is `make test`.
.PHONY: setup format lint types test fast bench docs wheel
PYTHON := .venv/bin/python

setup:
	bash scripts/test.sh --setup-only

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports

types: setup
	.venv/bin/mypy

test:
	bash scripts/test.sh

fast:
	bash scripts/test.sh --fast

# a first figure in a minute or two; docs/performance.md has the commands behind its tables
bench: setup
	$(PYTHON) scripts/bench/generation.py --model llama_24m --prompts 4 --rounds 1 --engines ours

docs: setup
	$(PYTHON) -m mkdocs build --strict

wheel: setup
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .
