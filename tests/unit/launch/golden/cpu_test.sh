#!/bin/bash
# clips: 2 ranks, 2 nodes of 1 devices
# Written by `vidit submit slurm`. By hand: sbatch '/data/it'"'"'s 100%/run0/jobs/001'/job.sh
#SBATCH --job-name=clips
#SBATCH --output="/data/it's 100%%/run0/jobs/001/output-%j.log"
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=00:10:00
#SBATCH --signal=B:USR1@30
#SBATCH --export=HOME,USER,LANG,PATH,TERM
#SBATCH --requeue

set -u
job='/data/it'"'"'s 100%/run0/jobs/001' # code, output and verdicts of this job
cd -- /home/me/vidit || exit 1
run='/data/it'"'"'s 100%/run0'
command=(/env/bin/python -m vidit.cli train configs.clips 'run_dir=/data/it'"'"'s 100%/run0' launch.local=1)
mkdir -p -- "$run" || exit 1

# One start of the run: a requeued job has the same id and starts again.
export VIDIT_ATTEMPT=001/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
# A task of an array by its place: the number of the last one is that of all.
id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
id=${id:-$SLURM_JOB_ID}
export PYTHONPATH=$job/source:$PWD PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export SLURM_EXPORT_ENV=ALL
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
export MASTER_ADDR MASTER_PORT=$((20000 + (7 * SLURM_JOB_ID + 4999 * ${SLURM_RESTART_COUNT:-0}) % 10000))
export GLOO_SOCKET_IFNAME=lo
export OMP_NUM_THREADS=1
export CUDA_VISIBLE_DEVICES=''
export TORCH_CPP_LOG_LEVEL=ERROR

failures=$job/failures
say() { echo "job $VIDIT_ATTEMPT on $SLURM_JOB_NODELIST: $*"; }

# What the run left in stopped.json: exit codes are those of whoever died last.
left() { grep -qsE "^.\"attempt\": \"$1\", \"done\": $2," "$run/stopped.json"; }

# Runs a step, passes requests to stop on to its ranks, and keeps its exit code.
asked='' step=''
stop() {
  asked=yes again=yes
  [ -z "$step" ] || kill -s USR1 "$step" 2>/dev/null
}
trap stop USR1 TERM
run_step() {
  "$@" &
  step=$! again=yes
  [ -z "$asked" ] || kill -s USR1 "$step" 2>/dev/null
  while [ "$again" ]; do
    again=''
    wait "$step"
    rc=$?
  done
  step=''
}

# Back into the queue under the same id; SLURM then ends this script.
requeue() {
  say "$* -> requeue"
  trap '' USR1 TERM
  scontrol requeue "$id" || exit 1
  sleep 600
  exit 1
}

if left "001/[^\"]*" true; then
  say "the run is done already"
  exit 0
fi
say "start"

if [ -z "$asked" ]; then
  run_step srun --kill-on-bad-exit=1 --nodes=2 --ntasks=2 --ntasks-per-node=1 "${command[@]}"
else
  rc=0
fi

if left "$VIDIT_ATTEMPT" true; then
  say "done"
  exit 0
fi
if [ "$asked" ] || left "$VIDIT_ATTEMPT" false; then
  # A job that is cancelled, requeued by SLURM or preempted without grace is on its way out, and must not come back.
  state=$(squeue -h -j "$id" -o %T)
  [ "$state" = RUNNING ] && requeue "stopped and saved"
  say "stopped while $state"
  exit "$rc"
fi
if grep -qsE "^.\"attempt\": \"$VIDIT_ATTEMPT\", \"retry\": false," "$run/failed.json"; then
  say "failed with exit code $rc of what would come again"
  exit "$rc"
fi
newest=$(find "$run/checkpoints" -maxdepth 1 -name 'step-????????' -printf '%f\n' 2>/dev/null | sort | tail -n1)
echo "${newest:-none}" >>"$failures"
times=$(grep -cx -- "${newest:-none}" "$failures")
say "failed with exit code $rc, newest checkpoint ${newest:-none}, failures there: $times"
[ "$times" -gt 2 ] || requeue "failure $times of 2 that are forgiven without progress"
exit "$rc"
