"""A language model in transformers' format: its folder, here or from the hub, and the weights and tokenizer in it."""

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nanochat.checkpoint_files import read_tensors
from nanochat.data.hub import hub_errors, probe
from nanochat.data.local_sources import path_errors_as_user_errors
from nanochat.runtime import first_line
from nanochat.system.environment import UserError
from nanochat.upstream.foreign_weights import read_json, read_weight_map

logger = logging.getLogger(__name__)

FILES = "a folder with its config.json, *.safetensors, tokenizer.json and tokenizer_config.json"


def model_folder(name: str) -> Path:
    """The folder of a host: the one named, or the hub's files in the local cache, fetched if they are not there."""
    with path_errors_as_user_errors("host", name):
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise UserError(f"host={name!r}: there is no such folder, and a hub name is written OWNER/NAME")
    from huggingface_hub import snapshot_download

    # Not the folders of the hub's repositories nor Mistral's consolidated.safetensors: the same weights once more.
    wanted = dict(allow_patterns=["*.json", "*.safetensors"], ignore_patterns=["*/*", "consolidated*"])
    try:
        folder = Path(snapshot_download(name, **wanted, local_files_only=True))
        if weight_files(name, folder) and (folder / "tokenizer.json").is_file():
            return folder
    except (UserError, *hub_errors()):
        pass  # nothing of it is here, or not all: said in the next line
    logger.info(f"host {name}: not in the local cache, or only in part; looking on the hub")
    try:
        probe(f"host={name!r}")
        return Path(snapshot_download(name, **wanted))
    except (UserError, *hub_errors()) as error:
        raise UserError(
            f"host={name!r}: {first_line(error)}; accept its licence on the hub and log in with `hf auth login` where "
            f"it asks for that, or name {FILES}, copied from a machine with network"
        ) from error


def weight_files(name: str, folder: Path) -> dict[Path, set[str]]:
    """The safetensors files of a folder, each with the tensors that the index expects in it (none without an index)."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():  # as transformers prefers it
        return {single: set()}
    if not index.is_file():
        if old := sorted(path.name for kind in ("*.bin", "*.pth", "*.pt") for path in folder.glob(kind)):
            raise UserError(
                f"host={name!r} is too old: its weights are a pickle ({old[0]}), and only safetensors are read. On a "
                "machine that trusts the file: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
                + (f"; for Meta's own files --host=meta:{folder}" if old[0].startswith("consolidated") else "")
            )
        raise UserError(f"host={name!r}: {folder} holds no model.safetensors: name {FILES}")
    files: dict[Path, set[str]] = {}
    with naming_host(name):
        places = read_weight_map(index)
    for tensor, file in places.items():
        files.setdefault(folder / file, set()).add(tensor)
    if absent := sorted(path.name for path in files if not path.is_file()):
        raise UserError(
            f"host={name!r}: {len(absent)} of {len(files)} files are missing, {absent[0]} first: fetch them"
        )
    return files


def read_weights(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, mapped."""
    state: dict[str, torch.Tensor] = {}
    for path, expected in weight_files(name, folder).items():
        with naming_host(name, ": fetch it again"):
            tensors = read_tensors(path)
        if absent := sorted(expected - tensors.keys()):
            raise UserError(
                f"host={name!r}: {path.name} lacks {absent[0]}, which the index says it has: fetch it again"
            )
        state |= tensors
    return state


@contextmanager
def naming_host(name: str, hint: str = "") -> Iterator[None]:
    """A UserError about one of the host's files begins with the setting that named it, and ends with the hint."""
    try:
        yield
    except UserError as error:
        raise UserError(f"host={name!r}: {error}{hint}") from error


class HostTokenizer:
    """tokenizer.json of a host as it is, with nanochat.data.tokenizer.Tokenizer's interface.

    Special-token text inside documents is ordinary text. bos_id is what a document begins with: the bos token, or the
    eos token of models that have no other (Qwen).
    """

    def __init__(self, name: str, folder: Path):
        """UserError: no tokenizer.json, a damaged one, or neither a bos nor an eos token."""
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"host={name!r}: {folder} holds no tokenizer.json: copy the model's own there, or make it with "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        try:
            raw = path.read_bytes()
            self._tokenizer = Tokenizer.from_buffer(raw)
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"host={name!r}: {path} is damaged ({first_line(error)}): fetch it again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as ordinary text
        with naming_host(name):
            roles = read_json(folder / "tokenizer_config.json", f"name {FILES}")
        named = [roles.get(role) for role in ("bos_token", "eos_token")]
        texts = [token.get("content") if isinstance(token, dict) else token for token in named]
        known = [i for text in texts if isinstance(text, str) and (i := self._tokenizer.token_to_id(text)) is not None]
        if not known:
            raise UserError(
                f"host={name!r}: {folder / 'tokenizer_config.json'} names no bos_token nor eos_token of tokenizer.json "
                'for documents to begin with: add it, as in "eos_token": "</s>"'
            )
        self.name, self.bos_id = Path(name).name, known[0]
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.hash = hashlib.sha256(f"host-1 {self.bos_id}\n".encode() + raw).hexdigest()

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of a text, with bos_id in front when asked. Lone surrogates, no Unicode text, become U+FFFD."""
        ids = self._tokenizer.encode(_unicode(text), add_special_tokens=False).ids
        return [self.bos_id, *ids] if bos else ids

    def encode_batch(self, texts: list[str], num_threads: int = 4) -> list[list[int]]:
        """encode() of every text without BOS; tokenizers has threads of its own (RAYON_NUM_THREADS)."""
        coded = self._tokenizer.encode_batch_fast([_unicode(text) for text in texts], add_special_tokens=False)
        return [coding.ids for coding in coded]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, specials as their names; ids of the model's padding rows give nothing."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def _unicode(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
