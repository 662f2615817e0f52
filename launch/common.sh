# shellcheck shell=bash
# Sourced by the scripts beside it: errors, dry runs, and a launcher whose ranks hear of a stop and whose exit code is theirs.

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 2
}

# The comment at the head of the script is its help.
usage() {
    sed -n '2,${/^#/!q;s/^# \{0,1\}//;p;}' "$0"
    exit 0
}

need() {
    command -v "$1" >/dev/null || die "$1 is not on PATH; $2"
}

# One line that a shell would read back as the same command.
show() {
    local line
    printf -v line '%q ' "$@"
    printf '%s\n' "${line% }"
}

number() {
    [[ ${!1} =~ ^[0-9]+$ ]] || die "$1=${!1} is not a number."
}

# Sends signal $2 to every process of launch $1 on this machine whose environment has a line that begins with $3, and prints how many there
# were. RANK= means the ranks: they are found even after their launcher was killed. A string for sh, because other nodes get it through ssh.
# shellcheck disable=SC2016
SIGNAL='n=0; for e in $(grep -lazx "FASTFT_LAUNCH_ID=$1" /proc/[0-9]*/environ 2>/dev/null); do
    grep -qaz "^$3" "$e" 2>/dev/null || continue
    p=${e#/proc/}; kill "-$2" "${p%/environ}" 2>/dev/null && n=$((n + 1))
done; echo "$n"'

new_launch_id() {
    printf '%s-%s-%s%s' "${HOSTNAME:-host}" "$$" "$RANDOM" "$RANDOM"
}

# signal_processes SIGNAL [LINE]: of this launch; prints how many there were. multinode.sh has one of its own.
signal_processes() {
    sh -c "$SIGNAL" sh "$launch_id" "$1" "${2-RANK=}"
}

# A stop goes to the ranks, not to the launcher: deepspeed would leave its ranks behind, torchrun and launch.py kill them after 30 s, before
# a large model is saved. With no rank there yet, the launchers are ended instead.
stop() {
    stopped=1
    [[ $(signal_processes TERM) != 0 ]] || signal_processes TERM '' >/dev/null
}

# Ranks that outlived their launcher, or another node's failure, get STOP_GRACE seconds. Prints how many there were.
end_ranks() {
    local waited=0 found
    found=$(signal_processes TERM)
    if ((found)); then
        while [[ $(signal_processes 0) != 0 ]] && ((waited++ < ${STOP_GRACE:-120})); do sleep 1; done
        signal_processes KILL >/dev/null
    fi
    printf '%s' "$found"
}

# Runs beside this script until it is gone, then ends what is left of the launch. Slurm that tracks processes by group kills this script with
# SIGKILL and knows nothing of the launcher, which has a group of its own, as this watch has.
watch() {
    trap '' TERM INT USR1 HUP
    while kill -0 $$ 2>/dev/null; do sleep 1; done
    signal_processes KILL '' >/dev/null
}

# run COMMAND...: the launcher in a process group of its own, its exit code read as the ranks': 143 after SIGTERM and a save. $summary, where
# it is set, names a file for stderr: torchrun ends with 1 whatever happened, and says in its summary what the first failed rank ended with.
run() {
    local code before launcher watcher waited=0
    : "${summary:=}" "${launch_id:=$(new_launch_id)}"
    set -m
    (
        set +m
        trap '' USR1 # Slurm's warning reaches every process of a step; only this script acts on it
        unset RANK
        export FASTFT_LAUNCH_ID="$launch_id"
        if [[ $(type -t "$1") == function ]]; then
            "$@"
            exit
        fi
        [[ -n $summary ]] || exec "$@"
        exec "$@" 2> >(trap '' TERM INT; tee "$summary" >&2; : >"$summary.whole")
    ) </dev/null &
    launcher=$!
    watch </dev/null >/dev/null 2>&1 &
    watcher=$!
    disown "$watcher"
    set +m
    trap stop TERM INT USR1
    code=127
    while :; do
        stopped=0 before=$code code=0
        wait "$launcher" || code=$?
        ((stopped)) || break
    done
    if ((code == 127)); then code=$before; fi # the signal came after the launcher's end
    # deepspeed ends with 0 when launch.py was killed, and the ranks train on.
    if [[ $(end_ranks) != 0 ]]; then
        printf '%s: the launcher ended before its ranks; they were ended too.\n' "${0##*/}" >&2
        ((code)) || code=1
    fi
    if [[ -n $summary && $code == 1 ]]; then
        while [[ ! -e $summary.whole ]] && ((waited++ < 50)); do sleep 0.1; done
        code=$(sed -nE 's/^ *exitcode *: (-?[0-9]+).*/\1/p' "$summary" | tail -n 1)
        code=$(((${code:-1} + 256) % 256))
    fi
    # Python's sys.exit(-N), a rank ended by signal N, arrives as 256 - N; a shell says 128 + N.
    if ((code > 192)); then code=$((384 - code)); fi
    trap - TERM INT USR1
    kill -KILL "$watcher" 2>/dev/null || true
    return "$code"
}
