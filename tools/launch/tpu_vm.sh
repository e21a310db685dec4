#!/usr/bin/env bash
# Trains a run on a TPU VM with any number of hosts. Call it where the checkout is: on a laptop, or, for `run`, on a
# small machine that is not switched off.
#
#   tpu_vm.sh create    request the TPU and wait until it is ready
#   tpu_vm.sh setup     copy this checkout to all hosts, install it, mount the shared disk if there is one
#   tpu_vm.sh start     start training on all hosts; it continues without this machine
#   tpu_vm.sh logs      follow what the first host prints
#   tpu_vm.sh status    the state of the TPU, and of the run on each host: running, lost, or its exit code
#   tpu_vm.sh run       create, setup and start, and start again until the run is done (exit code 0), cannot continue (2
#                       or 3), or has failed MAX_FAILURES times; being stopped or preempted does not count as a failure
#   tpu_vm.sh stop      send SIGTERM: save and exit with code 75. A `run` that is still active would start it again
#   tpu_vm.sh delete    release the TPU; the bucket or shared disk is kept
#
# Every variable can be set in the environment. Needs gcloud, logged in (`gcloud auth login`).
set -euo pipefail

PROJECT=${PROJECT:?set PROJECT to the name of the cloud project}
ZONE=${ZONE:?set ZONE, such as us-west4-a}
NAME=${NAME:-nfnet}                                       # name of the TPU and of the request for it
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v5litepod-256}       # 64 hosts of 4 chips; `nfnet plan` calls it v5e:16x16
RUNTIME_VERSION=${RUNTIME_VERSION:-v2-alpha-tpuv5-lite}   # image of the hosts; belongs to the accelerator type
CAPACITY=${CAPACITY---spot}                               # --spot, --reserved, or empty: on demand
BUCKET=${BUCKET-}                                         # place of data and runs, such as gs://mine; or set NFS
NFS=${NFS-}                                               # shared disk instead of a bucket, such as 10.0.0.2:/shared
[[ -n $BUCKET || -n $NFS ]] || { echo "set BUCKET, such as gs://mine, or NFS, such as 10.0.0.2:/shared" >&2; exit 2; }
[[ -z $BUCKET || -z $NFS ]] || { echo "set BUCKET or NFS, not both" >&2; exit 2; }
SHARED=${SHARED:-${BUCKET:-/mnt/shared}}                  # the bucket, or where the hosts mount the shared disk
DATA=${DATA:-$SHARED/imagenet}                            # what tools/prepare_imagenet.py wrote
WORKDIR=${WORKDIR:-$SHARED/runs/f0}
RECIPE=${RECIPE:-recipes/nfnet_imagenet.py:variant=f0}
OPTIONS=${OPTIONS:---execution.num-microbatches 256}      # more options of `nfnet train`, in the syntax of a shell
POLL_S=${POLL_S:-30}                                      # seconds between two checks, and before a new start
MAX_FAILURES=${MAX_FAILURES:-10}                          # total number of failures after which `run` ends
MAX_SILENT_POLLS=${MAX_SILENT_POLLS:-20}                  # checks without an answer after which the TPU is replaced

cd "$(dirname "$0")/../.."
self=$PWD/tools/launch/tpu_vm.sh
where=(--project="$PROJECT" --zone="$ZONE")

on_host() { # WORKER COMMAND
    gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker="$1" --command="$2"
}

state_of() { # queued-resources|tpu-vm FIELD: prints the state, NOT_FOUND, or UNKNOWN if there was no answer
    local answer
    if answer=$(gcloud compute tpus "$1" describe "$NAME" "${where[@]}" --format="value($2)" 2>&1); then
        echo "${answer##*$'\n'}"
    elif [[ $answer == *NOT_FOUND* ]]; then
        echo NOT_FOUND
    else
        echo UNKNOWN
    fi
}

create() {
    local states
    while states="$(state_of queued-resources state.state) $(state_of tpu-vm state)"; do
        case $states in
        "ACTIVE READY") return ;;
        "NOT_FOUND "*)
            gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${where[@]}" \
                --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" ${CAPACITY:+"$CAPACITY"}
            ;;
        "SUSPENDED "* | "ACTIVE PREEMPTED" | "ACTIVE TERMINATED" | "ACTIVE NOT_FOUND")
            delete # a request that lost its TPU does not get another one
            ;;
        "FAILED "*)
            gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" >&2
            echo "the request failed, as above; $0 delete, then try again or ask for something else" >&2
            return 1
            ;;
        *) echo "waiting for $ACCELERATOR_TYPE: request and TPU are $states" ;;
        esac
        sleep "$POLL_S"
    done
}

pack() { # FILE
    tar -czf "$1" --exclude=__pycache__ nfnet_flax recipes pyproject.toml README.md LICENSE
}

setup() {
    local archive=${ARCHIVE:-}
    if [[ -z $archive ]]; then
        archive=$(mktemp)
        pack "$archive"
    fi
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:nfnet_flax.tar.gz" "${where[@]}" --worker=all
    on_host all "set -eu
mkdir -p ~/nfnet_flax && cd ~/nfnet_flax
tar -xzf ~/nfnet_flax.tar.gz
if [ -n '$NFS' ] && ! mountpoint -q '$SHARED'; then
    sudo apt-get -qq update
    sudo apt-get -qq install -y nfs-common
    sudo mkdir -p '$SHARED'
    sudo mount -t nfs '$NFS' '$SHARED'
fi
python3 -m pip install --quiet --user uv   # the image's own Python may be older than 3.11
[ -x .venv/bin/python ] || ~/.local/bin/uv venv --quiet --python 3.12 .venv
~/.local/bin/uv pip install --quiet --python .venv/bin/python --editable '.[tpu,gcs]'"
}

start() { # each host stores the process id of the run's shell and, later, the run's exit code in ~/nfnet_flax
    on_host all "set -eu
cd ~/nfnet_flax
if [ ! -e exit_code ] && kill -0 \$(cat pid 2>/dev/null) 2>/dev/null; then echo 'is running already'; exit; fi
rm -f exit_code
cat >train.sh <<'END'
export JAX_COMPILATION_CACHE_DIR=$SHARED/compiled   # a new TPU compiles nothing that an earlier one did
.venv/bin/nfnet train $RECIPE --workdir $WORKDIR --platform tpu \\
    --data.source.train '$DATA/train-*.array_record' --data.source.eval '$DATA/eval-*.array_record' $OPTIONS
echo \$? >exit_code
END
nohup bash train.sh >>train.log 2>&1 </dev/null &
echo \$! >pid"
}

host_states() { # prints one line for each host, with a prefix, because gcloud also prints lines
    on_host all "cd ~/nfnet_flax
if [ -s exit_code ]; then echo run-state: \$(cat exit_code)
elif kill -0 \$(cat pid) 2>/dev/null; then echo run-state: running
else echo run-state: lost; fi"
}

wait_for_end() { # sets outcome: 0, 2, 3, 75, preempted, silent, or 'failed' with the exit codes
    local silent_polls=0 states
    while sleep "$POLL_S"; do
        if [[ $(state_of tpu-vm state) =~ ^(PREEMPTED|TERMINATED|STOPPED|DELETING|NOT_FOUND)$ ]]; then
            outcome=preempted
            return
        fi
        if ! states=$(host_states) || [[ $states != *run-state:* ]]; then
            if ((++silent_polls > MAX_SILENT_POLLS)); then
                outcome=silent
                return
            fi
            continue
        fi
        silent_polls=0
        states=$(sed -n 's/.*run-state: *//p' <<<"$states" | sort -u | tr '\n' ' ')
        case " $states" in
        *" running "*) continue ;;
        *" 2 "*) outcome=2 ;;
        *" 3 "*) outcome=3 ;;
        " 0 ") outcome=0 ;;
        " 75 " | " 0 75 ") outcome=75 ;;
        *) outcome="failed (${states% })" ;;
        esac
        return
    done
}

run() {
    local failures=0 is_set_up=no outcome
    ARCHIVE=$(mktemp)
    export ARCHIVE # every TPU of this run gets the same code, even if the checkout changes meanwhile
    pack "$ARCHIVE"
    if [[ $(host_states 2>/dev/null) == *running* ]]; then
        is_set_up=yes # `start` does not start a run that is already running
    fi
    while true; do
        outcome="not started"
        # In separate processes, because bash ignores `set -e` within a condition.
        if bash "$self" create && { [[ $is_set_up == yes ]] || bash "$self" setup; } && bash "$self" start; then
            is_set_up=yes
            wait_for_end
        fi
        echo "the run ended: $outcome"
        case $outcome in
        0) return 0 ;;
        2 | 3) return "$outcome" ;; # a new start would end in the same way; `logs` shows why
        75) ;;
        preempted) is_set_up=no ;;
        *)
            is_set_up=no
            if ((++failures >= MAX_FAILURES)); then
                echo "failed $failures times; see: $0 logs" >&2
                return 1
            fi
            if [[ $outcome == silent ]]; then
                bash "$self" delete || true # if it fails, `create` checks the state again
            fi
            sleep "$POLL_S"
            ;;
        esac
    done
}

stop() {
    on_host all "pkill -TERM -P \$(cat ~/nfnet_flax/pid)"
}

logs() {
    on_host 0 "tail -n 100 -F ~/nfnet_flax/train.log"
}

status() {
    echo "request: $(state_of queued-resources state.state)"
    echo "TPU: $(state_of tpu-vm state)"
    host_states
}

delete() {
    gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

case ${1:-} in
create | setup | start | logs | status | run | stop | delete) "$1" ;;
*)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "$self" >&2
    exit 2
    ;;
esac
