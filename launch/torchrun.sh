#!/usr/bin/env bash
# Train on one or more nodes by torchrun: run this once on every node, with the same arguments.
#
#   NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=node-0:29400 launch/torchrun.sh [--dry-run] train CONFIG [OVERRIDES...]
#   NNODES=2 NODE_RANK=1 RDZV_ENDPOINT=node-0:29400 launch/torchrun.sh [--dry-run] resume RUN_DIR
#
# Environment:
#   NNODES          nodes; default 1
#   NODE_RANK       this node's number, from 0; needed when NNODES > 1 (Slurm's SLURM_PROCID is taken where there is none)
#   RDZV_ENDPOINT   HOST:PORT of node 0 as the other nodes reach it; needed when NNODES > 1
#   NPROC_PER_NODE  ranks on this node; default: one per GPU
#   RDZV_BACKEND    static (default: ranks in the order of NODE_RANK) or c10d
#   RDZV_ID         c10d: a name that is this run's alone; default fastft
#   STOP_GRACE      seconds that ranks have to save on SIGTERM; default 120
# SIGTERM, SIGUSR1 and Ctrl-C save on all nodes and end with 143; `resume` goes on. Any other exit code is that of the first rank that failed.
# --dry-run prints the command and ends.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

dry=''
while (($#)); do
    case $1 in
        -h | --help) usage ;;
        --dry-run) dry=1; shift ;;
        -*) die "unknown option $1; -h shows the options." ;;
        *) break ;;
    esac
done
(($#)) || die "nothing to run; for example: launch/torchrun.sh train my.yaml"
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-${SLURM_PROCID:-}} RDZV_ENDPOINT=${RDZV_ENDPOINT:-} RDZV_BACKEND=${RDZV_BACKEND:-static}
number NNODES
((NNODES > 0)) || die "NNODES=$NNODES: at least one node is needed."
if ((NNODES > 1)); then
    [[ -n $NODE_RANK ]] || die "NNODES=$NNODES, but NODE_RANK is not set; number the nodes from 0."
    [[ -n $RDZV_ENDPOINT ]] || die "NNODES=$NNODES, but RDZV_ENDPOINT is not set; give HOST:PORT of node 0 as the other nodes reach it."
fi
NODE_RANK=${NODE_RANK:-0} RDZV_ENDPOINT=${RDZV_ENDPOINT:-127.0.0.1:29400}
number NODE_RANK
((NODE_RANK < NNODES)) || die "NODE_RANK=$NODE_RANK: with NNODES=$NNODES it goes from 0 to $((NNODES - 1))."
[[ $RDZV_ENDPOINT =~ ^.+:[0-9]+$ ]] || die "RDZV_ENDPOINT=$RDZV_ENDPOINT is not HOST:PORT."
if [[ -z ${NPROC_PER_NODE:-} ]]; then
    command -v nvidia-smi >/dev/null || die "no GPU seen here (no nvidia-smi); set NPROC_PER_NODE to the number of ranks on this node."
    NPROC_PER_NODE=gpu
fi
command=(torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$NPROC_PER_NODE" --max-restarts 0)
case $RDZV_BACKEND in
    static) command+=(--rdzv-backend static --rdzv-endpoint "$RDZV_ENDPOINT") ;;
    c10d) # said, not guessed from host names: torchrun's guess fails where a node does not know itself by the endpoint's name
        command+=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-fastft}" --rdzv-conf "is_host=$((NODE_RANK == 0))") ;;
    *) die "RDZV_BACKEND=$RDZV_BACKEND: known are static and c10d." ;;
esac
command+=(-m fastft "$@")
if [[ -n $dry ]]; then
    show "${command[@]}"
    exit 0
fi
need torchrun "activate the environment that fastft is installed in."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${STOP_GRACE:-120} # torchrun kills its ranks after 30 s otherwise, when a signal reaches it directly
summary=$(mktemp)
trap 'rm -f "$summary" "$summary.whole"' EXIT
run "${command[@]}"
