#!/usr/bin/env bash
# Online rejection sampling: sample, label, train, and again with the better policy.
#
# Settings come from the environment:
#   TRAINING_ITERS ROLLOUT_BATCH_SIZE SEED            iterations, prompts per iteration, base seed
#   PROMPTS_PATH POLICY_MODEL_PATH REWARD_MODEL_PATH  prompts.jsonl, sft_model.nemo, reward_model.nemo (none where
#                                                     LABELER_ARGS has a reward_function that needs none)
#   RESULT_PATH                                       everything this script writes, unless said otherwise below
#   GENERATE_SAMPLES_PATH LABELED_SAMPLES_PATH        samples of the iteration in progress
#   ITER_LOG_PATH                                     holds the number of finished iterations
#   KEEP_SAMPLES                                      samples of each iteration to keep in $RESULT_PATH/iterations
#   KEEP_BEST                                         1: each prompt's best sample of all iterations is trained on, not of
#                                                     the last alone (Llama 2, arXiv 2307.09288); rs; default 0
#   PROCESSOR                                         rs, or rest, dt (see online_rest.sh, online_dt.sh)
#   SAMPLER_ARGS LABELER_ARGS SFT_ARGS                more overrides for a stage, quoted as for a shell
#   LATER_SAMPLER_ARGS                                more of them for the sampler, from the second iteration on
#   ONE_PROCESS                                       1: all stages run in one process, or one for each rank, which
#                                                     imports once and loads no model twice; 0 (default, but for
#                                                     `aligner loop`): each is a process of its own
#   LAUNCH                                            put before every stage's command: "srun ..."; or empty. With it
#                                                     each stage is a process of its own
#   PYTHON                                            the interpreter of the stages
#
# Relative paths are those of the folder it is started in. Each iteration leaves a line in $RESULT_PATH/iterations.jsonl
# (rewards, best of n, share kept, lengths, seconds), the same in $RESULT_PATH/tensorboard, and how it was made in
# $RESULT_PATH/iterations/<i>; `aligner report $RESULT_PATH` makes a page of them.
#
# A failed stage stops the loop with that stage's exit status (75: stopped on purpose, run again to go on). Run again
# after any kill, it goes on in the stage it was in: a stage's output appears whole or not at all, and the policy is
# replaced by one rename. SIGTERM, SIGINT and SIGUSR1 end the stage as they would by themselves, and then the loop. While a
# loop runs, another one in the same RESULT_PATH is refused.
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit; fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
if [[ -f $root/pyproject.toml ]]; then export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; fi # a checkout

: "${TRAINING_ITERS:=20}" "${ROLLOUT_BATCH_SIZE:=2048}" "${SEED:=1234}" "${PROCESSOR:=rs}" "${PYTHON:=python}"
: "${KEEP_SAMPLES:=256}" "${ONE_PROCESS:=0}" "${KEEP_BEST:=0}"
if [[ $ONE_PROCESS != [01] ]]; then
  echo "error: ONE_PROCESS=$ONE_PROCESS is not 0 or 1" >&2
  exit 1
fi
if [[ $KEEP_BEST != [01] ]]; then
  echo "error: KEEP_BEST=$KEEP_BEST is not 0 or 1" >&2
  exit 1
fi
is_number() { [[ $1 =~ ^(0|[1-9][0-9]*)$ ]]; }
for name in TRAINING_ITERS ROLLOUT_BATCH_SIZE SEED KEEP_SAMPLES; do
  if ! is_number "${!name}"; then
    echo "error: $name=${!name} is not a whole number" >&2
    exit 1
  fi
done
if ((KEEP_BEST)) && [[ $PROCESSOR != rs ]]; then
  echo "error: KEEP_BEST=1: there is a best sample of a prompt for rejection sampling alone, not with PROCESSOR=$PROCESSOR" >&2
  exit 1
fi
if ((ONE_PROCESS)) && [[ -n ${LAUNCH:-} ]]; then
  echo "LAUNCH is set: each stage is a process of its own" >&2
  ONE_PROCESS=0
fi
: "${PROMPTS_PATH:?the prompts, a JSONL file}" "${POLICY_MODEL_PATH:?the policy to start from, a .nemo file}"
: "${RESULT_PATH:?a folder for results}"
if [[ ${LABELER_ARGS:-} != *reward_function=* ]]; then
  : "${REWARD_MODEL_PATH:?the reward model, a .nemo file, or reward_function=... in LABELER_ARGS}"
fi
: "${GENERATE_SAMPLES_PATH:=$RESULT_PATH/generated_samples.jsonl}"
: "${LABELED_SAMPLES_PATH:=$RESULT_PATH/filtered_samples.jsonl}"
: "${ITER_LOG_PATH:=$RESULT_PATH/iter.log}"
eval "sampler_args=(${SAMPLER_ARGS:-})" "later_args=(${LATER_SAMPLER_ARGS:-})" "labeler_args=(${LABELER_ARGS:-})" "sft_args=(${SFT_ARGS:-})"

# A path as the grammar of the stages' command lines has it
quoted() {
  local quote="'"
  if [[ $1 =~ ^[A-Za-z0-9_./-]+$ ]]; then echo "$1"; else echo "'${1//$quote/\\$quote}'"; fi
}
prompts=$PROMPTS_PATH # a file, or several with commas between them
if [[ -f $PROMPTS_PATH ]]; then prompts=$(quoted "$PROMPTS_PATH"); fi

MODEL_OUTPUT_PATH=$RESULT_PATH/checkpoints/megatron_gpt_sft.nemo
best=$RESULT_PATH/best_so_far.jsonl
mkdir -p "$RESULT_PATH/checkpoints"

# The lock belongs to the open file, so it ends with this script; stages are started without it.
lock=$RESULT_PATH/loop.lock
locked=3
while ((locked == 3)); do # the loop before this one removed it while we opened it
  exec {owner}<>"$lock"
  locked=0
  "$PYTHON" -m nemo_aligner.owner "$lock" --descriptor "$owner" --pid $$ || locked=$?
done
if ((locked)); then exit "$locked"; fi

# A signal goes to the stage, which saves and leaves; then the loop does. One that is killed outright takes its stage along,
# where this machine knows how; Slurm ends its own job steps.
child="" told="" signals=0
tell() {
  told=$1 signals=$((signals + 1))
  if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null || true; fi
}
for name in TERM INT USR1 HUP; do trap "tell SIG$name" "$name"; done
tied=()
if [[ -z ${LAUNCH:-} ]] && setpriv --pdeathsig KILL true 2>/dev/null; then
  # or not even begin, where this script ended before the kernel was asked
  tied=(setpriv --pdeathsig KILL sh -c '[ "$PPID" = "$1" ] && shift && exec "$@"' tied $$)
fi

# With ONE_PROCESS, the process that runs all commands, which it gets through $to; $from says that one is done.
host="" to="" from=""
start_host() {
  local out
  exec {out}>&1
  coproc host_of_stages {
    exec {owner}>&- 3>&1 >&"$out" {out}>&- "${tied[@]}" "$PYTHON" -m nemo_aligner.stages.one_process --answers 3
  }
  host=$host_of_stages_PID
  exec {out}>&- {from}<&"${host_of_stages[0]}"- {to}>&"${host_of_stages[1]}"-
}

leave() {
  if [[ -n $host ]]; then
    exec {to}>&-
    wait "$host" || true
  fi
  rm -f "$lock"
}
trap leave EXIT
trap : PIPE # a host that is gone is seen where its answer is read

# Start a command; $child is whom to tell when it is to stop
begin() {
  if ((ONE_PROCESS)); then
    if [[ -z $host ]]; then start_host; fi
    child=$host
    printf '%s\0' $# "$@" >&"$to" || true
  else
    "${tied[@]}" ${LAUNCH:-} "$PYTHON" "$@" {owner}>&- &
    child=$!
  fi
}

# A command that gets the signals of this script; told to stop, the script ends with it: 75, or what else it ended with.
attended() {
  local status=0 answer=""
  if [[ -z $told ]]; then
    begin "$@"
    if [[ -n $told ]]; then kill -TERM "$child" 2>/dev/null || true; fi # it came before we knew whom to tell
    if ((ONE_PROCESS)); then read -r -u "$from" answer || true; fi
    local before=-1
    while [[ $answer != done ]] && ((before != signals)); do # a signal ends `wait`, not the stage
      before=$signals status=0
      wait "$child" || status=$?
    done
    child=""
    if [[ $answer != done ]]; then host=""; fi
  fi
  if [[ -z $told ]] && ((status == 138)); then told=SIGUSR1; fi # Slurm's warning, to a stage that had no ear for it yet
  if [[ -n $told ]]; then
    echo "stopped early: $told; run the same command again to go on" >&2
    ((status == 0 || status == 143 || status == 138)) && status=75
  fi
  if ((status)); then exit "$status"; fi
}

iter=0
if [[ -f $ITER_LOG_PATH ]]; then iter=$(<"$ITER_LOG_PATH"); fi
if ! is_number "$iter"; then
  echo "error: $ITER_LOG_PATH: the number of finished iterations is needed, not '$iter'" >&2
  exit 1
fi
if ((iter)); then rm -rf "$RESULT_PATH/iter_$((iter - 1))"; fi # what a kill while it was removed has left

# Seconds of each stage, "<iteration> <stage> <seconds>": a line of 0 when it begins, in case a kill comes before the other
run_stage() {
  local name=$1 started=$SECONDS
  shift
  echo "== iteration $iter: $name"
  echo "$iter $name 0" >>"$RESULT_PATH/seconds.log"
  attended "$@"
  echo "$iter $name $((SECONDS - started))" >>"$RESULT_PATH/seconds.log"
}

# Whether a stage's output is whole: what it writes last says how the output was made.
is_whole() { [[ -f $1 && -f $1.meta.json ]]; }

# One training of an iteration, or several of the same samples with rising thresholds, each from the policy of the one before
# (online_rest.sh). $LABELED_SAMPLES_PATH.step says whose rows lie there.
read -ra thresholds <<<"${improve_thresholds:-}"
((${#thresholds[@]})) || thresholds=("")

improve() {
  local step=$1 folder=$2 threshold=() keep=()
  if [[ -n ${thresholds[step]} ]]; then threshold=(threshold="${thresholds[step]}"); fi
  if ((step)) && [[ $(cat "$LABELED_SAMPLES_PATH.step" 2>/dev/null) != "$step" ]]; then
    rm -f "$LABELED_SAMPLES_PATH" "$LABELED_SAMPLES_PATH.meta.json"
    echo "$step" >"$LABELED_SAMPLES_PATH.step"
  fi
  if ((KEEP_BEST)); then keep=(export_reward=True); fi
  if ((KEEP_BEST)) && [[ -f $best ]]; then keep+=(best_so_far_file="$(quoted "$best")"); fi
  if ! is_whole "$LABELED_SAMPLES_PATH"; then
    run_stage label -m nemo_aligner label \
      ${REWARD_MODEL_PATH:+gpt_model_file="$(quoted "$REWARD_MODEL_PATH")"} \
      data.file_names="[$(quoted "$GENERATE_SAMPLES_PATH")]" \
      data.concat_sampling_probabilities=[1] \
      processor="$PROCESSOR" \
      output_file="$(quoted "$LABELED_SAMPLES_PATH")" \
      "${threshold[@]}" "${labeler_args[@]}" "${keep[@]}"
  fi
  run_stage train -m nemo_aligner sft \
    model.restore_from_path="$(quoted "$POLICY_MODEL_PATH")" \
    model.data.train_ds.file_path="$(quoted "$LABELED_SAMPLES_PATH")" \
    ++trainer.sft.skip_validation=True \
    model.answer_only_loss=True \
    model.seed="$((SEED + iter))" \
    exp_manager.explicit_log_dir="$(quoted "$folder")" \
    exp_manager.checkpoint_callback_params.monitor=global_step \
    exp_manager.checkpoint_callback_params.mode=max \
    ++exp_manager.checkpoint_callback_params.save_nemo_on_train_end=True \
    "${sft_args[@]}"
}

while ((iter < TRAINING_ITERS)); do
  later=()
  if ((iter > 0)); then POLICY_MODEL_PATH=$MODEL_OUTPUT_PATH later=("${later_args[@]}"); fi
  sft_dir=$RESULT_PATH/iter_$iter
  archive=checkpoints/megatron_gpt_sft.nemo trained=
  for step in "${!thresholds[@]}"; do
    folder=$sft_dir
    if ((step)); then folder=$sft_dir/improve_$step; fi
    if [[ ! -f $folder/$archive ]]; then
      if ! is_whole "$GENERATE_SAMPLES_PATH"; then
        run_stage sample -m nemo_aligner sample \
          gpt_model_file="$(quoted "$POLICY_MODEL_PATH")" \
          data.file_names="[$prompts]" \
          data.concat_sampling_probabilities=[1] \
          data.sample_split_size="$ROLLOUT_BATCH_SIZE" \
          data.sample_split_iter="$iter" \
          seed="$((SEED + iter))" \
          output_file="$(quoted "$GENERATE_SAMPLES_PATH")" \
          "${sampler_args[@]}" "${later[@]}"
      fi
      improve "$step" "$folder"
    fi
    POLICY_MODEL_PATH=$folder/$archive trained=$folder/$archive
  done

  # The new policy takes the old one's place in one rename; until the count below is written, $trained says that this
  # iteration's work is done, so a kill anywhere here repeats only these lines.
  if [[ ! $trained -ef $MODEL_OUTPUT_PATH ]]; then # it has where a kill came since, and mv refuses two names of one file
    ln -f "$trained" "$MODEL_OUTPUT_PATH.new"
    mv -f "$MODEL_OUTPUT_PATH.new" "$MODEL_OUTPUT_PATH"
  fi
  if [[ -f $GENERATE_SAMPLES_PATH && -f $LABELED_SAMPLES_PATH ]]; then # or a kill came after the record was made
    attended -m nemo_aligner.stages.offline.loop_record --result "$RESULT_PATH" --iteration "$iter" \
      --generated "$GENERATE_SAMPLES_PATH" --labeled "$LABELED_SAMPLES_PATH" --keep "$KEEP_SAMPLES"
  fi
  if ((KEEP_BEST)) && is_whole "$LABELED_SAMPLES_PATH"; then # or a kill came after it was kept
    for part in .meta.json ""; do
      cp "$LABELED_SAMPLES_PATH$part" "$best$part.new"
      mv -f "$best$part.new" "$best$part"
    done
  fi
  rm -rf "$GENERATE_SAMPLES_PATH"* "$LABELED_SAMPLES_PATH"*
  echo $((iter + 1)) >"$ITER_LOG_PATH.new"
  mv -f "$ITER_LOG_PATH.new" "$ITER_LOG_PATH"
  rm -rf "$sft_dir"
  iter=$((iter + 1))
done
