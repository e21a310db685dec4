#!/usr/bin/env bash
# Runs the steps of docs/Dockerfile without a container engine, as far as they mean something there: builds the wheel,
# installs it with the extras into a new environment in a temporary folder, and starts nfnet in it, not as root, as
# process 1 if the system allows that. Downloads packages: some minutes, 3 GB. It cannot test the base image, the user
# that the image makes, and GPUs.
#
#   bash tools/try_container.sh                        PYTHON=python3.12 chooses the interpreter; DEVICE and EXTRAS are
#   DEVICE=cuda EXTRAS=gcs bash tools/try_container.sh   the arguments of the build
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
root=$(mktemp -d) pid=""
trap '[ -z "$pid" ] || kill -KILL "$pid" 2>/dev/null || :; rm -rf "$root"' EXIT
chmod 755 "$root"
umask 022
unset PYTHONPATH

fail() { echo "try_container: $*" >&2; exit 1; }
inside() { sed -E "s#(^|[ \"])/build#\1$root/build#g" <<<"$1"; } # of the image -> of the temporary folder

echo "== the steps of docs/Dockerfile, in $root"
folder=$root stage=0
while IFS= read -r line; do
    case $line in
        "" | \#*) ;;
        FROM*)
            stage=$((stage + 1))
            "$PYTHON" -m venv "$root/stage$stage"
            PATH=$root/stage$stage/bin:$PATH
            ;;
        ARG\ *=*)
            name=${line#ARG } && name=${name%%=*}
            [ "$name" = PYTHON ] || export "$name=${!name:-${line#*=}}"
            ;;
        "WORKDIR /build"*) folder=$(inside "${line#WORKDIR }") && mkdir -p "$folder" ;;
        COPY\ --from=*) ;; # all stages share the temporary folder
        COPY*)
            read -r -a words <<<"${line#COPY }"
            target=$(inside "${words[-1]}")
            [[ $target = /* ]] || target=$folder/$target
            unset "words[-1]"
            for source in "${words[@]}"; do
                if [ -e "$source" ]; then
                    cp -r "$source" "$target"
                else
                    fail "COPY $source: it is not there"
                fi
            done
            ;;
        RUN*pip\ *)
            echo "-- ${line}"
            (cd "$folder" && bash -euc "$(inside "${line#RUN }")" >"$root/pip.log" 2>&1) || {
                tail -n 30 "$root/pip.log" && fail "this step failed"
            }
            tail -n 1 "$root/pip.log" | cut -c1-200
            ;;
        *) echo "-- left out here: $line" ;;
    esac
done < <(sed -e '/^#/d' docs/Dockerfile | sed -e ':a' -e '/\\$/{N;s/\\\n *//;ba' -e '}')

echo "== nfnet, as another user and as process 1 where that is possible"
mkdir "$root/work" "$root/home"
run=(env -u VIRTUAL_ENV "HOME=$root/home" "JAX_PLATFORMS=${JAX_PLATFORMS-cpu}" PYTHONUNBUFFERED=1)
if [ "$(id -u)" = 0 ]; then
    chown -R 65534:65534 "$root/work" "$root/home"
    run=(setpriv --reuid=65534 --regid=65534 --clear-groups "${run[@]}")
fi
cd "$root/work"
program=$root/stage$stage/bin/nfnet
"${run[@]}" "$program" --version || fail "nfnet does not start; a PYTHON that other users can read is needed"
first=(unshare --user --map-root-user --pid --fork)
"${run[@]}" "${first[@]}" true 2>/dev/null || { first=() && echo "not as process 1: no namespaces here"; }
train=("$program" train digits --workdir run --no-tensorboard --model.widths 16 --model.depths 1 --model.group-width 8)
"${run[@]}" "$program" train digits --debug --workdir debug --no-tensorboard
if [ "$(id -u)" = 0 ]; then [ "$(stat -c %u debug)" = 65534 ] || fail "the run belongs to root"; fi

echo "== SIGTERM while it trains"
"${run[@]}" ${first[@]+"${first[@]}"} "${train[@]}" >log 2>&1 &
outer=$! pid=$!
until grep -q "^step " log; do
    kill -0 $outer 2>/dev/null || { pid="" && cat log && fail "it ended before its first step"; }
    # The signal is for nfnet itself, not for the program around it, which does not pass it on.
    if [ ${#first[@]} -gt 0 ]; then pid=$(cat "/proc/$outer/task/$outer/children") && pid=${pid// /}; fi
    sleep 0.2
done
kill -TERM "$pid"
code=0 && wait $outer || code=$?
pid=""
tail -n 2 log
[ $code = 75 ] || fail "exit code $code, not 75 (stopped and saved)"
echo "exit code 75, as documented"
