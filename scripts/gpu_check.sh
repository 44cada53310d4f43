#!/usr/bin/env bash
# Check and measure the GPU path on one GPU, in less than 9 minutes, with this tree and nothing installed but
# Python 3.11 or newer, torch 2.11 or newer and megatron-core ($PYTHON, or python3). Options: --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" scripts/gpu_check/check.py "$@"
