#!/usr/bin/env bash
# Train on the machines of a DeepSpeed hostfile, started from one of them. Every node needs the same paths: environment, code, data, run folder.
#
#   launch/multinode.sh -H HOSTFILE [--launcher pdsh|ssh] [--dry-run] train CONFIG [OVERRIDES...]
#   launch/multinode.sh -H HOSTFILE [--launcher pdsh|ssh] [--dry-run] resume RUN_DIR
#
#   -H FILE      a line per node: `node-0 slots=8`; node-0 is where rank 0 runs
#   --launcher   pdsh where it is installed, else plain ssh. DeepSpeed's openmpi, mvapich and slurm start the ranks without the variables that
#                fastft reads (for Slurm there is launch/slurm.sbatch)
#   --dry-run    print the variables that would travel, and the commands
#
# Environment:
#   MASTER_ADDR  an address of the first host that the others reach; default: what its name resolves to here
#   MASTER_PORT  default 29500
#   EXPORT       names of further variables that the ranks need: EXPORT="HF_HOME MY_SETTING". Tokens and passwords are refused: these
#                variables can be seen in `ps`. Log in on every node (`hf auth login`) instead.
#   STOP_GRACE   seconds that ranks have to save on SIGTERM; default 120
# SIGTERM and Ctrl-C save on all nodes and end with 143; `resume` goes on. Any other exit code is the training's.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# What ranks commonly need, beyond the variables that DeepSpeed passes on by itself (PYTHON*, and NCCL* on GPUs).
TRAVEL='^(PATH|LD_LIBRARY_PATH|CUDA_HOME|OMP_NUM_THREADS|DS_ACCELERATOR|HF_HOME|HF_HUB_OFFLINE|(NCCL|GLOO|TORCH_NCCL|FI|UCX)_[A-Z0-9_]+)$'
SECRET='TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE'

hosts=()
slots=()
read_hostfile() {
    local line number=0
    [[ -f $1 ]] || die "hostfile $1: no such file."
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
        [[ $line =~ ^[[:space:]]*([A-Za-z0-9._:@-]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]] ||
            die "hostfile $1, line $number: '$line' is not 'HOST slots=N'."
        [[ " ${hosts[*]} " != *" ${BASH_REMATCH[1]} "* ]] || die "hostfile $1, line $number: ${BASH_REMATCH[1]} appears twice."
        hosts+=("${BASH_REMATCH[1]}")
        slots+=("${BASH_REMATCH[2]}")
    done <"$1"
    ((${#hosts[@]})) || die "hostfile $1 names no host; write a line per node, such as: node-0 slots=8"
}

# The first host's address. A name that means 127.0.x.1 here (as Debian's /etc/hosts has it) would send every other node to itself.
master_address() {
    local address
    address=$(getent ahosts "${hosts[0]#*@}" | awk '$1 !~ /^(127\.|::1$|fe80)/ { print $1; exit }') || true
    [[ -n $address ]] && { printf '%s' "$address"; return; }
    getent ahosts "${hosts[0]#*@}" >/dev/null || die "the first host, ${hosts[0]}, does not resolve here; set MASTER_ADDR to its address."
    ((${#hosts[@]} == 1)) || die "the first host, ${hosts[0]}, resolves to a loopback address here, which no other node can reach; set MASTER_ADDR."
    printf 127.0.0.1
}

# NAME=VALUE of every variable that travels: no blank line, no comment (DeepSpeed takes either for a broken variable).
travelling() {
    local name
    for name in $(compgen -e | LC_ALL=C sort) $EXPORT; do
        if [[ " $EXPORT " == *" $name "* ]]; then
            [[ ! ${name^^} =~ $SECRET ]] || die "EXPORT: $name looks like a secret, and what travels can be seen in ps; log in on every node instead."
            [[ -n ${!name+set} ]] || die "EXPORT: $name is not set."
        elif [[ ! $name =~ $TRAVEL || ${name^^} =~ $SECRET ]]; then
            continue
        fi
        [[ ! ${!name} =~ [\"\$\`\\]|$'\n' ]] || die "$name cannot travel: its value holds a quote, \$, backquote, backslash or a line break."
        printf '%s=%s\n' "$name" "${!name}"
    done | awk '!seen[$0]++'
}

hostfile='' launcher='' dry=''
while (($#)); do
    case $1 in
        -h | --help) usage ;;
        -H | --hostfile) hostfile=${2:?"$1 wants a file"}; shift 2 ;;
        --launcher) launcher=${2:?"$1 wants pdsh or ssh"}; shift 2 ;;
        --dry-run) dry=1; shift ;;
        -*) die "unknown option $1; -h shows the options." ;;
        *) break ;;
    esac
done
(($#)) || die "nothing to run; for example: launch/multinode.sh -H hostfile train my.yaml"
[[ -n $hostfile ]] || die "no hostfile; give -H FILE with a line per node, such as: node-0 slots=8"
read_hostfile "$hostfile"
hostfile=$(realpath "$hostfile") MASTER_PORT=${MASTER_PORT:-29500} EXPORT=${EXPORT:-}
number MASTER_PORT
[[ -n $launcher ]] || { launcher=ssh; if command -v pdsh >/dev/null; then launcher=pdsh; fi; }
[[ $launcher == pdsh || $launcher == ssh ]] || die "--launcher $launcher: known are pdsh and ssh."
MASTER_ADDR=${MASTER_ADDR:-$(master_address)}
# DeepSpeed passes on whatever begins with these, secrets too (MLFLOW_TRACKING_TOKEN).
for name in $(compgen -e); do
    if [[ $name =~ ^(MLFLOW|PYTHON|MV2|UCX|NCCL) && ${name^^} =~ $SECRET ]]; then
        printf '%s: %s stays here: it looks like a secret, and what travels can be seen in ps.\n' "${0##*/}" "$name" >&2
        unset "$name"
    fi
done
variables=$(travelling) || exit $?

# --force_multi: with one line in the hostfile, that host is meant, not this one.
common=(deepspeed --hostfile "$hostfile" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
pdsh_command=("${common[@]}" --force_multi --launcher pdsh --module fastft "$@")

# What host number $1 is told by ssh: the variables, the folder, and its own launcher.
remote() {
    local line text='' names='PYTHONPATH'
    while IFS= read -r line; do
        printf -v text '%sexport %s=%q; ' "$text" "${line%%=*}" "${line#*=}"
    done < <(printf '%s\n' "$variables"; [[ -z ${!names:-} ]] || printf 'PYTHONPATH=%s\n' "$PYTHONPATH")
    line=$(show env -u RANK FASTFT_LAUNCH_ID="$launch_id" "${common[@]}" --no_ssh --node_rank "$1" --module fastft "${@:2}")
    printf '%scd %q && exec %s' "$text" "$PWD" "$line"
}

launch_id=$(new_launch_id)
if [[ -n $dry ]]; then
    launch_id=ID
    if [[ $launcher == pdsh ]]; then
        printf '%s\n' "$variables" | sed 's/^/# DS_ENV_FILE: /'
        show "${pdsh_command[@]}"
    else
        for i in "${!hosts[@]}"; do show ssh -o BatchMode=yes "${hosts[i]}" "$(remote "$i" "$@")"; done
    fi
    exit 0
fi
need ssh "install an ssh client, and let every node be reached without a password."
[[ $launcher == ssh ]] || need pdsh "install it, or use --launcher ssh."
need deepspeed "activate the environment that fastft is installed in."

# Processes on the other nodes are told by ssh: neither pdsh nor ssh carries a signal.
signal_processes() {
    local host
    for host in "${hosts[@]}"; do
        ssh -o BatchMode=yes "$host" "$(show sh -c "$SIGNAL" sh "$launch_id" "$1" "${2-RANK=}")" </dev/null &
    done | awk '{ n += $1 } END { print n + 0 }'
}

# A node that fails has the others stopped; its exit code is the job's.
all_nodes() {
    local i code result=0 pids=()
    for i in "${!hosts[@]}"; do
        (
            code=0
            ssh -o BatchMode=yes "${hosts[i]}" "$(remote "$i" "$@")" 2>&1 | sed -u "s/^/${hosts[i]}: /" || code=$?
            ((code == 0)) || end_ranks >/dev/null
            exit "$code"
        ) &
        pids+=($!)
    done
    for i in "${pids[@]}"; do
        code=0
        wait "$i" || code=$?
        if ((code && (result == 0 || result == 143))); then result=$code; fi
    done
    return "$result"
}

if [[ $launcher == ssh ]]; then
    run all_nodes "$@"
else
    folder=$(mktemp -d) # mode 700. DeepSpeed joins DS_ENV_FILE to ~ and to ., so that an absolute path is taken as it is
    trap 'rm -rf "$folder"' EXIT
    printf '%s\nFASTFT_LAUNCH_ID=%s\n' "$variables" "$launch_id" >"$folder/deepspeed_env"
    export DS_ENV_FILE="$folder/deepspeed_env"
    run "${pdsh_command[@]}"
fi
