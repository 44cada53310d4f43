#!/usr/bin/env bash
# From nothing to an aligned model on film reviews, on a laptop's CPU.
#
#   bash scripts/quickstart.sh [--reinforce | --math] [--tiny] [--seed N]
#
#   (neither)    three iterations of online rejection sampling
#   --reinforce  REINFORCE with RLOO instead, against a reward server over HTTP
#   --math       sums instead of films: REINFORCE with a reward function that checks answers, and no reward model
#   --tiny       a tiny random model instead of SmolLM2-135M-Instruct: shows the machinery in about a minute
#   --seed N     base seed of training, sampling and data (default 1234)
#
# Results go to $QUICKSTART_DIR (default results/quickstart, with _reinforce or _math and _tiny behind it): report.html to look at,
# summary.json, reward.png, samples.md, all models. Run again after a kill, it goes on where it was. To start over, remove
# the folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tiny=false reinforce=false math=false seed=1234
while (($#)); do
  case $1 in
    --tiny) tiny=true ;;
    --reinforce) reinforce=true ;;
    --math) math=true ;;
    --seed) seed=${2:?--seed needs a number}; shift ;;
    -h | --help) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: unknown option $1; see --help" >&2; exit 1 ;;
  esac
  shift
done

if $math && $reinforce; then
  echo "error: --math is REINFORCE already; give one of --math and --reinforce" >&2
  exit 1
fi
out=${QUICKSTART_DIR:-results/quickstart$($reinforce && echo _reinforce || true)$($math && echo _math || true)$($tiny && echo _tiny || true)}
source scripts/quickstart/prepare.sh
results_in "$out" "reinforce=$reinforce tiny=$tiny seed=$seed$($math && echo " math=true" || true)" QUICKSTART_DIR

# --- sizes ----------------------------------------------------------------------------------------------------------
iterations=3
if $math; then
  base=(--random-init conf/model/arithmetic.yaml --dtype 32) precision=32
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # so small a model gains nothing by more; the other core runs functions
  if $tiny; then
    data=(--numbers 10 --held-out 8 --problems 16 --written-down 320) pupil_steps=5 batch=64 actor_steps=2
    actor_args=(model.ppo.num_rollout_samples=8 model.ppo.num_rollout_per_prompt=4 model.global_batch_size=32)
  else
    data=(--numbers 30 --held-out 128 --problems 768 --written-down 40000) pupil_steps=1200 batch=64 actor_steps=72
    actor_args=(model.ppo.num_rollout_samples=64 model.ppo.num_rollout_per_prompt=8 model.global_batch_size=512)
  fi
elif $tiny; then
  data=(--prompts 24 --held-out-prompts 8 --pairs 200 --held-out-pairs 50)
  per_iteration=8 n=4 tokens=12 held_out_n=4 micro_batch=8 sft_batch=4 lr=3e-3
  actor_args=(model.ppo.num_rollout_samples=4 model.ppo.num_rollout_per_prompt=4 model.global_batch_size=16 model.micro_batch_size=16 model.optim.lr=1e-2
    trainer.ppo.max_steps=6 trainer.ppo.val_check_interval=3)
else
  data=(--prompts 768 --held-out-prompts 64 --pairs 1600 --held-out-pairs 300)
  per_iteration=256 n=8 tokens=12 held_out_n=4 micro_batch=32 sft_batch=32 lr=1e-4
  actor_args=(model.ppo.num_rollout_samples=48 model.ppo.num_rollout_per_prompt=8 model.global_batch_size=384
    model.micro_batch_size=32 model.ppo.forward_micro_batch_size=64 model.optim.lr=9e-5
    trainer.ppo.max_steps=6 trainer.ppo.val_check_interval=3)
fi

# --- the clock counts from here, over restarts: the time between a kill and the next start is not counted --------------
clock=$out/seconds_before
begin=$(cat "$clock" 2>/dev/null || echo 0)
server='' actor=''
finish() {
  echo $((begin + SECONDS)) >"$clock"
  local process
  for process in $actor $server; do # each is asked to leave, and leaves when it has saved what it has
    if kill "$process" 2>/dev/null; then wait "$process" || true; fi
  done
}
trap finish EXIT
SECONDS=0

step "models and data"
if $math; then
  import_model random_model "${base[@]}"
  [[ -f $out/data/pupil.jsonl ]] || "$PYTHON" scripts/quickstart/make_arithmetic.py --folder "$out/data" --seed "$seed" \
    "${data[@]}"
else
  import_model sft_model "${base[@]}"
  import_model backbone "${backbone[@]}"
  film_reviews --repeat-held-out "$held_out_n" "${data[@]}"
  train_reward_model reward_model "$out/data/pairs.jsonl" "$out/data/held_out_pairs.jsonl"
fi

# three iterations of online rejection sampling; each policy is kept, and all are measured at the end
offline() {
  local loop=$out/online_rs policies=$out/policies i
  mkdir -p "$policies"
  ln -f "$out/sft_model.nemo" "$policies/iteration_0.nemo"
  for ((i = 1; i <= iterations; i++)); do
    [[ -f $policies/iteration_$i.nemo ]] && continue
    step "iteration $i of $iterations"
    TRAINING_ITERS=$i ROLLOUT_BATCH_SIZE=$per_iteration SEED=$seed \
      PROMPTS_PATH=$out/data/prompts.jsonl POLICY_MODEL_PATH=$out/sft_model.nemo REWARD_MODEL_PATH=$out/reward_model.nemo \
      RESULT_PATH=$loop \
      SAMPLER_ARGS="data.n=$n data.micro_batch_size=$micro_batch inference.tokens_to_generate=$tokens trainer.precision=$precision checkpoint_interval=1" \
      LABELER_ARGS="data.micro_batch_size=64 trainer.precision=$precision export_reward=True" \
      SFT_ARGS="'model.data.train_ds.prompt_template=\"{input}{output}\"' model.data.train_ds.add_eos=False model.data.train_ds.global_batch_size=$sft_batch model.data.train_ds.micro_batch_size=$sft_batch ~model.optim.sched model.optim.lr=$lr trainer.sft.max_epochs=1 trainer.precision=$precision trainer.sft.save_interval=0" \
      bash scripts/online_rs.sh
    ln -f "$loop/checkpoints/megatron_gpt_sft.nemo" "$policies/iteration_$i.nemo"
  done
  if [[ ! -f $out/evaluation.json ]]; then
    step "evaluation on held-out prompts"
    "$PYTHON" examples/nlp/gpt/offline/evaluate_policy.py \
      policy_files="[$(seq -s, -f "$policies/iteration_%g.nemo" 0 $iterations)]" \
      initial_policy_file="$out/sft_model.nemo" reward_model_file="$out/reward_model.nemo" \
      data.file_names="[$out/data/held_out_prompts.jsonl]" data.n="$held_out_n" data.micro_batch_size=64 \
      inference.tokens_to_generate="$tokens" trainer.precision="$precision" seed="$seed" \
      output_file="$out/evaluation.json"
  fi
}

# REINFORCE against a reward server of its own
online() {
  [[ -f $out/actor/checkpoints/megatron_gpt_rs_actor.nemo ]] && return
  step "reward server and actor"
  local port
  port=$((RANDOM % 10000 + 10000)) # below those that systems give to connections by themselves
  "$PYTHON" examples/nlp/gpt/serve_reward_model.py rm_model_file="$out/reward_model.nemo" inference.port="$port" \
    inference.inference_micro_batch_size=32 model.reward_standardization.enable=True trainer.precision="$precision" \
    >"$out/reward_server.log" 2>&1 &
  server=$!
  "$PYTHON" examples/nlp/gpt/train_gpt_reinforce_actor.py \
    "model.data.data_prefix={train: [$out/data/prompts.jsonl], validation: [$out/data/repeated_held_out_prompts.jsonl], test: [$out/data/repeated_held_out_prompts.jsonl]}" \
    pretrained_checkpoint.restore_from_path="$out/sft_model.nemo" model.seed="$seed" \
    exp_manager.explicit_log_dir="$out/actor" trainer.precision="$precision" \
    trainer.ppo.baseline=RLOO trainer.ppo.initial_policy_kl_penalty=0.1 trainer.ppo.save_interval=0 \
    model.ppo.length_params.max_length="$tokens" \
    model.ppo.num_val_samples=1024 model.ppo.rollout_micro_batch_size=64 model.ppo.val_rollout_micro_batch_size=256 \
    '~model.optim.sched' model.optim.weight_decay=0.01 \
    remote_critic_rm.reward_model.ip=127.0.0.1 remote_critic_rm.reward_model.port="$port" \
    remote_critic_rm.init_timeout_s=120 "${actor_args[@]}" &
  actor=$!
  local status=0
  wait -n "$server" "$actor" || status=$?
  if ! kill -0 "$server" 2>/dev/null; then
    echo "error: the reward server has ended; its log, $out/reward_server.log, says: $(tail -n 1 "$out/reward_server.log")" >&2
    exit 1
  fi
  actor=''
  echo "the reward server is asked to leave"
  kill "$server" && wait "$server" || true
  server=''
  if ((status)); then exit "$status"; fi
}

# sums: first as a careless pupil writes them down, then for what a function says of the answers
arithmetic() {
  local function=nemo_aligner.rewards.math:boxed_answer
  if [[ ! -f $out/sft_model.nemo ]]; then
    step "learn to write sums as a careless pupil does"
    "$PYTHON" examples/nlp/gpt/train_gpt_sft.py \
      model.restore_from_path="$out/random_model.nemo" model.data.train_ds.file_path="$out/data/pupil.jsonl" \
      model.data.train_ds.prompt_template="'{input}{output}'" ++trainer.sft.skip_validation=True \
      model.data.train_ds.global_batch_size="$batch" model.data.train_ds.micro_batch_size="$batch" \
      model.optim.lr=3e-3 model.optim.sched.warmup_steps=20 model.optim.sched.constant_steps=0 model.optim.sched.min_lr=1e-4 model.seed="$seed" \
      trainer.sft.max_epochs=2 trainer.sft.max_steps="$pupil_steps" trainer.precision="$precision" trainer.sft.save_interval=400 \
      exp_manager.checkpoint_callback_params.monitor=global_step exp_manager.checkpoint_callback_params.mode=max \
      exp_manager.explicit_log_dir="$out/pupil"
    ln -f "$out/pupil/checkpoints/megatron_gpt_sft.nemo" "$out/sft_model.nemo"
  fi
  local trained=$out/actor/checkpoints/megatron_gpt_rs_actor.nemo
  if [[ ! -f $trained ]]; then
    step "learn from a function that checks the answers"
    "$PYTHON" examples/nlp/gpt/train_gpt_reinforce_actor.py reward_function="$function" \
      "model.data.data_prefix={train: [$out/data/problems.jsonl], validation: [$out/data/held_out.jsonl], test: [$out/data/held_out.jsonl]}" \
      pretrained_checkpoint.restore_from_path="$out/sft_model.nemo" model.seed="$seed" \
      exp_manager.explicit_log_dir="$out/actor" trainer.precision="$precision" \
      trainer.ppo.baseline=RLOO trainer.ppo.initial_policy_kl_penalty=0.01 trainer.ppo.max_epochs=100 \
      trainer.ppo.max_steps="$actor_steps" trainer.ppo.val_check_interval=12 trainer.ppo.save_interval=24 \
      model.ppo.length_params.max_length=14 model.ppo.num_val_samples=1024 model.ppo.rollout_micro_batch_size=64 \
      model.ppo.val_rollout_micro_batch_size=256 model.micro_batch_size=64 \
      '~model.optim.sched' model.optim.lr=2e-3 model.optim.weight_decay=0.0 "${actor_args[@]}"
  fi
  if [[ ! -f $out/evaluation.json ]]; then
    step "evaluation on sums that it never saw"
    "$PYTHON" examples/nlp/gpt/offline/evaluate_policy.py policy_files="[$out/sft_model.nemo,$trained]" \
      initial_policy_file="$out/sft_model.nemo" reward_function="$function" data.file_names="[$out/data/held_out.jsonl]" \
      data.n=4 data.micro_batch_size=64 inference.tokens_to_generate=14 trainer.precision="$precision" seed="$seed" \
      output_file="$out/evaluation.json"
  fi
}

if $math; then arithmetic; elif $reinforce; then online; else offline; fi

step "report"
echo $((begin + SECONDS)) >"$clock"
"$PYTHON" -m nemo_aligner.report "$out"
"$PYTHON" scripts/quickstart/report.py --folder "$out" --seconds "$((begin + SECONDS))" $($reinforce && echo --reinforce || true) \
  $($math && echo --math || true)
