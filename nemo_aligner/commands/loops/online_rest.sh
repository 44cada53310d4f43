#!/usr/bin/env bash
# Online Reinforced Self-Training (arXiv 2308.08998): online_rs.sh with another processor. Each iteration draws samples
# once (grow), and trains on those of a reward above a threshold (improve). All other settings are those of online_rs.sh.
#   THRESHOLD     default 0, in standard deviations of the reward model's own rewards
#   THRESHOLDS    several improve steps, each from the policy of the one before: rising, "0 0.5 1"; instead of THRESHOLD
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit; fi
export PROCESSOR=rest improve_thresholds=${THRESHOLDS:-${THRESHOLD:-0}}
if ! awk '{ for (i = 1; i <= NF; i++) if ($i + 0 != $i || i > 1 && $i <= $(i - 1)) exit 1 }' <<<"$improve_thresholds"; then
  echo "error: THRESHOLDS=$improve_thresholds: numbers are needed, each above the one before" >&2
  exit 1
fi
export LABELER_ARGS="reward_standardization.enable=True ${LABELER_ARGS:-}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/online_rs.sh"
