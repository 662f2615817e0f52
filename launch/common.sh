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

# Sends signal $2 to every rank of launch $1 on this machine and prints how many there were. A rank is known by its environment, so it is
# found even after its launcher was killed. A string for sh, because other nodes get it through ssh.
# shellcheck disable=SC2016
SIGNAL_RANKS='n=0; for e in $(grep -lazx "FASTFT_LAUNCH_ID=$1" /proc/[0-9]*/environ 2>/dev/null); do
    grep -qaz "^RANK=" "$e" 2>/dev/null || continue
    p=${e#/proc/}; kill "-$2" "${p%/environ}" 2>/dev/null && n=$((n + 1))
done; echo "$n"'

new_launch_id() {
    printf '%s-%s-%s%s' "${HOSTNAME:-host}" "$$" "$RANDOM" "$RANDOM"
}

signal_ranks() {
    sh -c "$SIGNAL_RANKS" sh "$launch_id" "$1"
}

# A stop goes to the ranks, not to the launcher: deepspeed would leave its ranks behind, torchrun and launch.py kill them after 30 s, before
# a large model is saved. With no rank there yet, the launcher's process group is ended instead.
stop() {
    stopped=1
    [[ $(signal_ranks TERM) != 0 ]] || kill -TERM -- "-$launcher" 2>/dev/null || true
}

# run COMMAND...: the launcher in a process group of its own, its exit code read as the ranks': 143 after SIGTERM and a save. $summary, where
# it is set, names a file for stderr: torchrun ends with 1 whatever happened, and says in its summary what the first failed rank ended with.
run() {
    local code before left=0
    : "${summary:=}" "${on_stop:=stop}" "${launch_id:=$(new_launch_id)}"
    set -m
    (
        trap '' USR1 # Slurm's warning reaches every process of a step; only this script acts on it
        trap : TERM INT
        [[ -n $summary ]] || exec env -u RANK FASTFT_LAUNCH_ID="$launch_id" "$@"
        env -u RANK FASTFT_LAUNCH_ID="$launch_id" "$@" 2>&1 >&3 3>&- | (trap '' TERM INT; exec tee "$summary") >&2 || exit "${PIPESTATUS[0]}"
    ) 3>&1 </dev/null &
    launcher=$!
    set +m
    trap '"$on_stop"' TERM INT USR1
    code=127
    while :; do
        stopped=0 before=$code code=0
        wait "$launcher" || code=$?
        ((stopped)) || break
    done
    if ((code == 127)); then code=$before; fi # the signal came after the launcher's end
    if [[ -n $summary && $code == 1 ]]; then
        code=$(sed -nE 's/^ *exitcode *: (-?[0-9]+).*/\1/p' "$summary" | tail -n 1)
        code=$(((${code:-1} + 256) % 256))
    fi
    # Python's sys.exit(-N), a rank ended by signal N, arrives as 256 - N; a shell says 128 + N.
    if ((code > 192)); then code=$((384 - code)); fi
    # deepspeed ends with 0 when launch.py was killed, and the ranks train on.
    if [[ $(signal_ranks TERM) != 0 ]]; then
        printf '%s: the launcher ended before its ranks; ending them.\n' "${0##*/}" >&2
        while [[ $(signal_ranks 0) != 0 ]] && ((left++ < ${STOP_GRACE:-120})); do sleep 1; done
        signal_ranks KILL >/dev/null
        ((code)) || code=1
    fi
    trap - TERM INT USR1
    return "$code"
}

# Where the run of `train CONFIG OVERRIDES...` keeps its checkpoints.
run_dir() {
    "${PYTHON:-python}" -c 'import sys; from fastft import config; print(config.load(sys.argv[1], sys.argv[2:]).run.dir)' "$@"
}
