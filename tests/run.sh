#!/usr/bin/env bash
# The test command: sets itself up as run_all.sh does, then runs every test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source common/setup.sh requirements.txt tests/requirements.txt
exec "$PYTHON" -m pytest "${@:-tests}"
