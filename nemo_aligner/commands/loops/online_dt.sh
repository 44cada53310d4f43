#!/usr/bin/env bash
# Online decision transformer: online_rs.sh with another processor. Every response is trained on, with its reward in its
# prompt; from the second iteration on the sampler asks for TARGET_REWARD (default 1, written with one decimal), in
# standard deviations of the reward model's own rewards. All other settings are those of online_rs.sh.
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit; fi
export PROCESSOR=dt
export LABELER_ARGS="reward_standardization.enable=True ${LABELER_ARGS:-}"
LC_ALL=C printf -v target %.1f "${TARGET_REWARD:-1}"
asks="{input} <rm_score>: $target " # the labeler's reward_template
export LATER_SAMPLER_ARGS="'data.prompt_template=\"$asks\"' ${LATER_SAMPLER_ARGS:-}"
if [[ ${SFT_ARGS:-} != *model.data.chat=[Tt]rue* ]]; then # a conversation has the chat template
  # reward_template ends with a space
  export SFT_ARGS="'model.data.train_ds.prompt_template=\"{input}{output}\"' ${SFT_ARGS:-}"
fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/online_rs.sh"
