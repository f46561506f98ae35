#!/usr/bin/env bash
# Makes .venv with everything in constraints.txt, and the environment that activating it gives.
#
# Ends at once where nothing changed since the last complete set-up; an interrupted one goes on where it stopped.
# PYTHON=... chooses the interpreter. Every failure is one message that says what to do.
set -euo pipefail
cd -P "$(dirname "$0")/.."

readonly needed_mib=4096
readonly stamp=.venv/complete
readonly log=.valr/setup.log

fail() {
    printf 'setup: %s\n' "$1" >&2
    exit 1
}

wanted() {
    { pwd; cat pyproject.toml constraints.txt infra/setup.sh; } | cksum
}

is_complete() {
    [ -x .venv/bin/valr ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted)" ] && .venv/bin/python -c ''
}

is_recent_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# 3.11 first: constraints.txt was tested with it.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if is_recent_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not there or older than 3.11; name another one"
    fail "no Python 3.11 or newer found; install one (e.g. apt-get install python3 python3-venv, or pyenv install 3.11), or name yours: make setup PYTHON=/path/to/python3.11"
}

make_environment() {
    local python=$1
    # A half-made environment, or one whose scripts name the folder it was moved from.
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1 || ! grep -qF "$PWD/.venv" .venv/bin/activate; then
        rm -rf .venv
    fi
    if [ ! -e .venv ]; then
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "$python can't make virtual environments; install its venv module (Debian, Ubuntu: apt-get install python3-venv)"
        "$python" -m venv .venv >"$log" 2>&1 || explain
    fi
}

# One line on a terminal that moves, so that minutes of installing look alive.
show() {
    if [ -t 1 ]; then
        awk '{ printf "\r\033[K  %.*s", 76, $0; fflush() } END { printf "\r\033[K" }'
    else
        cat >/dev/null
    fi
}

install() {
    # pip writes RECORD last: a package without it was cut short, and pip would take it for installed.
    local metadata
    for metadata in .venv/lib/python*/site-packages/*.dist-info; do
        if [ ! -f "$metadata/RECORD" ]; then
            rm -rf "$metadata"
        fi
    done
    .venv/bin/python -m pip install --disable-pip-version-check --no-input \
        --constraint constraints.txt --editable '.[dev,infra,perf,services,teachers-cpu,team]' 2>&1 | tee "$log" | show || explain
}

explain() {
    local why
    if grep -qi 'no space left' "$log"; then
        why="the disk is full; free about $((needed_mib / 1024)) GiB and run make setup again"
    elif grep -qi 'permission denied\|read-only file system' "$log"; then
        why="this folder or pip's cache can't be written; make them yours (chown), or work in another folder"
    elif grep -qiE 'connection|temporary failure|timed out|network is unreachable|max retries|certificate|no matching distribution' "$log"; then
        why="the packages can't be downloaded; check the network or pip's settings (pip config list), and run make setup again: it goes on where it stopped"
    else
        why="installing failed"
    fi
    fail "$why. From $log: $( (grep '^ *ERROR' "$log" || cat "$log") | tail -n 1)"
}

# `dagster asset materialize --select X` works as typed only with the variables of `valr env`.
extend_activation() {
    local script=.venv/bin/activate
    if grep -q '^# valr_ops' "$script"; then
        return
    fi
    awk '{ print } /^ *unset -f deactivate$/ { print "    eval \"unset ${_VALR_VARIABLES:-} _VALR_VARIABLES\"" }' "$script" >"$script.new"
    cat >>"$script.new" <<'END'

# valr_ops: what Dagster, DVC and MLflow need to work in this project
_valr_exports="$(cd "$VIRTUAL_ENV/.." && "$VIRTUAL_ENV/bin/valr" env)" && eval "$_valr_exports"
_VALR_VARIABLES="$(printf '%s\n' "$_valr_exports" | sed -n 's/^export \([A-Z_]*\)=.*/\1/p' | tr '\n' ' ')"
unset _valr_exports
END
    mv "$script.new" "$script"
}

is_complete && exit 0
trap 'printf "\nsetup: interrupted; make setup goes on where it stopped\n" >&2; exit 130' INT TERM
command -v git >/dev/null || fail "git is missing; install it (e.g. apt-get install git)"
mkdir -p .valr 2>/dev/null && [ -w . ] && [ -w .valr ] || fail "$PWD can't be written; make it yours (chown), or clone into another folder"
if command -v flock >/dev/null; then
    exec 9>.valr/setup.lock
    flock --nonblock 9 || { echo "setup: another set-up is running, waiting for it"; flock 9; }
    is_complete && exit 0
fi
free_mib=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')
[ "$free_mib" -ge "$needed_mib" ] || fail "only $free_mib MiB are free here and about $needed_mib are needed; free some, or clone onto another disk"
python=$(find_python)
echo "Setting up .venv with $("$python" --version 2>&1): two to four minutes where the packages are near ($log)"
make_environment "$python"
install
extend_activation
wanted >"$stamp"
echo "Ready. Next: make demo, or source .venv/bin/activate"
