#!/usr/bin/env bash
# A real Slurm cluster of two nodes on this one machine, to try job scripts before a real cluster sees them.
#
#   bash scripts/slurm/local_cluster.sh start     starts it, and prints the line that points sbatch and srun at it
#   bash scripts/slurm/local_cluster.sh stop      stops it; running jobs are killed
#
# Needs Debian's packages slurm-wlm and munge; as root it installs them. State is kept in $SLURM_LOCAL_DIR (default
# /tmp/nemo_aligner_slurm). Each node claims $SLURM_LOCAL_CPUS processors (default 8), whatever the machine has. The
# daemons listen on $SLURM_LOCAL_PORT (default 26817) and the two ports after it. Jobs of the partition `urgent` take the
# nodes of those of `local`, the default, which are requeued; a requeued job begins again after some ten seconds.
set -euo pipefail

state=${SLURM_LOCAL_DIR:-/tmp/nemo_aligner_slurm} cpus=${SLURM_LOCAL_CPUS:-8} port=${SLURM_LOCAL_PORT:-26817}
export SLURM_CONF=$state/slurm.conf PATH=$PATH:/usr/sbin:/sbin

die() { echo "error: $*" >&2; exit 1; }

install_packages() {
  command -v slurmctld >/dev/null && command -v munged >/dev/null && return
  [[ $(id -u) == 0 ]] || die "slurmctld and munged are not installed; as root: apt-get install slurm-wlm munge"
  command -v apt-get >/dev/null || die "no apt-get here; install Slurm and munge with what this system has"
  echo "installing slurm-wlm and munge" >&2
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge; } >/dev/null ||
    die "apt-get could not install slurm-wlm and munge"
}

write_config() {
  local host
  host=$(hostname -s)
  cat >"$SLURM_CONF" <<EOF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$state/munge.socket,cred_expire=10
CredType=cred/munge
MpiDefault=none
StateSaveLocation=$state/state
SlurmctldPidFile=$state/slurmctld.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdSpoolDir=$state/spool.%n
SlurmdPidFile=$state/slurmd.%n.pid
SlurmdLogFile=$state/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,bf_continue,sched_interval=1,sched_min_interval=500000
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=15
NodeName=n0 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=$cpus State=UNKNOWN
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=$cpus State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=local Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1
PartitionName=urgent Nodes=n0,n1 MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=2
EOF
}

start() {
  install_packages
  if [[ -f $state/slurmctld.pid ]] && kill -0 "$(<"$state/slurmctld.pid")" 2>/dev/null; then
    echo "export SLURM_CONF=$SLURM_CONF"
    return
  fi
  if [[ -d $state && -n $(ls -A "$state") && ! -f $state/slurm.conf ]]; then
    die "$state holds other things; set SLURM_LOCAL_DIR to a folder of its own"
  fi
  rm -rf "$state"
  mkdir -p "$state/state" "$state/spool.n0" "$state/spool.n1"
  chmod 755 "$state"
  write_config
  dd if=/dev/urandom of="$state/munge.key" bs=1024 count=1 status=none
  chmod 600 "$state/munge.key"
  munged --force --key-file="$state/munge.key" --socket="$state/munge.socket" --pid-file="$state/munged.pid" \
    --log-file="$state/munged.log" --seed-file="$state/munged.seed" 2>/dev/null || die "munged: $(tail -1 "$state/munged.log")"
  slurmctld -i || die "slurmctld: see $state/slurmctld.log"
  for node in n0 n1; do slurmd -N $node || die "slurmd: see $state/slurmd.$node.log"; done
  for ((i = 0; i < 60; i++)); do
    if [[ $(sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l) == 2 ]]; then
      echo "export SLURM_CONF=$SLURM_CONF"
      return
    fi
    sleep 0.5
  done
  sinfo -N -l >&2 || true
  die "the nodes are not ready; see $state/*.log"
}

stop() {
  if command -v scancel >/dev/null && [[ -f $SLURM_CONF ]]; then scancel --full --state=RUNNING 2>/dev/null || true; fi
  for name in slurmd.n0 slurmd.n1 slurmctld munged; do
    if [[ -f $state/$name.pid ]]; then kill "$(<"$state/$name.pid")" 2>/dev/null || true; fi
  done
  echo "stopped; logs are in $state" >&2
}

case ${1:-} in
  start) start ;;
  stop) stop ;;
  *) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 1 ;;
esac
