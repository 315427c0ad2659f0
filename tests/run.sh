#!/usr/bin/env bash
# Set up .venv with the dev extras, then run the test suite:   bash tests/run.sh [pytest arguments]
# Without arguments two files at a time, with one thread of torch each.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../runs/setup.sh"
set_up dev
cd "$root"

# Two suites at once would share two cores and run into the time limits of each other's tests.
exec 8>.venv/tests.lock
if command -v flock >/dev/null && ! flock -n 8; then
    echo "another tests/run.sh is at work in this checkout: waiting for it"
    flock 8
fi
if [ $# = 0 ]; then
    export OMP_NUM_THREADS=1
    set -- -n 2 --dist loadfile
fi
"$python" -m pytest "$@" 8>&-
