#!/usr/bin/env bash
# Set everything up and run the checks: formatting, types, tests. Options go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
