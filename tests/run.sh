#!/usr/bin/env bash
# Set up .venv with the dev extras, then run the test suite:   bash tests/run.sh [pytest arguments]
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
"$python" -m pytest "$@" 8>&-
