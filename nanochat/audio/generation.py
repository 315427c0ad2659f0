"""From captions to sound: the model's codes, decoded by the codec that came with the checkpoint."""

import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from nanochat.audio.codecs import load_codec
from nanochat.audio.listen_page import write_wav
from nanochat.checkpoint_files import step_dir
from nanochat.checkpoint_manager import build_model, find_checkpoint
from nanochat.config.command_line import Parser, prompt, seed, temperature
from nanochat.config.command_line import number as number_argument
from nanochat.data.tokenizer import Tokenizer
from nanochat.engine import decode
from nanochat.files import check_output
from nanochat.gpt import GPT
from nanochat.runtime import pick_dtype
from nanochat.system.environment import UserError

logger = logging.getLogger(__name__)

STREAM_FRAMES, STREAM_CONTEXT = 25, 50  # frames decoded at a time when streaming, and those before them as a run-up


def open_audio_model(model_tag: str | None, step: int | None, device) -> tuple[GPT, Tokenizer, object, dict, Path]:
    """(model, tokenizer, codec, metadata, step folder) of a checkpoint with audio; UserError where a part is amiss."""
    checkpoint_dir, step = find_checkpoint(model_tag, step)
    folder = step_dir(checkpoint_dir, step)
    logger.info(f"loading {folder}")
    model, tokenizer, metadata = build_model(checkpoint_dir, step, device, "eval")
    if "audio" not in model.vocabulary.names:
        raise UserError(f"{folder} is a model of {', '.join(model.vocabulary.names)}: train one with modalities=audio")
    if tokenizer is None:
        raise UserError(f"{folder} holds no tokenizer: captions cannot be read")
    model.compute_dtype = pick_dtype((metadata.get("settings") or {}).get("dtype"), torch.device(device).type)
    return model, tokenizer, load_checkpoint_codec(model, metadata, folder), metadata, folder


def load_checkpoint_codec(model: GPT, metadata: dict, folder: Path):
    """The codec that the training data was coded with, from the checkpoint; UserError when it is another one."""
    trained = metadata.get("codec") or {}
    if not (folder / "codec").is_dir():
        raise UserError(f"{folder} holds no codec: its codes cannot become sound")
    codec = load_codec(folder / "codec")
    if codec.hash != trained.get("hash", codec.hash):
        raise UserError(
            f"{folder / 'codec'} is not the codec of the training data: its hash is {codec.hash[:8]}, the checkpoint "
            f"was trained with {str(trained['hash'])[:8]}"
        )
    audio = model.vocabulary.modality("audio")
    if (codec.codebooks, codec.codes) != (audio.codebooks, audio.codes):
        raise UserError(
            f"{folder / 'codec'} has {codec.codebooks} x {codec.codes} codes, "
            f"the model {audio.codebooks} x {audio.codes}"
        )
    return codec


def encode_prompt(model: GPT, tokenizer: Tokenizer, caption: str, frames: int | None) -> tuple[list[int], int]:
    """(BOS, caption, `start`; the most frames that may follow): what the training context has room for, or fewer."""
    audio = model.vocabulary.modality("audio")
    ids = [*tokenizer.encode(caption, bos=True), *([] if audio.start is None else [audio.start])]
    room = (model.config.sequence_len - len(ids)) // audio.codebooks
    if room < 1:
        raise UserError(
            f"the caption takes {len(ids)} of {model.config.sequence_len} positions, no room for sound: shorten it"
        )
    return ids, room if frames is None else min(frames, room)


@torch.inference_mode()
def generate_codes(
    model: GPT,
    tokenizer: Tokenizer,
    captions: list[str],
    *,
    frames: int | None = None,
    batch: int = 64,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int | None = None,
    guidance: float = 1.0,
) -> list[np.ndarray]:
    """A sound for each caption, as codes int64 [Q, T] up to `end` (or the most frames); T may be 0.

    Captions of one length are decoded together, at most `batch` at a time; the seed gives every batch its own.
    guidance: as decode() takes it; other than 1 it wants a model that was trained with caption dropout.
    """
    audio, end = model.vocabulary.modality("audio"), model.vocabulary.end("audio")
    further = dict(guidance=guidance, unguided=encode_prompt(model, tokenizer, "", frames)[0])
    if audio.start is None:
        further["inside"] = "audio"
    lengths = defaultdict(list)
    for number, caption in enumerate(captions):
        ids, room = encode_prompt(model, tokenizer, caption, frames)
        if frames is not None and room < frames:
            logger.info(
                f"{frames} frames were asked for, behind this caption the context holds {room}: {caption[:60]!r}"
            )
        lengths[len(ids), room].append((number, ids))
    found: list[np.ndarray] = [np.zeros((audio.codebooks, 0), np.int64)] * len(captions)
    for (_, room), members in sorted(lengths.items()):
        for group in (members[i : i + batch] for i in range(0, len(members), batch)):
            prompts = torch.tensor([ids for _, ids in group])
            how = dict(temperature=temperature, top_k=top_k, frames=room, seed=seed + 1_000_003 * group[0][0])
            most = room * audio.codebooks + (end is not None)
            drawn, running = [], torch.ones(len(group), dtype=torch.bool, device=model.device)
            for tokens in decode(model, prompts, most, **how, **further):
                drawn.append(tokens)
                if end is not None:
                    running &= tokens != end
                if not running.any():
                    break
            for (number, _), row in zip(group, torch.stack(drawn, dim=1).tolist(), strict=True):
                ids = row[: row.index(end)] if end in row else row
                found[number] = model.vocabulary.codes_of("audio", ids).T
    return found


def to_sound(codec, codes: list[np.ndarray]) -> list[np.ndarray]:
    """float32 [samples] of each codes [Q, T]; those of one length are decoded together; without a frame, silence."""
    lengths = defaultdict(list)
    for number, one in enumerate(codes):
        lengths[one.shape[1]].append(number)
    sounds: list[np.ndarray] = [np.zeros(int(codec.sample_rate / codec.frame_rate), np.float32)] * len(codes)
    for length, numbers in lengths.items():
        if length:
            decoded = codec.decode_batch(np.stack([codes[number] for number in numbers]))
            for number, wav in zip(numbers, decoded, strict=True):
                sounds[number] = wav
    return sounds


def stream_sound(
    model: GPT,
    tokenizer: Tokenizer,
    codec,
    caption: str,
    *,
    frames: int | None = None,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int | None = None,
) -> Iterator[np.ndarray]:
    """Pieces of one sound, float32 [samples], as soon as their codes are there.

    Each piece is decoded with the frames before it and faded over 10 ms into what was played: a codec that guesses
    phases guesses them anew each time.
    """
    audio, end = model.vocabulary.modality("audio"), model.vocabulary.end("audio")
    ids, room = encode_prompt(model, tokenizer, caption, frames)
    hop, fade = round(codec.sample_rate / codec.frame_rate), codec.sample_rate // 100
    how = dict(temperature=temperature, top_k=top_k, frames=room, seed=seed)
    drawn: list[int] = []
    played, tail = 0, np.zeros(0, np.float32)

    def piece(last: bool) -> np.ndarray:
        nonlocal played, tail
        codes = model.vocabulary.codes_of("audio", drawn).T
        first = max(0, played - STREAM_CONTEXT)
        wav = codec.decode(codes[:, first:])[(played - first) * hop :]
        if len(tail):
            ramp = np.linspace(0, 1, len(tail), dtype=np.float32)
            wav[: len(tail)] = tail * (1 - ramp) + wav[: len(tail)] * ramp
        played = codes.shape[1] if last else codes.shape[1] - 1  # the newest frame is the next piece's fade
        if last:
            return wav
        tail = wav[-hop:][:fade]
        return wav[:-hop]

    for tokens in decode(model, torch.tensor([ids]), room * audio.codebooks + 1, **how):
        if (token := int(tokens[0])) == end:
            break
        drawn.append(token)
        if len(drawn) % (STREAM_FRAMES * audio.codebooks) == 0:
            yield piece(last=False)
    if len(drawn) // audio.codebooks > played:
        yield piece(last=True)


def add_request(parser: Parser) -> None:
    """The flags that say which sounds, and where to."""
    parser.add_argument("--prompt", type=prompt, required=True, help="the caption")
    parser.add_argument("--out", type=Path, help="wav file to write")
    parser.add_argument("--num", type=number_argument(int, 1), default=1, help="how many sounds")
    parser.add_argument(
        "--seconds", type=number_argument(float, 0.02), help="the longest sound (default: what the context holds)"
    )


def check_out_writable(out: Path, num: int) -> None:
    """UserError where not all of num sounds can be written, now and not when they are made."""
    for path in output_paths(out, num):
        check_output(path, "--out", suffix=".wav")


def output_paths(out: Path, num: int) -> list[Path]:
    """x.wav, or x-1.wav, x-2.wav, ... for several sounds."""
    return [out] if num == 1 else [out.with_name(f"{out.stem}-{place}{out.suffix}") for place in range(1, num + 1)]


def add_sampling(parser: Parser) -> None:
    """The flags that choose a checkpoint and how to draw from it."""
    parser.add_argument("--seed", type=seed, default=0, help="the same seed gives the same sounds")
    parser.add_argument("--temperature", type=temperature, default=0.8, help="0 takes the likeliest code each time")
    parser.add_argument(
        "--top-k",
        type=number_argument(int, 1, off="among all"),
        help="draw among the k likeliest codes (default: None, all)",
    )
    parser.add_argument("--model-tag", help="folder of the checkpoints (default: the newest)")
    parser.add_argument("--step", type=number_argument(int, 0), help="step to take (default: the newest whole one)")
    parser.add_argument("--device-type", help="cpu, cuda or mps (default: the best one here)")


def write_all(out: Path, sounds: list[np.ndarray], sample_rate: int) -> list[Path]:
    """Write x.wav, or x-1.wav, x-2.wav, ...; returns the files."""
    paths = output_paths(out, len(sounds))
    for path, wav in zip(paths, sounds, strict=True):
        write_wav(path, wav, sample_rate)
        print(f"{path}: {len(wav) / sample_rate:.2f} s, {len(wav)} samples")
    return paths
