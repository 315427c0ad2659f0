"""Audio tokenizers: sound to codes and back, fitted in seconds on the user's own sounds, as a text tokenizer is.

Every codec has name, sample_rate (Hz), frame_rate (frames a second), codebooks (Q), codes (K), hash, and

    encode(wav float32 [samples], mono)  -> codes int64 [Q, T], each 0 .. K-1
    decode(codes [Q, T])                 -> wav float32 [samples]
    encode_batch, decode_batch           the same over a first dimension B
    save(directory), load_codec(directory)

The fitted kinds work at 16 kHz with 50 frames a second, and Q residual codebooks (each codes what the ones before it
left over), found by k-means:

    frame   log spectra, 96 principal components; Griffin-Lim guesses the phases. One codebook is enough.
    pitch   codebook 0 holds the pitch alone, the others the loudness of each harmonic: a note and an instrument that
            were never heard together are two codes that were. For one voice at a time. At least two codebooks.
    mdct    the waveform's own transform, nothing guessed: for four codebooks and more.
"""

import re
from pathlib import Path

from nanochat.audio.codec_files import KINDS, read_description
from nanochat.audio.fitted_codec import FittedCodec
from nanochat.checkpoint_files import read_tensors
from nanochat.data.local_sources import path_errors_as_user_errors
from nanochat.system.environment import UserError, base_dir

# ---------------------------------------------------------------------------------------------------------------------
# files


def load_codec(directory: Path | str):
    """The codec of a folder that save() wrote; UserError when a file is missing, damaged or not what it was."""
    directory = Path(directory)
    description = read_description(directory)
    if description["source"] is not None:
        from nanochat.audio.encodec import EncodecCodec

        codec = EncodecCodec(str(description["source"]), description["codebooks"])
        way_out = "give it the model that it was made with"
    else:
        way_out = "delete the folder and fit it again"
        try:
            codec = FittedCodec(description["name"], read_tensors(directory / "codec.safetensors"))
        except (UserError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise UserError(f"codec {directory} is damaged ({error}): {way_out}") from error
    if codec.hash != description["hash"]:
        raise UserError(
            f"codec {directory} is not what it was: it hashes to {codec.hash[:8]}, codec.json says "
            f"{description['hash'][:8]}; {way_out}"
        )
    return codec


def codec_folder(codec) -> Path:
    """Where a codec lives: base_dir()/codecs/<name>-<hash8>."""
    return base_dir() / "codecs" / f"{re.sub(r'[^A-Za-z0-9._]+', '-', codec.name)}-{codec.hash[:8]}"


def open_codec(name: str, codebooks: int, codes: int):
    """The codec that a setting names, or None for one of KINDS, which the caller fits on its sounds.

    name: "encodec:<hub name or folder>", the folder of a saved codec, or a name under base_dir()/codecs, with its hash
    or without. UserError: nothing of that name, or a codec of another shape than codebooks x codes.
    """
    if name in KINDS:
        return None
    if name.startswith("encodec:"):
        from nanochat.audio.encodec import EncodecCodec

        codec = EncodecCodec(name.removeprefix("encodec:"), codebooks)
    else:
        codec = load_codec(_find_codec(name))
    if (codec.codebooks, codec.codes) != (codebooks, codes):
        raise UserError(
            f"codec={name!r} has {codec.codebooks} codebooks of {codec.codes} codes, the settings say {codebooks} of "
            f"{codes}: --codebooks={codec.codebooks} --modalities=audio:{codec.codes}"
        )
    return codec


def _find_codec(name: str) -> Path:
    root = base_dir() / "codecs"
    with path_errors_as_user_errors("codec", name):
        for path in (Path(name).expanduser(), root / name):
            if (path / "codec.json").is_file():
                return path
    present = sorted(path.parent.name for path in root.glob("[!.]*/codec.json"))
    found = [folder for folder in present if folder[:-9] == name]
    if len(found) == 1:
        return root / found[0]
    if found:
        raise UserError(f"codec={name!r} is ambiguous: {', '.join(found)}")
    raise UserError(
        f"codec={name!r} is none of {', '.join(KINDS)} (fitted on the data), no folder with a codec.json and none of "
        f"{root} ({', '.join(present) or 'which has none yet'}); EnCodec is encodec:<hub name or folder>"
    )
