# Sourced by run_all.sh and tests/run.sh: sets PYTHON to one that satisfies the given requirement files,
# the active python where it does, else .venv beside this project, made and filled where need be.
# usage: source common/setup.sh [--dry-run] requirements.txt ...

setup() {
    local dry=false
    if [ "$1" = --dry-run ]; then dry=true; shift; fi
    local active
    active=$(command -v python || command -v python3 || true)
    if [ -n "$active" ] && "$active" common/environment.py "$@" >/dev/null 2>&1; then
        PYTHON=$active
        return
    fi
    PYTHON=.venv/bin/python
    if [ -x "$PYTHON" ] && "$PYTHON" common/environment.py "$@" >/dev/null 2>&1; then
        return
    fi
    local base='' candidate file
    for candidate in python3 python python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            base=$candidate
            break
        fi
    done
    if [ -z "$base" ]; then
        echo "error: Python 3.11 or later is needed and was not found; install it, then run this again" >&2
        exit 2
    fi
    local install=("$PYTHON" -m pip install --disable-pip-version-check)
    for file in "$@"; do install+=(-r "$file"); done
    if $dry; then
        echo "$base -m venv .venv"
        echo "${install[*]}"
        return
    fi
    { exec 9>.venv.lock; } 2>/dev/null || exec 9>/dev/null
    if command -v flock >/dev/null && ! flock --nonblock 9; then
        echo "waiting: .venv is being made by another process" >&2
        flock 9
        if [ -x "$PYTHON" ] && "$PYTHON" common/environment.py "$@" >/dev/null 2>&1; then
            exec 9>&-
            return
        fi
    fi
    echo "setting up .venv once (several GB, mostly torch)" >&2
    if ! "$base" -m venv .venv || ! "${install[@]}" --quiet; then
        echo "error: the packages could not be installed into .venv; this is what the active Python lacks:" >&2
        "$base" common/environment.py "$@" >&2 || true
        echo "install these by hand (without internet: from wheels), then run this again" >&2
        exit 2
    fi
    exec 9>&-
}

setup "$@"
