#!/usr/bin/env bash
# A run under SLURM, submitted from the checkout, which must be visible to all nodes:
#
#     sbatch --nodes 2 train/launch/slurm.sh PRESET [--section.key value ...]
#
# Starts one process per GPU. Options given to sbatch override those below. PYTHON sets
# the interpreter.
#
#SBATCH --job-name=usp_jax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
# Requeue the job when a node fails or the job is preempted.
#SBATCH --requeue
# Send SIGTERM to this script 300 seconds before the time limit, to write a checkpoint.
#SBATCH --signal=B:TERM@300
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?must be started by sbatch}" || exit

# Exit status of a run that stopped at SIGTERM; a complete run exits with 0.
stopped=75
restarts=20

srun --kill-on-bad-exit=1 "${PYTHON:-python3}" -m train "$@" \
    --distributed.coordinator auto --checkpoint.stopped-status "$stopped" &
step=$!
# Signal the processes, not srun: they stop together after their current step.
trap 'scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
wait "$step"
status=$?
# The signal interrupts the first wait.
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
    status=$?
done

case $status in
    0) echo "the run is complete" ;;
    # Errors that need a person.
    1 | 2) echo "the run has failed" ;;
    *)
        if [ "${SLURM_RESTART_COUNT:-0}" -lt "$restarts" ]; then
            echo "status $status: the run will resume from its last checkpoint"
            scontrol requeue "$SLURM_JOB_ID"
        fi
        ;;
esac
exit "$status"
