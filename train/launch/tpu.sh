#!/usr/bin/env bash
# A run on Cloud TPU slices, as queued resources:
#
#     train/launch/tpu.sh create NAME ZONE TYPE RUNTIME [SLICES] [gcloud options ...]
#     train/launch/tpu.sh run NAME ZONE PRESET [--section.key value ...]
#     train/launch/tpu.sh delete NAME ZONE
#
# For instance TYPE v5p-128, RUNTIME v2-alpha-tpuv5, and --spot. `create` does not wait:
# `gcloud compute tpus queued-resources list` shows when the slices are ACTIVE. `run`
# clones REPOSITORY (default: this checkout's origin) on every host, starts one process on
# each, and prints their output. The run directory must be on a mounted file system that
# all hosts can see. When stopped by maintenance or preemption, `run` exits with a nonzero
# status; the same command resumes the run.
set -euo pipefail
tpus=(gcloud compute tpus queued-resources)

usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

create() {
    [ $# -ge 4 ] || usage
    local name=$1 zone=$2 type=$3 runtime=$4 slices=1
    shift 4
    if [[ ${1:-} =~ ^[0-9]+$ ]]; then
        slices=$1
        shift
    fi
    local nodes=(--node-id="$name")
    if [ "$slices" -gt 1 ]; then
        nodes=(--node-count="$slices" --node-prefix="$name")
    fi
    "${tpus[@]}" create "$name" --zone="$zone" "${nodes[@]}" \
        --accelerator-type="$type" --runtime-version="$runtime" "$@"
}

run() {
    [ $# -ge 3 ] || usage
    local name=$1 zone=$2 source arguments
    shift 2
    source=${REPOSITORY:-$(git -C "$(dirname "$0")" remote get-url origin)}
    # Quoted once more, for the remote shell.
    printf -v source '%q' "$source"
    printf -v arguments '%q ' "$@"
    "${tpus[@]}" ssh "$name" --zone="$zone" --node=all --worker=all --command="
set -e
test -d usp_jax || git clone --quiet $source usp_jax
cd usp_jax
test -d .venv || python3 -m venv .venv
.venv/bin/python -m pip install --quiet '.[train]' 'jax[tpu]'
exec .venv/bin/python -m train $arguments \
    --distributed.coordinator auto --checkpoint.stopped-status 75"
}

delete() {
    [ $# -eq 2 ] || usage
    "${tpus[@]}" delete "$1" --zone="$2" --force --quiet
}

case ${1:-} in
    create | run | delete) "$@" ;;
    *) usage ;;
esac
