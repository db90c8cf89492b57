#!/usr/bin/env bash
# From raw images to submission.csv and a report page. Finds a Python and hands over to common/pipeline.py.
set -eo pipefail
{ true >&1; } 2>/dev/null || exec >/dev/null  # a closed output goes to /dev/null
{ true >&2; } 2>/dev/null || exec 2>/dev/null
unset PYTHONSAFEPATH  # python -m needs the project's folder
export RUN_ALL_AS=${BASH_SOURCE[0]} RUN_ALL_FROM=$PWD
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
source common/setup.sh --any
exec "$PYTHON" -m common.pipeline "$@"
