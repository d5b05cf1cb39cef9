#!/usr/bin/env bash
# Trains one run with N processes on this machine, each with its share of the devices it is told of:
#   launch/local.sh 2 --config=my_run.py --workdir=runs/two --config.mesh.fsdp=-1
# On a machine with several GPUs one process does as well; this is for trying out what several machines will do. On a
# machine without, every process is one device (XLA_FLAGS=--xla_force_host_platform_device_count=K makes it K).
# Exit code: the first that is not 0, as of mixlab.train. SIGTERM and Ctrl-C: all save and stop together. RESTARTS=K: when a
# process was lost or a step hung, all are started again, at most K times, and go on from the last checkpoint.
set -u
processes=${1:?usage: launch/local.sh N --config=FILE ...}
shift
python=${PYTHON:-python}
restarts=${RESTARTS:-0}
stopping=
trap 'stopping=1; kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
while
    port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')}
    pids=()
    for ((i = 0; i < processes; i++)); do
        "$python" -m mixlab.train "$@" --coordinator="localhost:$port" --processes="$processes" --process="$i" &
        pids+=($!)
    done
    result=0
    for pid in "${pids[@]}"; do
        while wait "$pid"; code=$?; kill -0 "$pid" 2>/dev/null; do :; done # a signal cuts a wait short
        if [ "$result" = 0 ]; then result=$code; fi
    done
    case $result in 76 | 134 | 137) [ -z "$stopping" ] && ((restarts-- > 0)) ;; *) false ;; esac
do :; done
exit "$result"
