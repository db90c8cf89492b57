#!/usr/bin/env bash
# The paper's Tables 1, 2 and 3 on whatever data there is; takes the arguments of run_all.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_all.sh" --tables "$@"
