"""Folders and hub repositories in transformers' format: whole, damaged, absent; and their tokenizers."""

import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoTokenizer

from nanochat.adapters.hosts import load_host
from nanochat.adapters.transformers_host import HostTokenizer
from nanochat.system.environment import UserError
from tests.hosts_fixtures import BOS, EOS, tiny_llama, tiny_tokenizer
from tests.messages import record_messages

TEXT = f"the king\n  on a {BOS} thing{EOS}, être 東 \U0001f600"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a whole host in several files."""
    folder = tmp_path_factory.mktemp("made")
    tiny_llama(folder, shard_bytes=20_000)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(made, tmp_path / "host")


def refusal(name) -> str:
    with pytest.raises(UserError) as caught:
        load_host(str(name), "cpu", torch.float32)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("host=")
    return str(caught.value)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_damaged_weights_are_named(folder):
    """A file cut off, one gone, a tensor that is not where the index says, an index that leads elsewhere. Red when the
    index is not compared with the files."""
    first, second, *_ = sorted(folder.glob("model-*"))
    index = folder / "model.safetensors.index.json"
    whole, known = first.read_bytes(), json.loads(index.read_text())["weight_map"]
    first.write_bytes(whole[:-100])
    assert f"{first.name} cannot be read" in refusal(folder)
    assert "fetch it again" in refusal(folder)
    first.write_bytes(b"")
    assert f"{first.name} cannot be read" in refusal(folder)
    first.unlink()
    assert f"1 of {len(set(known.values()))} files are missing, {first.name}" in refusal(folder)
    first.write_bytes(second.read_bytes())
    assert f"{first.name} lacks" in refusal(folder)
    first.write_bytes(whole)
    edit(index, weight_map={**known, "another": f"../{first.name}"})
    assert "weight_map does not name files beside it" in refusal(folder)
    index.write_text("{")
    assert "index.json is not JSON" in refusal(folder)
    index.unlink()
    assert "holds no model.safetensors" in refusal(folder)


def test_pickles_are_not_read(folder):
    """Red when transformers is left to look for the weights."""
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "too old" in refusal(folder)
    assert "save_pretrained(NEW_FOLDER)" in refusal(folder)
    (folder / "pytorch_model.bin").rename(folder / "consolidated.00.pth")
    assert f"--host=meta:{folder}" in refusal(folder)


def test_absent_or_damaged_descriptions(folder, tmp_path):
    """Red when any of these ends in another error than the user's."""
    assert "there is no such folder" in refusal(tmp_path / "absent")
    assert "there is no such folder" in refusal("./absent")
    assert "cannot be looked up" in refusal("x" * 5000)
    config = (folder / "config.json").read_text()
    for text in ("{", "[]", "\x00", '{"model_type": ["llama"]}', '{"model_type": "novel", "auto_map": {}}'):
        (folder / "config.json").write_text(text)
        assert re.search("is not JSON|does not hold a JSON object|no text decoder", refusal(folder))
    (folder / "config.json").write_text(config)
    for changes in (dict(num_attention_heads=0), dict(hidden_size="wide"), dict(hidden_act="novel")):
        (folder / "config.json").write_text(config)
        edit(folder / "config.json", **changes)
        assert "cannot read it" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json cannot be read (No such file or directory)" in refusal(folder)


def test_absent_or_damaged_tokenizers(folder):
    """Red when a document would begin with no token."""
    for text, told in (
        ("{}", "no bos_token nor eos_token"),
        ('{"bos_token": "<novel>"}', "no bos_token"),
        ("", "is not JSON"),
    ):
        (folder / "tokenizer_config.json").write_text(text)
        assert told in refusal(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is damaged" in refusal(folder)
    (folder / "tokenizer.json").unlink()
    assert "holds no tokenizer.json: copy" in refusal(folder)


# ---------------------------------------------------------------------------------------------------------------------
# hub names


def test_a_hub_name_that_is_not_here(monkeypatch):
    """Red when the network is tried although it is forbidden, or the way out is not told."""
    told = refusal("some/model")
    assert "HF_HUB_OFFLINE forbids the network" in told
    assert "hf auth login" in told
    assert "tokenizer.json" in told
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in refusal("some/model")


def test_a_hub_name_in_the_local_cache_needs_no_network(made, tmp_path, monkeypatch):
    """Red when the hub is asked first; a cache that lacks a file is not enough."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--some--model", "0123456789" * 4
    shutil.copytree(made, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    host = load_host("some/model", "cpu", torch.float32)
    assert host.name == "some/model"
    assert host.hash == load_host(str(made), "cpu", torch.float32).hash
    next((repository / "snapshots" / commit).glob("model-*")).unlink()
    assert "forbids the network" in refusal("some/model")


@pytest.fixture
def hub(made, tmp_path, monkeypatch):
    """A hub on this machine with one repository, some/model; the requests that it got, as (method, path)."""
    from huggingface_hub import constants

    commit, asked = "0123456789" * 4, []
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    files |= {
        "original/params.json": b"{}",
        "consolidated.safetensors": b"",
        "pytorch_model.bin": b"",
        "README.md": b"",
    }

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            path, status, body = self.path.partition("?")[0], 200, b""
            asked.append((self.command, path))
            if path.startswith(f"/some/model/resolve/{commit}/"):
                body = files[path.split(commit + "/")[1]]
            elif path.startswith("/api/models/some/model/tree/"):
                tree = [dict(type="file", path=name, size=len(data), oid="0" * 40) for name, data in files.items()]
                body = json.dumps(tree).encode()
            elif path.startswith("/api/models/some/model"):
                body = json.dumps(
                    dict(id="some/model", sha=commit, siblings=[dict(rfilename=f) for f in files])
                ).encode()
            elif path != "/":
                status, body = 404, b"{}"
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for name, value in dict(HF_HUB_OFFLINE="0", HF_ENDPOINT=address, NO_PROXY="127.0.0.1").items():
            monkeypatch.setenv(name, value)
        bound = dict(  # what huggingface_hub read of the environment when it was imported
            HF_HUB_OFFLINE=False,
            ENDPOINT=address,
            HF_HUB_CACHE=str(tmp_path / "cache"),
            HUGGINGFACE_CO_URL_TEMPLATE=address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        for name, value in bound.items():
            monkeypatch.setattr(constants, name, value)
        yield asked
        server.shutdown()


def test_a_hub_name_is_fetched_once(hub, made, tmp_path):
    """Only the files that are read, and on the second time none. Red when all of the repository is fetched, the cache
    is not looked at, or a part that is missing from it is not fetched."""
    wanted, said = load_host(str(made), "cpu", torch.float32).hash, []
    with record_messages(said):
        assert load_host("some/model", "cpu", torch.float32).hash == wanted
    assert "looking on the hub" in said[0]
    fetched = {path.rsplit("/", 1)[1] for method, path in hub if method == "GET" and "/resolve/" in path}
    assert fetched == {path.name for path in made.iterdir()}
    hub.clear()
    with record_messages(said):
        assert load_host("some/model", "cpu", torch.float32).hash == wanted
        assert not hub
    for pattern in ("model-00002*", "tokenizer.json"):
        next((tmp_path / "cache").glob(f"*/snapshots/*/{pattern}")).unlink()
        with record_messages(said):
            assert load_host("some/model", "cpu", torch.float32).hash == wanted
            assert hub
    assert "404" in refusal("some/other")


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers


def test_ids_are_those_of_transformers_and_no_text_gives_a_special_one(made):
    """Red when special tokens are looked for in the text, or added around it."""
    ours, theirs = HostTokenizer("host", made), AutoTokenizer.from_pretrained(made, split_special_tokens=True)
    ids = ours.encode(TEXT)
    assert ids == theirs(TEXT, add_special_tokens=False).input_ids
    assert max(ids) < 262
    assert ours.encode(TEXT, bos=True) == [262, *ids]
    assert ours.decode([262, *ids, 263]) == BOS + TEXT + EOS
    assert ours.encode_batch([TEXT, "", "on"], 2) == [ids, [], ours.encode("on")]
    assert (ours.bos_id, ours.vocab_size, ours.name) == (262, 264, "host")
    assert ours.decode([*ids, 271]) == TEXT  # a padding row of the model's
    assert ours.decode(ours.encode("a\ud83d\ude00b\udc00c")) == "a\U0001f600b\ufffdc"


def test_a_tokenizer_without_bos_begins_with_eos(tmp_path):
    """Qwen's. Red when only bos_token is looked at."""
    tiny_tokenizer(tmp_path, bos=False)
    assert HostTokenizer("host", tmp_path).bos_id == 262
    assert HostTokenizer("host", tmp_path).decode([262]) == EOS
    edit(tmp_path / "tokenizer_config.json", bos_token={"content": "<|pad|>", "__type": "AddedToken"})
    assert HostTokenizer("host", tmp_path).decode([HostTokenizer("host", tmp_path).bos_id]) == "<|pad|>"


def test_the_hash_is_of_what_makes_ids(made, tmp_path):
    """The chat template is no part of it, the vocabulary and the first id are. Red when one of the two is left out."""
    tiny_tokenizer(tmp_path)
    before = HostTokenizer("host", tmp_path).hash
    assert before == HostTokenizer("another", made).hash
    edit(tmp_path / "tokenizer_config.json", chat_template="{{ messages }}")
    assert HostTokenizer("host", tmp_path).hash == before
    edit(tmp_path / "tokenizer_config.json", bos_token=EOS)
    assert HostTokenizer("host", tmp_path).hash != before
    edit(tmp_path / "tokenizer_config.json", bos_token=BOS)
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text() + " ")
    assert HostTokenizer("host", tmp_path).hash != before


def test_long_documents_are_neither_cut_nor_filled(made, tmp_path):
    """A tokenizer.json may ask for both. Red when its truncation or padding is kept."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    edit(
        tmp_path / "tokenizer.json",
        truncation=dict(direction="Right", max_length=4, strategy="LongestFirst", stride=0),
        padding=dict(
            strategy={"Fixed": 9}, direction="Right", pad_to_multiple_of=None, pad_id=0, pad_type_id=0, pad_token="!"
        ),
    )
    ours = HostTokenizer("host", tmp_path)
    assert len(ours.encode("12345678")) == 8
    assert ours.encode_batch(["12", "12345678"])[0] == ours.encode("12")
