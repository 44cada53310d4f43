#!/usr/bin/env bash
# All methods from one start, on the same prompts and against the same reward model, side by side: reward against KL and
# against generated tokens, by the reward that was trained against and by two that were not.
#
#   bash scripts/evidence.sh [--quick | --tiny] [--seed N] [--seeds N] [--methods NAME,...] [--jobs N]
#
#   (neither)    SmolLM2-135M-Instruct, three seeds: about two hours on two cores
#   --quick      one seed, less of everything: about 15 minutes
#   --tiny       a tiny random model: shows the machinery, and its figures mean nothing
#   --seed N     base seed of models, data and runs (default 1234)
#   --seeds N    runs of each method; those that are there already are not made again
#   --methods    only these, and only they are shown
#   --jobs N     runs at a time (default: one a core)
#
# Results go to $EVIDENCE_DIR (default results/evidence, with _quick or _tiny behind it): report.html to look at, summary.md,
# figure.png, results.jsonl. Run again after a kill, it goes on where it was. docs/evidence.md says what is measured, and how.
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | sed '$d'; exit; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scale=full seed=1234 rest=()
while (($#)); do
  case $1 in
    --quick | --tiny) scale=${1#--} ;;
    --seed) seed=${2:?--seed needs a number}; shift ;;
    --seeds | --methods | --jobs) rest+=("$1" "${2:?$1 needs a value}"); shift ;;
    *) echo "error: unknown option $1; see --help" >&2; exit 1 ;;
  esac
  shift
done

out=${EVIDENCE_DIR:-results/evidence$([[ $scale == full ]] || echo "_$scale")}
tiny=$([[ $scale == tiny ]] && echo true || echo false)
source scripts/quickstart/prepare.sh
results_in "$out" "scale=$scale seed=$seed" EVIDENCE_DIR

step "models and data"
read -ra data < <("$PYTHON" -m scripts.evidence.methods "$scale")
import_model sft_model "${base[@]}"
import_model backbone "${backbone[@]}"
film_reviews "${data[@]}"
train_reward_model reward_model "$out/data/pairs.jsonl" "$out/data/held_out_pairs.jsonl"
train_reward_model gold_model "$out/data/gold_pairs.jsonl" "$out/data/held_out_gold_pairs.jsonl"

step "runs"
exec "$PYTHON" -m scripts.evidence.run --folder "$out" --scale "$scale" --seed "$seed" "${rest[@]}"
