#!/usr/bin/env bash
# Text and audio in one model, from nothing, on a CPU in minutes and without a network: synthesises captioned melodies,
# fits an audio codec on them, trains a model with modality experts from scratch, has it make sounds from captions that
# it never saw, measures whether they do what the captions say, and makes a page to listen to.
#   bash runs/audio_demo.sh [--name=value ...]        settings that differ from the `audio` preset
# Everything lies under NANOCHAT_BASE_DIR (default ~/.cache/nanochat). Run it again: a finished run is not trained anew.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up audio

work=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/audio_demo
mkdir -p "$work"
SECONDS=0
stage() { printf '\n=== %s (%d s)\n' "$1" "$SECONDS"; }

stage "configuration"
"$python" -m scripts.configure --defaults --preset audio --output "$work/config.py" --force
read -r _ _ _ _ _ tag <<<"$("$python" -m scripts.summary --plan "$work/config.py" "$@")"

stage "melodies and their codec"
"$python" -m scripts.audio_data "$work/config.py" "$@"

stage "training"
"$python" -m scripts.base_train "$work/config.py" --resume "$@"

stage "loss beside its baselines"
"$python" -m scripts.base_eval --model-tag "$tag" --eval bpb,audio

stage "a sound"
prompt="a rising major melody on organ starting on C 4 at 135 bpm"
echo "$prompt"
"$python" -m scripts.audio_generate --model-tag "$tag" --prompt "$prompt" --out "$work/sound.wav"

stage "do the sounds do what their captions say?"
"$python" -m scripts.audio_eval --model-tag "$tag"
stage "done"
