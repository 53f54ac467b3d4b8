#!/usr/bin/env bash
# Train on this machine, one process per GPU, or on its CPU:
#   launch/local.sh [-n PROCESSES] [--cpu] CONFIG.yaml [key=value ...]
# On Ctrl-C, SIGTERM, SIGUSR1 or a closed terminal the run saves and exits with 75; the same command continues it. Exit
# codes: see README. SA3DIST_PYTHON is the interpreter (default: python).
set -euo pipefail

python=${SA3DIST_PYTHON:-python}
processes=""
cpu=false
while [[ ${1:-} == -* ]]; do
    case $1 in
        -n) processes=${2:?launch/local.sh: -n needs a number}; shift 2 ;;
        --cpu) cpu=true; shift ;;
        *) echo "launch/local.sh: unknown option $1; usage: launch/local.sh [-n PROCESSES] [--cpu] CONFIG.yaml" >&2; exit 2 ;;
    esac
done

if ! $cpu && ! command -v nvidia-smi > /dev/null; then
    cpu=true
fi
if $cpu; then
    export ACCELERATE_USE_CPU=true CUDA_VISIBLE_DEVICES=""
    processes=${processes:-1}
elif [[ -z $processes ]]; then
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        processes=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c .)
    else
        processes=$(nvidia-smi --list-gpus | wc -l)
    fi
fi
if [[ ! $processes =~ ^[1-9][0-9]*$ ]]; then
    echo "launch/local.sh: -n $processes: expected a number of processes, 1 or more" >&2
    exit 2
fi

# exec: signals sent to this script reach the program, or the supervisor that passes them on.
if [[ $processes == 1 ]]; then
    exec "$python" -m sa3dist.train "$@"
fi
# Otherwise torchrun would set one thread per process.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
exec "$python" -m sa3dist.supervise "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
    -m sa3dist.train "$@"
