# Sourced by speedrun.sh and tests/run.sh. `set_up` (or `set_up dev`) makes the checkout's own .venv from pyproject.toml
# and constraints.txt, once: a stamp makes later calls take no time and need no network, an interrupted call starts
# over (what it downloaded is kept). Writes nothing outside the checkout. Sets $root (the checkout) and $python (the
# environment's interpreter). Set PYTHON to choose the interpreter that .venv is made from.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python="$root/.venv/bin/python"
export PYTHONSAFEPATH=1 # a stray random.py or scripts/ in the caller's folder must not shadow ours

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# torchrun passes on only the signals it is told to; Slurm and others announce the end of a job with SIGUSR1. Newer
# releases of torch read the first variable, older ones the second.
forward_signals() {
    export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
    export TORCHELASTIC_SIGNALS_TO_HANDLE=$PET_SIGNALS_TO_HANDLE
}

find_python() {
    local candidate candidates="python3 python3.14 python3.13 python3.12 python3.11 python"
    if [ -n "${PYTHON:-}" ]; then
        is_new_enough "$PYTHON" && echo "$PYTHON" && return
        echo "error: PYTHON=$PYTHON is not a Python of version 3.11 or newer" >&2
        return 2
    fi
    for candidate in $candidates; do
        is_new_enough "$candidate" && echo "$candidate" && return
    done
    echo "error: no Python 3.11 or newer found (looked for $candidates): install one, or set PYTHON to its path" >&2
    return 2
}

set_up() {
    local extras=${1:-} stamp="$root/.venv/installed" wanted base
    # The path is part of the stamp: in a moved checkout the editable install points to the old place.
    wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum) $root"
    exec 9>"$root/.venv.lock" || return 2
    if command -v flock >/dev/null; then flock 9; fi # two set-ups at once would undo each other's work
    # dev holds all extras, and every extra all that none holds
    if is_new_enough "$python" && { stamped "$wanted $extras" || stamped "$wanted dev" ||
        { [ -z "$extras" ] && stamped "$wanted audio"; }; }; then
        exec 9>&-
        return
    fi
    base=$(find_python) || return 2
    echo "setting up $root/.venv with $("$base" --version) (once; torch is the big download) ..."
    # A killed pip leaves packages that look installed but lack files: then start from an empty environment.
    if stamped unfinished || ! "$python" -m pip --version >/dev/null 2>&1; then
        "$base" -m venv --clear "$root/.venv" || {
            echo "error: $base cannot make a virtual environment (Debian and Ubuntu: apt install python3-venv)" >&2
            return 2
        }
    fi
    echo unfinished >"$stamp" || return 2
    # Build tools from the same pins instead of pip's isolated, unpinned build environment.
    pip_install "setuptools" && pip_install --no-build-isolation -e "$root${extras:+[$extras]}" || {
        echo "error: installing into .venv failed, see above: once it is mended the same command starts over" >&2
        return 2
    }
    rm -rf "$root/.pip-cache"
    echo "$wanted $extras" >"$stamp"
    exec 9>&-
}

stamped() { [ "$(cat "$root/.venv/installed" 2>/dev/null)" = "$1" ]; }

pip_install() {
    local quiet=--quiet
    if [ -t 1 ]; then quiet=--progress-bar=on; fi
    PIP_CACHE_DIR="${PIP_CACHE_DIR:-$root/.pip-cache}" "$python" -m pip install --disable-pip-version-check \
        "$quiet" -c "$root/constraints.txt" "$@" 9>&-
}
