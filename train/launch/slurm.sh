#!/usr/bin/env bash
# A run under SLURM, submitted from the checkout, which all nodes must see:
#
#     sbatch --nodes 2 train/launch/slurm.sh PRESET [--section.key value ...]
#
# One process a GPU. Options of sbatch win over those below. PYTHON names the interpreter.
#
#SBATCH --job-name=usp_jax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
# Again after a node has failed or the job was preempted.
#SBATCH --requeue
# To this script, 300 seconds before the time is over: long enough for a checkpoint.
#SBATCH --signal=B:TERM@300
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?must be started by sbatch}" || exit

# A run that was told to stop in time ends with this, one that is complete with 0.
stopped=75
restarts=20

srun --kill-on-bad-exit=1 "${PYTHON:-python3}" -m train "$@" \
    --distributed.coordinator auto --checkpoint.stopped-status "$stopped" &
step=$!
# To the processes, not to srun: they stop together after the step they are in.
trap 'scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
wait "$step"
status=$?
# The signal has ended the first wait.
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
    status=$?
done

case $status in
    0) echo "the run is complete" ;;
    # What somebody has to put right.
    1 | 2) echo "the run has failed" ;;
    *)
        if [ "${SLURM_RESTART_COUNT:-0}" -lt "$restarts" ]; then
            echo "status $status: the run goes on from its last checkpoint"
            scontrol requeue "$SLURM_JOB_ID"
        fi
        ;;
esac
exit "$status"
