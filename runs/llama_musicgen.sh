#!/usr/bin/env bash
# Text to music by a language model that stays as it is: Llama-3.2-1B, frozen, emits EnCodec's codes through
# MusicGen-small's feed-forward experts behind trained adapters.
#   bash runs/llama_musicgen.sh [--data=FOLDER ...]         any setting of scripts.adapter_train; wants a GPU
#   bash runs/llama_musicgen.sh --tiny [--name=value ...]   all of it in small on a CPU, without a download: a text model
#                                                           of the cpu preset as host, experts drawn, melodies
# Without the hub: --host=FOLDER --musicgen=FOLDER --codec=encodec:FOLDER (Llama wants its licence accepted on the hub and
# `hf auth login`; MusicGen's weights are CC-BY-NC 4.0). --data is a folder of sounds with captions, hf:<dataset>, or
# synth. Everything made lies under NANOCHAT_BASE_DIR (default ~/.cache/nanochat). Run it again: it goes on.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
preset=llama
if [ "${1:-}" = --tiny ]; then
    preset=tiny
    shift
fi
set_up audio,hf
forward_signals

work=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/llama_musicgen
mkdir -p "$work"
cd "$work" # where no config.py of somebody else lies
SECONDS=0
stage() { printf '\n=== %s (%d s)\n' "$1" "$SECONDS"; }

if [ $preset = tiny ]; then
    stage "a host: the text model of the cpu preset"
    "$python" -m scripts.base_train "$root/runs/cpu.py" --model_tag=host --resume
fi
stage "configuration"
"$python" -m scripts.configure --stage adapters --defaults --preset $preset --output "$work/$preset.py" --force
tag=$preset-adapters
given=()
for word in "$@"; do
    case $word in
        --model_tag=*) tag=${word#--model_tag=} ;;
        *) given+=("$word") ;;
    esac
done
set -- ${given[@]+"${given[@]}"}

stage "sounds to codes"
"$python" -m scripts.audio_data "$work/$preset.py" --adapters "$@"

stage "training"
ranks=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
launch=("$python")
if [ "$ranks" -gt 1 ]; then
    launch+=(-m torch.distributed.run --standalone --nproc_per_node="$ranks")
fi
"${launch[@]}" -m scripts.adapter_train "$work/$preset.py" --model_tag=$tag --resume "$@"

stage "a sound"
prompt="a rising major melody on organ starting on C 4 at 135 bpm"
echo "$prompt"
"$python" -m scripts.adapter_generate --model-tag $tag --prompt "$prompt" --guidance 2 --out "$work/$preset.wav"

stage "loss, the host's text, and captions obeyed"
"$python" -m scripts.adapter_eval --model-tag $tag --guidance 2
stage "done"
