"""nanochat's own files: a real pickled Encoding and torch.save's files come back; no other pickle does anything."""

import io
import os
import pickle
import random
import re
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import tiktoken
import torch
from tiktoken import registry

from nanochat.config.settings import Settings
from nanochat.data.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from nanochat.data_pipeline import find_or_train
from nanochat.system.environment import UserError
from nanochat.upstream import pickles
from nanochat.upstream.pickles import read_pt, read_pt_tree, read_tokenizer_pickle
from scripts import inspect_checkpoint

SPECIALS = SPECIAL_TOKENS[:9]  # nanochat has no reserved ones
TEXT = Path(tiktoken.core.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    """What nanochat pickles: the name rustbpe, our pattern, the merges of a text, 9 special tokens."""
    ranks = {token: i for i, token in enumerate(Tokenizer.train([TEXT], 600).ranks)}
    specials = {token: len(ranks) + i for i, token in enumerate(SPECIALS)}
    return tiktoken.Encoding("rustbpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def with_state(state: object) -> bytes:
    """The pickle of an Encoding that would be given this state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken.Encoding, "__getstate__", lambda self: state)
        return pickle.dumps(tiktoken.Encoding.__new__(tiktoken.Encoding), protocol=4)


class Call:
    """Unpickled, it is the result of a call."""

    def __init__(self, function: Callable, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def baits(marker: Path) -> dict[str, object]:
    """Objects by the name that a refusal has to say; unpickled as usual, each of them makes the marker file."""
    legacy = io.BytesIO()
    torch.save(Call(os.mkdir, str(marker)), legacy, _use_new_zipfile_serialization=False)
    return {
        "posix.system": Call(os.system, f"touch '{marker}'"),
        "builtins.eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "builtins.exec": Call(exec, f"open({str(marker)!r}, 'w')"),
        "io.open": Call(open, str(marker), "w"),
        "posix.mkdir": Call(os.mkdir, str(marker)),
        "torch.storage._load_from_bytes": Call(torch.storage._load_from_bytes, legacy.getvalue()),
    }


def hostile_pickles(marker: Path) -> list[tuple[str, bytes]]:
    """(what the refusal says, tokenizer.pkl): every bait alone, nested in an Encoding's state, and as its key."""
    cases = [(f"asks for '{name}'", pickle.dumps(bait, 4)) for name, bait in baits(marker).items()]
    cases += [
        (f"asks for '{name}'", with_state({"name": "x", "pat_str": bait, "mergeable_ranks": {}, "special_tokens": {}}))
        for name, bait in baits(marker).items()
    ]
    touch = f"touch '{marker}'"
    return [
        *cases,
        ("asks for 'os.system'", f"cos\nsystem\n(S\"touch '{marker}'\"\ntR.".encode()),  # protocol 0
        ("INST 'os system'", f"(\x8c{chr(len(touch))}{touch}ios\nsystem\n.".encode("latin-1")),
    ]


def works(load: Callable[[], object], marker: Path) -> bool:
    """Whether an unguarded load makes the marker: a bait that nobody would take proves nothing."""
    with suppress(Exception):
        load()
    made = marker.exists()
    if made:
        marker.rmdir() if marker.is_dir() else marker.unlink()
    return made


def refused(read: Callable, path: Path, content: bytes) -> str:
    """What the UserError says of a file with this content: one line with the file's name."""
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


# -- tokenizer.pkl ----------------------------------------------------------------------------------------------------


def test_a_pickled_encoding_comes_back(encoding, tmp_path):
    """Ids and text as tiktoken has them, random text too. Red when the specials lose their order (sorted(specials))."""
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    tokenizer = read_tokenizer_pickle(tmp_path / "tokenizer.pkl")
    assert (tokenizer.vocab_size, tokenizer.name, tokenizer.specials) == (encoding.n_vocab, tmp_path.name, SPECIALS)
    assert [tokenizer.special_id(token) for token in SPECIALS] == [encoding._special_tokens[t] for t in SPECIALS]
    rng = random.Random(7)
    for _ in range(200):
        start = rng.randrange(len(TEXT))
        noise = "".join(chr(rng.choice((rng.randrange(32, 0x2FF), rng.randrange(0x3000, 0xD000)))) for _ in range(9))
        text = TEXT[start : start + rng.randrange(90)] + noise + rng.choice(SPECIALS)
        assert tokenizer.encode(text) == encoding.encode_ordinary(text)
        assert tokenizer.decode(encoding.encode(text, allowed_special="all")) == text


@pytest.mark.parametrize("place", ["folder", "name"])
def test_a_run_takes_it_and_leaves_the_folder_alone(encoding, tmp_path, monkeypatch, place):
    """--tokenizer=<folder>, or its name under tokenizers/. Red when save() does not look for tokenizer.pkl."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    folder = tmp_path / "tokenizers" / "old"
    folder.mkdir(parents=True)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    found = find_or_train(Settings(tokenizer=str(folder) if place == "folder" else "old"), dataset=None)
    assert found.vocab_size == encoding.n_vocab
    with pytest.raises(UserError, match="is only read"):
        found.save(folder)
    assert [path.name for path in folder.iterdir()] == ["tokenizer.pkl"]
    copied = Tokenizer.load(found.save(tmp_path / "step" / "tokenizer"))  # as a checkpoint takes it along
    assert copied.hash == found.hash


def test_hostile_tokenizer_pickles(tmp_path):
    """Refused by the name of what they ask for, nothing called. Red when find_class returns super().find_class()."""
    marker = tmp_path / "marker"
    for reason, content in hostile_pickles(marker):
        assert reason in refused(read_tokenizer_pickle, tmp_path / "tokenizer.pkl", content)
        assert not marker.exists()
        assert works(lambda content=content: pickle.loads(content), marker), reason


def test_a_registered_encoding_would_be_downloaded(encoding, tmp_path, monkeypatch):
    """tiktoken pickles it as its name alone. Red when find_class returns the real Encoding, which then asks for it."""
    monkeypatch.setitem(registry.ENCODINGS, "rustbpe", encoding)
    content = pickle.dumps(encoding)
    assert len(content) < 100
    asked = []
    monkeypatch.setattr(registry, "get_encoding", lambda name: asked.append(name) or encoding)
    assert "only the name 'rustbpe' of an encoding" in refused(
        read_tokenizer_pickle, tmp_path / "tokenizer.pkl", content
    )
    assert asked == []
    pickle.loads(content)
    assert asked == ["rustbpe"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (None, "the Encoding's state is a NoneType"),
        ({"explicit": 1}, "holds 'explicit'"),
        ({"pat_str": None}, "not a text and two dicts"),
        ({"pat_str": r"\p{N("}, "damaged"),
        ({"pat_str": "\ud800"}, "damaged"),
        ({"mergeable_ranks": {}}, "256 of the 256 single bytes are missing"),
        ({"mergeable_ranks": {b"\0": 1}}, "the ranks are not 0, 1, 2"),
        ({"mergeable_ranks": {"a": 0}}, "'a' is no bytes with a number"),
        ({"mergeable_ranks": {b"": 0}}, "b'' is no bytes with a number"),
        ({"mergeable_ranks": {b"a": b"0"}}, "b'a' is no bytes with a number"),
        ({"special_tokens": {"<|bos|>": 5}}, "not the ids after 584 ranks"),
        ({"special_tokens": {"<|bos|>": 584, "<|x|>": 584}}, "not the ids after 584 ranks"),
        ({"special_tokens": {"<|x|>": 584}}, r"<|bos|> is missing"),
        ({"special_tokens": {b"<|bos|>": 584}}, "is no str with a number"),
    ],
)
def test_no_tokenizer_at_all(encoding, tmp_path, changes, reason):
    """Each value is checked. Red without the one check that the reason is of."""
    state = changes and encoding.__getstate__() | changes
    assert reason in refused(read_tokenizer_pickle, tmp_path / "tokenizer.pkl", with_state(state))


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_damaged_and_oversized_pickles(encoding, tmp_path, monkeypatch):
    """Cut, empty or flipped: one line or the tokenizer. Red without the limit of the size, or ValueError in DAMAGE."""
    whole, path = pickle.dumps(encoding), tmp_path / "tokenizer.pkl"
    for size in (0, 1, 2, 12, 40, 200, len(whole) // 2, len(whole) - 1):
        assert "damaged" in refused(read_tokenizer_pickle, path, whole[:size])
    rng = random.Random(3)
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(400)] = rng.randrange(256)
        path.write_bytes(changed)
        with suppress(UserError):
            read_tokenizer_pickle(path)
    assert "it holds a dict" in refused(read_tokenizer_pickle, path, pickle.dumps({}))
    monkeypatch.setattr(pickles, "LARGEST_TOKENIZER", len(whole) - 1)
    assert "larger than" in refused(read_tokenizer_pickle, path, whole)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_tokenizer_pickle(tmp_path / "none")


def test_few_bytes_cost_neither_memory_nor_time(tmp_path):
    """A memo slot of a high number, and a key of 60 nested pairs: seconds or gigabytes. Red when ADMITTED has them."""
    slot = b"\x80\x04}r" + struct.pack("<I", 2**31 - 2) + b"."
    assert "LONG_BINPUT 2147483646 at byte 3" in refused(read_tokenizer_pickle, tmp_path / "t.pkl", slot)
    pairs = b"".join(b"\x86\x94h%c" % i for i in range(60))  # pair i of memo slot i, which lies on the stack already
    key = b"\x80\x04}K\x01K\x01" + pairs + b"\x86K\x00s."
    assert "TUPLE2 at byte 7" in refused(read_tokenizer_pickle, tmp_path / "t.pkl", key)


# -- model_*.pt -------------------------------------------------------------------------------------------------------


def saved(thing: object) -> bytes:
    stream = io.BytesIO()
    torch.save(thing, stream)
    return stream.getvalue()


def repacked(content: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The zip with every member's bytes changed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return stream.getvalue()


def test_tensors_come_back(tmp_path, capsys):
    """Values, types and shapes as torch.save got them, shared storages too; the inspector lists them.

    Red when read_pt returns the tensors of another dtype (tensor.float()).
    """
    state = {
        "transformer.wte.weight": torch.randn(5, 4, generator=torch.Generator().manual_seed(1)),
        "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3).T,
        "count": torch.tensor(7),
        "\x1b[2J": torch.zeros(0, dtype=torch.bool),
    }
    state["tied"] = state["transformer.wte.weight"]
    path = tmp_path / "model_000005.pt"
    path.write_bytes(saved(state))
    found = read_pt(path)
    assert list(found) == list(state)
    assert all(found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in state.items())
    assert found["tied"].data_ptr() == found["transformer.wte.weight"].data_ptr()
    before = path.read_bytes()
    found["count"] += 1  # private pages
    assert path.read_bytes() == before
    report = inspect_checkpoint.main([str(path), "--tensors"])
    assert report["weights_hash"] == inspect_checkpoint.weights_hash(state)
    out = capsys.readouterr().out
    assert re.search(r"transformer\.wte\.weight +float32 +\[5, 4\]", out)
    assert re.search(r"half +bfloat16 +\[3, 2\]", out)
    assert r"\x1b[2J" in out
    assert "\x1b" not in out


def test_hostile_pt_files(tmp_path):
    """Baits as the file, as a value, as a name. Red with weights_only=False."""
    marker, path = tmp_path / "marker", tmp_path / "model_000001.pt"
    for name, bait in baits(marker).items():
        for thing in (bait, {"w": torch.ones(2), "x": bait}, {"a": {"b": [bait]}}):
            content = saved(thing)
            assert name.split(".")[-1] in refused(read_pt, path, content)
            assert not marker.exists()
            assert works(lambda content=content: torch.load(io.BytesIO(content), weights_only=False), marker), name
    legacy = io.BytesIO()
    torch.save({"w": torch.ones(2)}, legacy, _use_new_zipfile_serialization=False)
    for content in (legacy.getvalue(), pickle.dumps(Call(os.mkdir, str(marker)))):
        assert "not a zip file" in refused(read_pt, path, content)
    assert not marker.exists()


def test_tensors_that_claim_too_much(tmp_path):
    """Views of a few bytes as gigabytes, compressed parts, other things. Red without the check of nbytes."""
    path = tmp_path / "model_000001.pt"
    assert "claims 4,000,000,000,000 bytes" in refused(read_pt, path, saved({"w": torch.ones(1).expand(10**6, 10**6)}))
    content = saved({"w": torch.ones(64)})
    for claimed in (65, 10**4):  # more elements than the storage has, in the pickle that describes the tensor
        larger = repacked(
            content,
            lambda name, raw, n=claimed: (
                raw.replace(b"K@\x85", b"M" + struct.pack("<H", n) + b"\x85", 1) if name.endswith("data.pkl") else raw
            ),
        )
        assert larger != content
        refused(read_pt, path, larger)
    assert "compressed" in refused(read_pt, path, repacked(content, lambda name, raw: raw, zipfile.ZIP_DEFLATED))
    assert "it holds a list" in refused(read_pt, path, saved([torch.ones(2)]))
    assert "'step' holds a int" in refused(read_pt, path, saved({"step": 3}))
    assert "names a tensor with a int" in refused(read_pt, path, saved({3: torch.ones(2)}))
    sparse = torch.eye(3).to_sparse()
    assert "not a dense tensor" in refused(read_pt, path, saved({"w": sparse}))


def test_trees_come_back(tmp_path):
    """An optimizer's nested state, and a few bytes that nest without end. Red without `met` in read_pt_tree()."""
    path = tmp_path / "optim_000001.pt"
    tree = [
        {"state": {0: {"step": 3, "m": torch.ones(2)}}, "param_groups": [{"betas": (0.9, 1), "on": True, "x": None}]}
    ]
    path.write_bytes(saved(tree))
    assert read_pt_tree(path)[0]["param_groups"] == tree[0]["param_groups"]
    assert torch.equal(read_pt_tree(path)[0]["state"][0]["m"], torch.ones(2))
    deep: list = []
    for _ in range(60):
        deep = [deep, deep]
    path.write_bytes(saved(deep))
    assert len(read_pt_tree(path)) == 2
    loop = {"a": []}
    loop["a"].append(loop)
    path.write_bytes(saved(loop))
    assert read_pt_tree(path)["a"][0]["a"] is not None
    marker = tmp_path / "marker"
    for bait in baits(marker).values():
        refused(read_pt_tree, path, saved([{"state": {0: bait}}]))
    wide = {"m": torch.ones(1).expand(10**6, 10**6)}
    for thing, reason in (([wide], "claims 4,000"), ({"s": {1, 2}}, "holds a set"), ([b"x"], "holds a bytes")):
        assert reason in refused(read_pt_tree, path, saved(thing))
    assert "damaged" in refused(read_pt_tree, path, saved([torch.ones(9)])[:-9])
    assert not marker.exists()


def test_damaged_pt_files(tmp_path):
    """Cut anywhere, or with other bytes in the pickle: one line. Red without RuntimeError in DAMAGE."""
    whole, path = saved({f"w{i}": torch.ones(i, 3) for i in range(1, 5)}), tmp_path / "model_000001.pt"
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        refused(read_pt, path, whole[:size])
    rng = random.Random(5)

    def harm(name: str, raw: bytes) -> bytes:
        changed = bytearray(raw)
        if name.endswith("data.pkl"):
            for _ in range(rng.randrange(1, 4)):
                changed[rng.randrange(len(raw))] = rng.randrange(256)
        return bytes(changed)

    for _ in range(200):
        path.write_bytes(repacked(whole, harm))
        with suppress(UserError):
            read_pt(path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_pt(tmp_path / "none.pt")
