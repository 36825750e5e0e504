#!/bin/bash
# tracerl on TPU VMs, one slice or several, from the machine where you have gcloud.
#
#   export NAME=first ZONE=us-east5-a TYPE=v5p-128
#   launch/tpu_vm.sh create        ask for the slices (a queued resource) and wait for them
#   launch/tpu_vm.sh setup         install the committed state of this checkout on every host
#   launch/tpu_vm.sh devices       does every host see all chips?
#   launch/tpu_vm.sh run rl --config rl_sdar_8b_math --config.model.path=/shared/SDAR-8B-Chat \
#       --config.task.path=/shared/math_train.jsonl --config.task.eval_path=/shared/math500.jsonl \
#       --config.runs_dir=/shared/runs --config.name=first --config.checkpoint.every=1
#   launch/tpu_vm.sh logs          the last lines of the first host
#   launch/tpu_vm.sh status        is it running, on which hosts?
#   launch/tpu_vm.sh stop          save and end (how soon: docs/pods.md)
#   launch/tpu_vm.sh delete        give the slices back
#
# Variables:
#   NAME, ZONE, TYPE   of the queued resource; TYPE is an accelerator type, such as v5p-128 or v6e-64
#   RUNTIME            runtime version of the VMs (default: v2-alpha-tpuv5; v6e: v2-alpha-tpuv6e)
#   SLICES             of this type (default: 1)
#   SHARED             an NFS export HOST:/PATH that setup mounts at /shared on every host: for run folders, models, data
#   MAX_RESTARTS       starts after a crash or a lost host (default: 5)
#   CREATE_FLAGS       more flags of `gcloud .. queued-resources create`: --spot, --reserved, --network=..
#
# `run` starts in the home folder of each host: put a config of your own on /shared and name it by its full path.
# After a pre-emption: delete, create, setup, and the same run, which continues from its last checkpoint.
# shellcheck disable=SC2016  # what is in single quotes is for the hosts to expand
set -euo pipefail

usage() {
    sed -n '2,/^# shellcheck/{/^# shellcheck/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
}

[ $# -gt 0 ] || usage
: "${NAME:?set NAME, the name of the queued resource}" "${ZONE:?set ZONE, as in us-east5-a}"
SLICES=${SLICES:-1}
MAX_RESTARTS=${MAX_RESTARTS:-5}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5}

tpus() {
    gcloud alpha compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"
}

everywhere() { # COMMAND: on every host of every slice
    tpus ssh --node=all --worker=all --command="$1"
}

create() {
    : "${TYPE:?set TYPE, the accelerator type, as in v5p-128}"
    local nodes=(--node-id="$NAME")
    if [ "$SLICES" -gt 1 ]; then
        nodes=(--node-count="$SLICES" --node-prefix="$NAME")
    fi
    # shellcheck disable=SC2086  # several words
    tpus create --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${nodes[@]}" ${CREATE_FLAGS:-}
    local state=
    while [ "$state" != ACTIVE ]; do
        sleep 30
        state=$(tpus describe --format="value(state.state)")
        echo "$(date +%T) $state"
        case $state in
            FAILED | SUSPENDED) exit 1 ;;
        esac
    done
}

setup() {
    local root archive
    root=$(cd "$(dirname "$0")/.." && pwd)
    archive=$(mktemp --suffix=.tar.gz)
    git -C "$root" archive --prefix=tracerl/ -o "$archive" HEAD
    gcloud alpha compute tpus queued-resources scp "$archive" "$NAME:tracerl.tar.gz" --zone="$ZONE" --node=all --worker=all
    rm "$archive"
    # The VMs' own Python is older than the 3.11 that is needed.
    everywhere 'set -e
        rm -rf tracerl && tar xf tracerl.tar.gz
        python3 -m pip install --quiet --user uv
        python3 -m uv venv --quiet --clear --seed --python 3.12 venv # with pip, which fetches task rows of PyPI
        python3 -m uv pip install --quiet --python venv/bin/python "./tracerl[tpu]"
        venv/bin/tracerl --version'
    if [ -n "${SHARED:-}" ]; then
        everywhere "sudo apt-get install -qq -y nfs-common && sudo mkdir -p /shared &&
            { mountpoint -q /shared || sudo mount -t nfs -o hard $SHARED /shared; } && sudo chmod a+rwx /shared"
    fi
}

devices() {
    everywhere 'venv/bin/python -c "
import jax
jax.distributed.initialize()
print(f\"process {jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of {jax.device_count()} chips\")"'
}

run() {
    [ $# -gt 0 ] || usage
    # In a session of its own, so that it goes on when this connection ends. When a process fails, those of the other
    # hosts notice and end too; on each host `tracerl launch` starts its own again, and they meet at the coordinator.
    everywhere "if kill -0 \$(cat tracerl.pid 2>/dev/null) 2>/dev/null; then echo 'already running'; exit 1; fi
        setsid venv/bin/tracerl launch --max_restarts=$MAX_RESTARTS -- $(printf '%q ' "$@")> tracerl.log 2>&1 < /dev/null &
        echo \$! > tracerl.pid"
}

stop() {
    everywhere 'kill -TERM $(cat tracerl.pid) && while kill -0 $(cat tracerl.pid) 2>/dev/null; do sleep 1; done
        tail -n 3 tracerl.log'
}

status() {
    tpus describe --format="value(state.state)"
    everywhere 'if kill -0 $(cat tracerl.pid 2>/dev/null) 2>/dev/null; then echo "$(hostname): running"
        else echo "$(hostname): not running: $(tail -n 1 tracerl.log 2>/dev/null)"; fi'
}

logs() {
    tpus ssh --node=0 --worker=0 --command="tail -n ${1:-50} tracerl.log"
}

delete() {
    tpus delete --force --quiet
}

case $1 in
    create | setup | devices | run | stop | status | logs | delete) "$@" ;;
    *) usage ;;
esac
