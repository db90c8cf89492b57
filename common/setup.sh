# Sets PYTHON to a Python that satisfies the given requirement files: the active one if it does, else that of .venv in
# this project, which is made and filled if needed.
# usage: source common/setup.sh [--dry-run] requirements.txt ...
#        source common/setup.sh --any              any Python that is new enough, with or without packages
#        bash common/setup.sh requirements.txt     makes .venv if needed, and prints the path of the Python

setup() {
    local dry=false active base
    if [ "$1" = --any ]; then find_base; PYTHON=$base; return; fi
    if [ "$1" = --dry-run ]; then dry=true; shift; fi
    active=$(command -v python || command -v python3 || true)
    if [ -n "$active" ] && "$active" common/process/requirements.py "$@" >/dev/null 2>&1; then
        PYTHON=$active
        return
    fi
    PYTHON=.venv/bin/python
    if [ -x "$PYTHON" ] && "$PYTHON" common/process/requirements.py "$@" >/dev/null 2>&1; then
        return
    fi
    find_base
    if $dry; then
        echo "bash common/setup.sh $*"
        return
    fi
    { exec 9>.venv.lock; } 2>/dev/null || exec 9>/dev/null
    if command -v flock >/dev/null && ! flock --nonblock 9; then
        echo "waiting: another process is making .venv" >&2
        flock 9
        if [ -x "$PYTHON" ] && "$PYTHON" common/process/requirements.py "$@" >/dev/null 2>&1; then
            exec 9>&-
            return
        fi
    fi
    if ! make_venv "$base" "$@" || ! fill_venv "$@"; then
        echo "error: the packages could not be installed into .venv; these are missing:" >&2
        if [ ! -x "$PYTHON" ]; then PYTHON=$base; fi
        "$PYTHON" common/process/requirements.py "$@" >&2 || true
        echo "run this again with internet access, or with their wheels in a folder:" \
            "PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER bash run_all.sh" >&2
        exit 2
    fi
    exec 9>&-
}

# Set base to the first Python found that is 3.11 or later.
find_base() {
    for base in python python3 python3.14 python3.13 python3.12 python3.11; do
        if "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then return; fi
    done
    echo "error: expected Python 3.11 or later, found none; install it, then run this again" >&2
    exit 2
}

# Make .venv. If the active Python has torch in range, .venv sees all its packages, and only missing ones are installed.
make_venv() {
    local base=$1 options=(); shift
    if [ "$("$base" -c 'import sys; print(sys.prefix)')" -ef .venv ]; then return; fi
    if [[ $("$base" common/process/requirements.py --next-install "$@") = -r* ]]; then
        echo "setting up .venv once (several GB, mostly torch)" >&2
        rm -f .venv/lib/python*/site-packages/active.pth
        "$base" -m venv .venv
        return
    fi
    echo "setting up .venv once: small packages that are missing from the active Python (its torch is used)" >&2
    # Hosted notebooks have pip, but not what venv needs to install another one.
    if "$base" -c 'import pip' 2>/dev/null; then options=(--without-pip); fi
    "$base" -m venv "${options[@]}" .venv || return
    # Unlike --system-site-packages, this also works if the active Python is in a virtual environment.
    "$base" -c 'import sys; print(*filter(None, sys.path), sep="\n")' \
        > "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/active.pth"
}

# Install what is missing from .venv; installed packages may need others in turn.
fill_venv() {
    local call _ options=(--disable-pip-version-check --quiet --constraint .venv/constraints.txt)
    for _ in 1 2 3; do
        call=$("$PYTHON" common/process/requirements.py --next-install "$@")
        [ -n "$call" ] || break
        "$PYTHON" common/process/requirements.py --pins "$@" > .venv/constraints.txt
        eval "\"\$PYTHON\" -m pip install \"\${options[@]}\" $call" || return
    done
    "$PYTHON" common/process/requirements.py "$@" >&2
}

if [ "${BASH_SOURCE[0]}" != "$0" ]; then
    setup "$@"
else
    trap 'exit 130' INT
    setup "$@"
    echo "$PYTHON"
fi
