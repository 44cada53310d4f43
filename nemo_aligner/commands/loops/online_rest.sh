#!/usr/bin/env bash
# Online Reinforced Self-Training: online_rs.sh with another processor. THRESHOLD (default 0) is in standard deviations
# of the reward model's own rewards; all other settings are those of online_rs.sh.
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit; fi
export PROCESSOR=rest
export LABELER_ARGS="threshold=${THRESHOLD:-0} reward_standardization.enable=True ${LABELER_ARGS:-}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/online_rs.sh"
