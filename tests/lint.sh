#!/usr/bin/env bash
# Checks that run none of the code: format, lint, types, spelling, and which room imports which. Under a minute.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source common/setup.sh requirements.txt tests/requirements.txt
"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
"$PYTHON" -m codespell_lib
"$PYTHON" -c 'from importlinter.cli import lint_imports_command; lint_imports_command()' --no-cache
