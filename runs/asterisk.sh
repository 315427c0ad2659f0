#!/usr/bin/env bash
# Real speech: the prompts of a telephone exchange (568, of which 10 are silent; 20 minutes, one speaker, 8 kHz) with
# what they say.
#   bash runs/asterisk.sh [--name=value ...]        settings, such as --codec=mdct --codebooks=4 --max_seq_len=1664
# Downloads two Debian packages (18 MB, CC-BY-SA 3.0; no root needed), unpacks them into $NANOCHAT_BASE_DIR/asterisk,
# writes their transcript as captions.jsonl beside the sounds and the settings as config.py, which the flags overrule,
# fits a codec on the sounds and encodes them, trains a small model that reads and speaks, has it say a sentence, and
# makes a page of held-out prompts beside what the model makes of their words.
# Without apt: get the .deb files of asterisk-core-sounds-en-wav and asterisk-core-sounds-en from Debian by hand, into
# $NANOCHAT_BASE_DIR/asterisk and run this again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

place=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/asterisk
sounds=$place/usr/share/asterisk/sounds/en_US_f_Allison
mkdir -p "$place"
for package in asterisk-core-sounds-en-wav asterisk-core-sounds-en; do
    compgen -G "$place/${package}_*.deb" >/dev/null || (cd "$place" && apt-get download "$package") || {
        echo "error: cannot download $package: put its .deb into $place by hand, as the top of $0 says" >&2
        exit 2
    }
    for deb in "$place/${package}"_*.deb; do
        if command -v dpkg >/dev/null; then dpkg -x "$deb" "$place"; else ar p "$deb" data.tar.xz | tar -xJ -C "$place"; fi || {
            echo "error: cannot unpack $deb: delete it and run this again" >&2
            exit 2
        }
    done
done

set_up audio
"$python" - "$place/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz" "$sounds" "$place/config.py" <<'EOF'
import gzip, json, pathlib, sys

transcript, sounds, config = map(pathlib.Path, sys.argv[1:])
with gzip.open(transcript, "rt", encoding="utf-8") as transcript, open(sounds / "captions.jsonl", "w") as captions:
    for line in transcript:
        name, colon, words = line.partition(":")
        if colon and not line.startswith(";"):
            captions.write(json.dumps({"file_name": f"{name.strip()}.wav", "text": words.strip()}) + "\n")
settings = dict(
    data=str(sounds), modalities="audio:1024", codec="frame", clip_seconds=8.0, vocab_size=400, depth=4, model_dim=192,
    max_seq_len=448, tie_weights=True, smear=True, value_embeddings=True, num_iterations=150, total_batch_size=3584,
    device_batch_size=8, eval_every=100, sample_every=None, model_tag="asterisk",
)
config.write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()), encoding="utf-8")
EOF
"$python" -m scripts.audio_data "$place/config.py" "$@"
"$python" -m scripts.base_train "$place/config.py" --resume "$@"
read -r _ _ _ _ _ tag <<<"$("$python" -m scripts.summary --plan "$place/config.py" "$@")"
"$python" -m scripts.audio_generate --model-tag "$tag" --prompt "Please enter your password." --out "$place/says.wav"
"$python" -m scripts.audio_eval --model-tag "$tag" --num 24
