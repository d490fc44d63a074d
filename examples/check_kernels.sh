#!/usr/bin/env bash
# The kernel tests under compute-sanitizer: memcheck (out-of-bounds and misaligned accesses, leaks of
# API calls) and racecheck (shared-memory hazards). Needs a GPU and the CUDA toolkit.
#
#   examples/check_kernels.sh [pytest arguments]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
status=0
for tool in memcheck racecheck; do
    echo "== $tool"
    "$sanitizer" --tool "$tool" --error-exitcode 9 \
        python3 -m pytest -q -m gpu -p no:cacheprovider tests/kernels "$@" || status=1
done
exit $status
