#!/bin/bash
# clips: 8 ranks, 2 nodes of 4 devices
# Written by `vidit submit slurm`. By hand: sbatch '/data/it'"'"'s 100%/run0/jobs/001'/job.sh
#SBATCH --job-name=clips
#SBATCH --output="/data/it's 100%%/run0/jobs/001/output-%A_%a.log"
#SBATCH --open-mode=append
#SBATCH --array=0-1
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=a100:4
#SBATCH --mem=480G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --partition=gpu
#SBATCH --qos=normal
#SBATCH --constraint=gpu80gb
#SBATCH --export=HOME,USER,LANG,PATH,TERM,HF_HOME,TMPDIR
#SBATCH --requeue

set -u
job='/data/it'"'"'s 100%/run0/jobs/001' # code, output and verdicts of this job
cd -- /home/me/vidit || exit 1
case $SLURM_ARRAY_TASK_ID in
0)
  run='/data/it'"'"'s 100%/run0'
  command=(/env/bin/python -m vidit.cli train configs.clips train.seed=1 'run_dir=/data/it'"'"'s 100%/run0' launch.local=4)
  ;;
1)
  run='/data/it'"'"'s 100%/run1'
  command=(/env/bin/python -m vidit.cli train configs.clips train.seed=2 'run_dir=/data/it'"'"'s 100%/run1' launch.local=4)
  ;;
esac
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
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0
export NCCL_IB_HCA=mlx5_0,mlx5_1
module load apptainer/1.3 || exit 1

failures=$job/failures-$SLURM_ARRAY_TASK_ID
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
  [ -z "${exclude:-}" ] || scontrol update JobId="$id" ExcNodeList="$exclude" || exit 1
  sleep 600
  exit 1
}

if left "001/[^\"]*" true; then
  say "the run is done already"
  exit 0
fi
say "start"

# Every node in which the check fails is left out from now on.
sick=$job/sick/$VIDIT_ATTEMPT
mkdir -p -- "$sick"
export sick
run_step srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=64 bash -c 'timeout 600 "$@" || case $? in
  126 | 127) touch -- "$sick/unable" ;;
  *) touch -- "$sick/$SLURMD_NODENAME" ;;
  esac' check apptainer exec --nv --bind="$job" --bind="$run" --bind="$PWD" --bind=/scratch --pwd="$PWD" /shared/images/vidit.sif /env/bin/python -m cluster.health --json --gpus 4 --hardware a100_80gb --folder /scratch
if [ -e "$sick/unable" ]; then
  say "the check of the nodes cannot be run: see above, and health.command of the site"
  exit 1
fi
bad=$(find "$sick" -type f -printf '%f,')
if [ "$bad" ] && [ -z "$asked" ]; then
  before=$(scontrol -o show job "$id" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
  exclude=${bad%,} rc=1
  [ "$before" = "(null)" ] || exclude=$before,$exclude
  echo check >>"$failures"
  times=$(grep -cx check "$failures")
  [ "$times" -gt 5 ] || requeue "the check found ${bad%,} unhealthy"
  say "the check found ${bad%,} unhealthy, the ${times}th time; is it the check?"
  exit 1
fi

if [ -z "$asked" ]; then
  run_step srun --kill-on-bad-exit=1 --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=64 apptainer exec --nv --bind="$job" --bind="$run" --bind="$PWD" --bind=/scratch --pwd="$PWD" /shared/images/vidit.sif "${command[@]}"
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
