#!/usr/bin/env bash
# The test command: sets itself up as run_all.sh does, then runs every test and requires 90 % coverage of common/.
# Arguments go to pytest: bash tests/run.sh tests/unit runs the quick tests, without coverage.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source common/setup.sh requirements.txt tests/requirements.txt
all=()
if [ $# -eq 0 ]; then
    # File by file in their order, e2e first: by default, files with few tests come last, and those take longest.
    all=(--numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder --cov
         --cov-fail-under=90)
    export OMP_NUM_THREADS=1  # each process has a core to itself
fi
exec "$PYTHON" -m pytest "${all[@]}" "${@:-tests}"
