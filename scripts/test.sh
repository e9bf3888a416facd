#!/usr/bin/env bash
# Set everything up and run the checks: formatting, types, tests. Options go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
ruff check .
ruff format --check .
mypy
lint-imports --no-logo
# Two files at a time, one core each, the first ones first: many tests wait for processes that they start.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
