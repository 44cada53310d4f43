#!/usr/bin/env bash
#SBATCH --job-name=online_rs --nodes=1 --ntasks-per-node=8 --time=4:00:00 --exclusive
#SBATCH --requeue --open-mode=append --signal=USR1@180
#
# The online loop of scripts/online_rs.sh as one job: sampler, labeler and SFT are job steps, one task per device.
#
#   PROMPTS_PATH=... POLICY_MODEL_PATH=... REWARD_MODEL_PATH=... RESULT_PATH=... \
#     sbatch -A <account> -p <partition> scripts/slurm/online_rs.sh
#
# Takes the settings of scripts/online_rs.sh from the environment, and CONTAINER, MOUNTS as scripts/slurm/reinforce.sh.
# Three minutes before the time limit Slurm warns the running step; it saves, and the job queues itself again. A job that
# is pre-empted, requeued (scontrol requeue) or killed outright goes on in the same way, in the stage it was in; with
# checkpoint_interval in SAMPLER_ARGS and LABELER_ARGS, and trainer.sft.save_interval in SFT_ARGS, a kill costs less.
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then sed -n '/^#SBATCH/d;2,/^set /s/^# \{0,1\}//p' "$0"; exit; fi

: "${GPFS:=${SLURM_SUBMIT_DIR:-$PWD}}" "${PYTHON:=python}" "${CONTAINER:=}" "${MOUNTS:=}"
if [[ ! -f $GPFS/scripts/online_rs.sh ]]; then
  echo "error: GPFS=$GPFS is not the checkout; submit from there, or set GPFS to it" >&2
  exit 1
fi
devices=${SLURM_TASKS_PER_NODE%%(*}
size="trainer.num_nodes=$SLURM_JOB_NUM_NODES trainer.devices=$devices"
export PYTHON PYTHONUNBUFFERED=1
export SAMPLER_ARGS="$size ${SAMPLER_ARGS:-}" LABELER_ARGS="$size ${LABELER_ARGS:-}" SFT_ARGS="$size ${SFT_ARGS:-}"
# ranks end one another when one fails; with 1, the first to leave with 75, all saved, would have the others killed
export LAUNCH="srun --kill-on-bad-exit=0 ${CONTAINER:+--container-image=$CONTAINER} $MOUNTS"

# scancel asks the stage to leave as well, and leaves it Slurm's KillWait to save
cancelled() {
  while squeue --noheader --steps --job "$SLURM_JOB_ID" --format %i | grep -qE '\.[0-9]+$'; do sleep 0.2; done
  echo "error: cancelled; the same command goes on in the stage it was in" >&2
  exit 75
}
trap cancelled TERM

status=0
bash "$GPFS/scripts/online_rs.sh" || status=$?
if ((status == 75)); then # stopped on purpose, with everything saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
