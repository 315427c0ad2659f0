#!/usr/bin/env bash
# From a fresh checkout to a trained and evaluated GPT, on any machine:
#   bash speedrun.sh [config.py] [--key=value ...]
# Sets up .venv, then configures, prepares data, trains a tokenizer and a model, evaluates it and sums up. Without a
# config it uses ./config.py, or writes one with the preset of this machine: CPU, one GPU, or all its GPUs.
# Run it again at any time: finished stages are passed over, an unfinished one goes on where it was, and a finished
# model is never overwritten (unless you say --overwrite=True). Everything a run makes lies under NANOCHAT_BASE_DIR
# (default ~/.cache/nanochat). Flags: bash speedrun.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/runs/setup.sh"

stage="set-up"
again=$(printf ' %q' bash "$0" "$@")
on_exit() {
    if [ "$1" != 0 ] && [ "$1" != 2 ]; then # 2 is the user's mistake: its one line has said the way out
        printf '\nstopped in stage: %s (exit code %s). The same command goes on from there:\n %s\n' \
            "$stage" "$1" "$again" >&2
    fi
}
trap 'on_exit $?' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Run a command that gets the signals sent to this script, once each, and return its exit code. It has a process group
# of its own, so that Ctrl-C does not reach it a second time from the terminal.
with_signals() {
    local child code=0
    set -m
    "$@" &
    child=$!
    set +m
    trap 'kill -TERM "$child" 2>/dev/null' INT TERM HUP USR1
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
    wait "$child" || code=$?
    trap 'exit 130' INT
    trap 'exit 143' TERM
    trap - HUP USR1
    return "$code"
}

begin() {
    stage=$1
    printf '\n=== %s\n' "$stage"
}
ask() { "$python" -m scripts.summary "$@"; }
look() {
    local answer
    answer=$(ask --plan "$@")
    read -r ranks action state step evaluated tag <<<"$answer"
}

set_up
case " $* " in *" --help "* | *" -h "*)
    sed -n '2,9s/^# \{0,1\}//p' "$root/speedrun.sh"
    exec "$python" -m scripts.base_train --help
    ;;
esac

begin "configuration"
preset=$(ask --preset "$@")
if [ -n "$preset" ]; then
    # shellcheck disable=SC2086 # several words
    "$python" -m scripts.configure --defaults $preset --output config.py
fi

begin "data"
"$python" -m scripts.data "$@"

begin "tokenizer"
"$python" -m scripts.tok_train "$@"

begin "training"
look "$@"
launch=("$python" -m)
if [ "$ranks" -gt 1 ]; then
    launch=("$python" -m torch.distributed.run --standalone --nproc_per_node="$ranks" -m)
fi
forward_signals
metrics="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/base_checkpoints/$tag/metrics.jsonl"
before=$(cksum "$metrics" 2>/dev/null || true)
code=0
case "$action" in
    start) with_signals "${launch[@]}" scripts.base_train "$@" || code=$? ;;
    resume) with_signals "${launch[@]}" scripts.base_train "$@" --resume || code=$? ;;
    nothing) echo "nothing left to train: $tag is done at step $step" ;;
esac
if [ "$code" != 0 ] && [ "$(cksum "$metrics" 2>/dev/null || true)" = "$before" ]; then
    exit "$code" # it did not come to train: what the log tells is older
fi
look "$@"
case "$state" in # under torchrun codes are lost: a stop by the guard looks like success, one by a signal like a failure
    done) [ "$code" = 0 ] || exit "$code" ;;
    preempted)
        echo "training of $tag was preempted before its end, at step $step, which is saved" >&2
        exit 85
        ;;
    nonfinite)
        echo "training of $tag was stopped by the non-finite guard: its metrics.jsonl says at which step" >&2
        exit 3
        ;;
    *)
        [ "$code" = 0 ] || exit "$code"
        echo "training of $tag ended without saying why: its metrics.jsonl ends before done" >&2
        exit 1
        ;;
esac

begin "evaluation"
if [ "$evaluated" = yes ]; then
    echo "step $step of $tag is already evaluated"
else
    "${launch[@]}" scripts.base_eval --model-tag "$tag" --step "$step"
fi

begin "summary"
ask "$@"
