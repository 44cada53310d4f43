#!/usr/bin/env bash
#SBATCH --job-name=reinforce --nodes=1 --ntasks-per-node=8 --time=4:00:00 --exclusive
#SBATCH --requeue --open-mode=append
#SBATCH hetjob
#SBATCH --nodes=1 --ntasks-per-node=8 --exclusive
#SBATCH --requeue --signal=USR1@180
#
# REINFORCE as one heterogeneous job: the reward server on the first component, the actor on the second.
#
#   RM_NEMO_FILE=... ACTOR_NEMO_FILE=... TRAIN_DATA_PATH=... VALID_DATA_PATH=... RESULTS_DIR=... \
#     sbatch -A <account> -p <partition> scripts/slurm/reinforce.sh
#
# On other sizes than one node of 8 for each: sbatch --nodes=1 --ntasks-per-node=4 : --nodes=2 --ntasks-per-node=8 ...
# One task is started per device. More settings, all with defaults:
#   ACTOR_ARGS RM_ARGS          more overrides, quoted as for a shell: ACTOR_ARGS="trainer.ppo.max_steps=100"
#   CRITIC_PORT                 port of the reward server
#   CONTAINER MOUNTS            image and "--container-mounts=..." where the cluster runs containers; empty = none
#   PYTHON GPFS                 interpreter, and the checkout to run in
#
# The actor waits for the server as long as remote_critic_rm.init_timeout_s says. When either of them fails, the other is
# stopped and the job fails with its status; when the actor is done, the server is stopped and the job is done.
#
# Three minutes before the time limit Slurm warns the actor; it saves, and the job queues itself again. A job that is
# pre-empted, requeued (scontrol requeue) or killed outright goes on from the newest checkpoint; with
# trainer.ppo.save_interval in ACTOR_ARGS a kill costs less.
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then sed -n '/^#SBATCH/d;2,/^set /s/^# \{0,1\}//p' "$0"; exit; fi

: "${RM_NEMO_FILE:?the reward model, a .nemo file}" "${ACTOR_NEMO_FILE:?the policy to start from, a .nemo file}"
: "${TRAIN_DATA_PATH:?prompts to train on, a JSONL file}" "${VALID_DATA_PATH:?prompts to validate on, a JSONL file}"
: "${RESULTS_DIR:?a folder for results}"
: "${GPFS:=${SLURM_SUBMIT_DIR:-$PWD}}" "${PYTHON:=python}" "${CRITIC_PORT:=5567}" "${CONTAINER:=}" "${MOUNTS:=}"
eval "actor_args=(${ACTOR_ARGS:-})" "rm_args=(${RM_ARGS:-})"

if [[ ! -f $GPFS/scripts/online_rs.sh ]]; then
  echo "error: GPFS=$GPFS is not the checkout; submit from there, or set GPFS to it" >&2
  exit 1
fi
export PYTHONPATH="$GPFS${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
CRITIC_LOG_DIR=$RESULTS_DIR/critic_results ACTOR_LOG_DIR=$RESULTS_DIR/actor_results
mkdir -p "$CRITIC_LOG_DIR" "$ACTOR_LOG_DIR"
container=()
if [[ -n $CONTAINER ]]; then container=(--container-image="$CONTAINER" $MOUNTS); fi

# nodes and tasks of a component: SLURM_JOB_NUM_NODES_HET_GROUP_0, SLURM_NTASKS_PER_NODE_HET_GROUP_0, ...
nodes() { local name=SLURM_JOB_NUM_NODES_HET_GROUP_$1; echo "${!name}"; }
devices() { local name=SLURM_TASKS_PER_NODE_HET_GROUP_$1; echo "${!name%%(*}"; }

host_critic=$(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_0" | head -n1)
# a cluster of several nodes on one machine has names that only Slurm knows
getent hosts "$host_critic" >/dev/null || host_critic=$(scontrol show node "$host_critic" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)

srun --het-group=0 --open-mode=append --kill-on-bad-exit=1 "${container[@]}" \
  -o "$CRITIC_LOG_DIR/critic_output_${SLURM_JOB_ID}_%t.log" -e "$CRITIC_LOG_DIR/critic_error_${SLURM_JOB_ID}_%t.err" \
  "$PYTHON" "$GPFS"/examples/nlp/gpt/serve_reward_model.py \
  --config-path="$GPFS/examples/nlp/gpt/conf" --config-name=inference_rm \
  trainer.num_nodes="$(nodes 0)" trainer.devices="$(devices 0)" \
  rm_model_file="$RM_NEMO_FILE" inference.ip=0.0.0.0 inference.port="$CRITIC_PORT" "${rm_args[@]}" &
server=$!

# ranks end one another when one fails; with 1, the first to leave with 75, all saved, would have the others killed
srun --het-group=1 --open-mode=append --kill-on-bad-exit=0 "${container[@]}" \
  -o "$ACTOR_LOG_DIR/actor_output_${SLURM_JOB_ID}_%t.log" -e "$ACTOR_LOG_DIR/actor_error_${SLURM_JOB_ID}_%t.err" \
  "$PYTHON" "$GPFS"/examples/nlp/gpt/train_gpt_reinforce_actor.py \
  --config-path="$GPFS/examples/nlp/gpt/conf" --config-name=gpt_rs_actor \
  "model.data.data_prefix={train: [$TRAIN_DATA_PATH], validation: [$VALID_DATA_PATH], test: [$VALID_DATA_PATH]}" \
  pretrained_checkpoint.restore_from_path="$ACTOR_NEMO_FILE" \
  exp_manager.explicit_log_dir="$ACTOR_LOG_DIR" \
  trainer.num_nodes="$(nodes 1)" trainer.devices="$(devices 1)" \
  remote_critic_rm.reward_model.ip="$host_critic" remote_critic_rm.reward_model.port="$CRITIC_PORT" \
  "${actor_args[@]}" &
actor=$!

# ask the tasks of a component's steps to leave: they save and end, and so does their srun by itself
ask_to_leave() {
  local job=SLURM_JOB_ID_HET_GROUP_$1 step
  for step in $(squeue --noheader --steps --job "${!job}" --format %i | grep -E '\.[0-9]+$' || true); do
    scancel --signal=TERM "$step" || true
  done
}

# the first error of a component, with the file it is in
first_error() {
  grep -m 1 -H -E '^(\[rank [0-9]+\] )?error: ' "$1"/*_error_"${SLURM_JOB_ID}"_*.err | head -n 1 >&2 || echo "error: see $1" >&2
}

# scancel asks both components to leave as well, and leaves them Slurm's KillWait to do it
cancelled() {
  trap '' TERM
  wait "$server" "$actor" || true
  echo "error: cancelled; what the actor saved is in $ACTOR_LOG_DIR/checkpoints, and the same command goes on from it" >&2
  exit 75
}
trap cancelled TERM

# 75, or who does not listen yet, or no longer, is killed: 138 by Slurm's warning of the time limit, 143 by what asks to leave
on_purpose() { (($1 == 75 || $1 == 138 || $1 == 143)); }

status=0 left=0
wait -n -p first "$server" "$actor" || status=$?
if [[ $first == "$actor" ]]; then
  ask_to_leave 0
  wait "$server" || true
  if ((status)) && ! on_purpose "$status"; then first_error "$ACTOR_LOG_DIR"; fi
else
  ask_to_leave 1
  wait "$actor" || left=$?
  if on_purpose "$left" && { ((status == 0)) || on_purpose "$status"; }; then
    status=$left # both were told to leave, and the server was faster
  else
    echo "error: the reward server ended with status $status before the actor" >&2
    if ((status == 0)); then status=1; fi
    first_error "$CRITIC_LOG_DIR"
  fi
fi
if on_purpose "$status"; then # with everything saved
  trap '' TERM                # which is of the requeue, and no scancel
  scontrol requeue "$SLURM_JOB_ID"
  status=75
fi
exit "$status"
