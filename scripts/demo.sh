#!/usr/bin/env bash
# Set everything up and run the demo; options go to `nnunet-ssl demo` (try --help).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec nnunet-ssl demo -o "$PWD/demo_output" "$@"
