#!/usr/bin/env bash
# Online rejection sampling: `aligner loop rs ONE_PROCESS=0`, from a checkout; --help says which settings it takes from the
# environment.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../nemo_aligner/commands/loops/online_rs.sh" "$@"
