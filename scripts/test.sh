#!/usr/bin/env bash
# Set everything up and run the checks: formatting, types, tests. Options go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
ruff check .
ruff format --check .
mypy
lint-imports --no-logo
# Two tests at a time, one core each, the slow ones first; those of a group share what they made, and a process.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder "$@"
