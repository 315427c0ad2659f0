"""Generated sounds beside real ones: captions obeyed, distances, and a page to listen to."""

import argparse
import json
import logging
import time
from pathlib import Path

import numpy as np

from nanochat.audio import adherence as audio_eval
from nanochat.audio.distance import tabulate_distances
from nanochat.audio.generation import generate_codes, to_sound
from nanochat.audio.listen_page import write_page
from nanochat.audio.loss import iterate_clips
from nanochat.files import check_output, write_atomically
from nanochat.system.environment import UserError, base_dir

logger = logging.getLogger(__name__)

REFERENCES = 200  # real training clips that the judge learns the instruments from


SHOWN = 24  # clips of each split on the page


def result_path(result: dict, kind: str) -> Path:
    return base_dir() / kind / f"{result['model_tag']}_{result['step']:06d}.json"


def page_path(result: dict, place: str) -> Path:
    return base_dir() / place / result["model_tag"] / "listen.html"


def check_writable_results(result: dict, kind: str, place: str) -> None:
    """UserError, before the work, where figures or page cannot be written."""
    check_output(result_path(result, kind))
    check_output(page_path(result, place))


def write_result(result: dict, kind: str) -> None:
    """base_dir()/<kind>/<tag>_<step>.json."""
    path = result_path(result, kind)
    write_atomically(path, json.dumps(result, indent=1) + "\n")
    logger.info(f"written: {path}")


def evaluate_sounds(
    model,
    tokenizer,
    codec,
    dataset,
    args: argparse.Namespace,
    result: dict,
    kind: str = "audio_eval",
    place: str = "audio",
    guidance: float = 1.0,
) -> dict:
    """Generate for held-out captions, measure; returns result with the figures, which are printed and written first.

    result: model_tag, step and what else was measured. The page is base_dir()/<place>/<tag>/listen.html.
    """
    found = list(iterate_clips(dataset, "val"))
    room = model.config.sequence_len - codec.codebooks
    fitting = [clip for clip in found if len(tokenizer.encode(clip[0], bos=True)) < room]
    if len(fitting) < len(found):
        logger.info(f"{len(found) - len(fitting)} of {len(found)} captions leave no room for sound: skipped")
    held_out = choose_clips(fitting, args.num)
    start = time.perf_counter()
    captions = [caption for caption, _, _ in held_out]
    how = dict(seed=args.seed, temperature=args.temperature, top_k=args.top_k, guidance=guidance)
    codes = generate_codes(model, tokenizer, captions, **how)
    generated = to_sound(codec, codes)
    seconds = time.perf_counter() - start
    logger.info(f"{len(generated)} sounds of {sum(map(len, generated)) / codec.sample_rate:.0f} s in {seconds:.1f} s")
    real = to_sound(codec, [codes.T for _, codes, _ in held_out])
    result |= {"seed": args.seed, "temperature": args.temperature, "clips": len(codes)}
    if all("pitch_hz" in attributes for _, _, attributes in held_out):
        table, items = measure_adherence(codec, dataset, held_out, real, generated, args.seed)
        text = audio_eval.format_adherence(table)
        result["adherence"] = table
    else:
        table, text = measure_distances(real, generated, codec.sample_rate)
        items = [
            dict(caption=c, sound=(g, codec.sample_rate), reference=(r, codec.sample_rate))
            for c, g, r in zip(captions, generated, real, strict=True)
        ][:SHOWN]
        result["distances"] = table
    logger.info(text)
    write_result(result, kind)
    page = write_page(page_path(result, place), f"{result['model_tag']}, step {result['step']}", items, text)
    logger.info(f"listen: {page}")
    return result


def measure_distances(real: list, generated: list, sample_rate: int) -> tuple[dict, str]:
    """How far generated sounds are from the real ones of their captions; from others'; and real ones from others."""
    rows = {
        "generated": zip(real, generated, strict=True),
        "shuffled (floor)": zip([*real[1:], real[0]], generated, strict=True),
        "real, shuffled": zip([*real[1:], real[0]], real, strict=True),
    }
    table = {row: tabulate_distances(pairs, sample_rate) for row, pairs in rows.items()}
    names = list(table["generated"])
    lines = [f"{'to the real sound':<20}" + "".join(f"{name:>18}" for name in names)]
    for row, values in table.items():
        cells = ("-" if values[name] is None else f"{values[name]:.4g}" for name in names)
        lines.append(f"{row:<20}" + "".join(f"{cell:>18}" for cell in cells))
    return table, "\n".join(lines)


def choose_clips(found: list[tuple], num: int) -> list[tuple]:
    """Evenly spread over the held-out sounds, half of them of unseen combinations where there are enough."""
    unseen = [item for item in found if item[2].get("unseen")]
    seen = [item for item in found if not item[2].get("unseen")]
    if len(found) < 2:
        raise UserError(f"{len(found)} held-out sounds: at least 2 are needed, give more data")
    half = max(num - len(seen), num // 2) if unseen else 0
    return [*_spread(seen, num - min(half, len(unseen))), *_spread(unseen, half)]


def _spread(items: list, num: int) -> list:
    return [items[i] for i in np.linspace(0, len(items) - 1, min(num, len(items))).round().astype(int)] if items else []


def measure_adherence(
    codec, dataset, held_out: list[tuple], real: list, generated: list, seed: int
) -> tuple[dict, list[dict]]:
    """The table of hits, and the page's items."""
    training = [clip for clip, _ in zip(iterate_clips(dataset, "train"), range(REFERENCES), strict=False)]
    sounds = to_sound(codec, [codes.T for _, codes, _ in training])
    known = [(wav, codec.sample_rate, attributes) for wav, (_, _, attributes) in zip(sounds, training, strict=True)]
    references = audio_eval.learn_references(known)
    wanted = [attributes for _, _, attributes in held_out]
    heard = [audio_eval.measure(wav, codec.sample_rate, references) for wav in generated]
    ceiling = [audio_eval.measure(wav, codec.sample_rate, references) for wav in real]
    table = audio_eval.tabulate_adherence(
        list(zip(ceiling, wanted, strict=True)), list(zip(heard, wanted, strict=True)), seed
    )
    items = []
    for split, unseen in (("combinations in the training", False), ("combinations never heard", True)):
        mine = [i for i, attributes in enumerate(wanted) if bool(attributes.get("unseen")) is unseen]
        items += [
            dict(
                caption=held_out[i][0],
                sound=(generated[i], codec.sample_rate),
                reference=(real[i], codec.sample_rate),
                measured=heard[i],
                hits=audio_eval.compare_attributes(heard[i], wanted[i]),
                split=split,
            )
            for i in _spread(mine, SHOWN)
        ]
    return table, items
