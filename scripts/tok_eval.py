"""Bytes per token on held-out and on mixed text, beside GPT-2's and GPT-4's tokenizers where their files are to be had:
python -m scripts.tok_eval [config.py] [--key=value ...]"""

import logging
import os
import threading
from collections.abc import Callable

from nanochat.config.config_file import find_no_effect, from_command_line
from nanochat.data.tokenizer import measure_bytes_per_token, read_held_out_text
from nanochat.data_pipeline import find_or_train, prepare_for
from nanochat.runtime import run_script
from nanochat.system.environment import base_dir

logger = logging.getLogger("nanochat")

FETCH_SECONDS = 20  # for both of OpenAI's files together; tiktoken itself sets no limit
RIVALS = {"gpt2": "GPT-2", "cl100k_base": "cl100k"}

MIX = {
    "code": '''\
def merge(left: list[int], right: list[int]) -> list[int]:
    """Merge two sorted lists into one."""
    merged, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            merged.append(left[i]); i += 1
        else:
            merged.append(right[j]); j += 1
    return merged + left[i:] + right[j:]
''',
    "english": (
        "The lighthouse keeper climbed the stairs every evening, counting them although he knew their number. Below "
        "him the harbour went quiet; somebody whistled, a door closed, and the first boats came in with their lamps "
        "already lit. He didn't hurry. What mattered was that the light turned, not that anyone saw him turn it.\n"
    ),
    "numbers": "3.14159 2.71828 1,024 65,536 2024-02-29 23:59:60 +49 30 1234567 0xdeadbeef 1e-12 192.168.0.1 100%\n",
    "unicode": "Schöne Grüße aus Zürich! Η γλώσσα μου. Мир и труд. 日本語の文章です。 نص عربي 한국어 😀🚀 ∑ᵢ xᵢ² ≤ ∞\n",
}


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Print the table and return it as {text: {tokenizer: bytes per token}}."""
    usage = "python -m scripts.tok_eval [config.py] [--key=value ...]"
    line = from_command_line(argv, switches=(), usage=usage)
    settings = line.settings
    for note in find_no_effect(line):
        logger.info(note)
    dataset = prepare_for(settings)
    tokenizer = find_or_train(settings, dataset)
    encoders = {tokenizer.name: tokenizer.encode_batch, **fetch_rivals()}
    texts = {"held out": read_held_out_text(dataset), **{name: [text] for name, text in MIX.items()}}
    table = {
        name: {column: measure_bytes_per_token(encode, text) for column, encode in encoders.items()}
        for name, text in texts.items()
    }
    widths = [max(8, len(column)) for column in encoders]
    logger.info("bytes per token (more is denser)")
    header = [f"{column:>{width}}" for column, width in zip(encoders, widths, strict=True)]
    logger.info(" ".join(["text      ", *header]))
    for name, row in table.items():
        figures = [f"{figure:>{width}.3f}" for figure, width in zip(row.values(), widths, strict=True)]
        logger.info(" ".join([f"{name:<10}", *figures]))
    return table


def fetch_rivals(seconds: float = FETCH_SECONDS) -> dict[str, Callable[[list[str]], list[list[int]]]]:
    """Batch encoders of GPT-2 and cl100k by name, from tiktoken's cache or the network.

    Those not there within so many seconds are skipped with one line. The fetch runs in a daemon thread, because
    tiktoken gives its connections no time limit.
    """
    found, problems = {}, []

    def fetch():
        import tiktoken

        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(base_dir() / "tiktoken"))

        for name, title in RIVALS.items():
            try:
                found[title] = tiktoken.get_encoding(name).encode_ordinary_batch
            except Exception as error:  # no network, a proxy's page, a full cache: the comparison is an extra
                problems.append(type(error).__name__)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(seconds)
    rivals = dict(found)
    if missing := [title for title in RIVALS.values() if title not in rivals]:
        why = ", ".join(sorted(set(problems))) or f"no answer within {seconds:g} s"
        logger.info(f"{' and '.join(missing)} skipped: tiktoken cannot get the files ({why})")
    return rivals


if __name__ == "__main__":
    run_script(main)
