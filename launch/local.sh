#!/usr/bin/env bash
# Train on this machine, one rank per GPU (or N ranks), by the deepspeed launcher.
#
#   launch/local.sh [-n N] [--dry-run] train CONFIG [OVERRIDES...]
#   launch/local.sh [-n N] [--dry-run] resume RUN_DIR
#
#   -n N        ranks; default: every GPU that DeepSpeed sees. Without a GPU, set DS_ACCELERATOR=cpu and give -n.
#   --dry-run   print the command and end
#
# Environment: MASTER_PORT (29500; two runs on one machine need two), STOP_GRACE (120: seconds to save).
# SIGTERM and Ctrl-C save and end with 143; `resume` goes on. Any other exit code is the training's.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

count='' dry=''
while (($#)); do
    case $1 in
        -h | --help) usage ;;
        -n) count=${2:?-n wants a number of ranks}; shift 2 ;;
        --dry-run) dry=1; shift ;;
        -*) die "unknown option $1; -h shows the options." ;;
        *) break ;;
    esac
done
(($#)) || die "nothing to run; for example: launch/local.sh -n 2 train my.yaml"
MASTER_PORT=${MASTER_PORT:-29500}
number MASTER_PORT
# A hostfile in DeepSpeed's default place (/job/hostfile) would turn this into a run on other machines.
command=(deepspeed --hostfile /dev/null --master_port "$MASTER_PORT")
if [[ -n $count ]]; then
    [[ $count =~ ^[1-9][0-9]*$ ]] || die "-n $count: not a number of ranks."
    command+=(--num_gpus "$count")
fi
command+=(--module fastft "$@")
if [[ -n $dry ]]; then
    show "${command[@]}"
    exit 0
fi
need deepspeed "activate the environment that fastft is installed in."
run "${command[@]}"
