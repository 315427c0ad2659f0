"""The token store and the loader: the order against a brute-force reference, resume, ranks, damage, kills."""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nanochat.data import dataloader, token_store
from nanochat.data.dataloader import DataLoader
from nanochat.data.dataset import Corrupt, Dataset
from nanochat.data.prepare import prepare
from nanochat.data.token_store import TokenStore
from nanochat.data.tokenizer import Tokenizer
from nanochat.system.environment import UserError
from nanochat.system.temporary import file_lock
from tests.forked import Forked
from tests.messages import record_messages

TOKENIZER = Tokenizer.train(["the cat sat on the mat. " * 20, "some other words, 12 of them"], 290)
SHARDS = [
    ["the cat sat", "on", "", "the mat. " * 9, "x"],
    ["one document that fills its shard alone, " * 4],
    ["a", "b", "c", "dd", "some other words"],
]


def make_dataset(folder: Path, train=SHARDS, val=(["held out", "twice"],), skip_corrupt=False) -> Dataset:
    """Parquet shards and their manifest, as the contract describes them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for split, stem, shards in (("train", "shard", train), ("val", "val", val)):
        for number, texts in enumerate(shards):
            path = folder / f"{stem}_{number:05d}.parquet"
            names = [f"{stem}{number}/{row}" for row in range(len(texts))]
            pq.write_table(pa.table({"name": names, "text": pa.array(texts, pa.string())}), path)
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            size = path.stat().st_size
            files.append({"name": path.name, "split": split, "size": size, "sha256": sha256, "text_bytes": 0})
    fingerprint = {"sha256": hashlib.sha256(repr((train, val)).encode()).hexdigest()}
    manifest = {"name": "words", "source": "words", "fingerprint": fingerprint, "files": files}
    return Dataset(folder, manifest, skip_corrupt)


def make_store(dataset: Dataset, split: str = "train", **options) -> TokenStore:
    return TokenStore(dataset, options.pop("tokenizer", TOKENIZER), split, **options)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    return make_store(make_dataset(tmp_path_factory.mktemp("data") / "words"))


def permutation(seed: int, kind: int, epoch: int, index: int, size: int) -> list[int]:
    raw = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(kind, epoch, index))).random_raw(size)
    return sorted(range(size), key=lambda i: raw[i])


def reference(seq_len: int, seed: int, count: int, block: int) -> list[tuple[list[int], set[str], int, int]]:
    """The first `count` rows as (seq_len + 1 ids, documents, epoch, row), from whole epochs written out as lists."""
    rows, epoch = [], 0
    while len(rows) < count:
        stream: list[tuple[int, str]] = []
        for shard in permutation(seed, 0, epoch, 0, len(SHARDS)):
            for document in permutation(seed, 1, epoch, shard, len(SHARDS[shard])):
                ids = TOKENIZER.encode(SHARDS[shard][document], bos=True)
                stream += [(i, f"shard_{shard:05d}:{document}") for i in ids]
        starts = range(0, len(stream) - seq_len, seq_len)
        for first in range(0, len(starts), block):
            part = starts[first : first + block]
            for i in permutation(seed, 2, epoch, first // block, len(part)):
                row = stream[part[i] : part[i] + seq_len + 1]
                rows.append(([token for token, _ in row], {name for _, name in row}, epoch, first + i))
        epoch += 1
    return rows[:count]


# -- order ------------------------------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=20)
@given(
    seq_len=st.integers(1, 40),
    rows=st.integers(1, 7),
    seed=st.integers(0, 2**40),
    block=st.sampled_from([1, 3, 8, 8192]),
)
def test_batches_follow_the_stated_order(store, seq_len, rows, seed, block):
    """Inputs, targets and logged documents of several epochs equal a reference that lists every token.

    Red when the epoch is left out of any SeedSequence, when targets are not shifted by one, when the tail of
    an epoch is kept, or when `searchsorted(ends, start, "right")` becomes "left".
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataloader, "BLOCK", block)
        loader = DataLoader(store, rows, seq_len, seed)
        batches = 3 + 400 // (rows * seq_len)
        expected = reference(seq_len, seed, batches * rows, block)
        for batch in range(batches):
            inputs, targets = loader.next()
            wanted = expected[batch * rows : (batch + 1) * rows]
            assert inputs.tolist() == [ids[:-1] for ids, *_ in wanted]
            assert targets.tolist() == [ids[1:] for ids, *_ in wanted]
            logged = loader.last_rows()
            assert [(set(r["documents"]), r["epoch"], r["row"]) for r in logged] == [w[1:] for w in wanted]
            assert all(len(r["documents"]) == len(set(r["documents"])) for r in logged)
            assert loader.epoch == wanted[-1][2]
            assert loader.cursor == (batch + 1) * rows
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == (rows, seq_len)
        assert inputs.is_contiguous()
        assert targets.is_contiguous()


def test_an_epoch_shows_every_row_once_and_epochs_differ(store):
    loader = DataLoader(store, 1, 7, seed=3)
    rows_per_epoch = (sum(store.tokens(i) for i in range(3)) - 1) // 7
    orders = []
    for _ in range(2):
        batches = [loader.next()[0].tolist() for _ in range(rows_per_epoch)]
        orders.append(batches)
    assert loader.epoch == 1
    assert loader.row == rows_per_epoch - 1
    assert orders[0] != orders[1]


def test_order_is_the_same_for_ever():
    """The order of a seed is a promise to checkpoints: these numbers may not change with numpy's version."""
    loader = DataLoader.__new__(DataLoader)
    loader.seed = 42
    assert loader._permutation(2, 0, 0, 8).tolist() == [0, 1, 5, 2, 7, 6, 3, 4]


@hypothesis_settings(max_examples=40)
@given(seq_len=st.integers(1, 30), rows=st.integers(1, 6), before=st.integers(0, 12), seed=st.integers(0, 5))
def test_resume_at_any_cursor_is_the_same_run(store, seq_len, rows, before, seed):
    """State taken after any number of batches, through JSON, continues it exactly; most cases cross epochs.

    Red when state_dict gives the cursor of the batch that is prepared ahead (cursor + rows).
    """
    straight = DataLoader(store, rows, seq_len, seed)
    for _ in range(before):
        straight.next()
    resumed = DataLoader(store, rows, seq_len, seed)
    resumed.next()  # a position to be forgotten
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    assert resumed.state_dict() == straight.state_dict()
    for _ in range(4):
        a, b = straight.next(), resumed.next()
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    assert resumed.state_dict() == straight.state_dict()
    assert resumed.last_rows() == straight.last_rows()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_batch_of_one_rank(store, world_size):
    """Rank slices are disjoint and together, in rank order, the 1-rank batch; so are the logged rows; the state agrees.

    Red when a rank starts at rank * rows instead of rank * rows // world_size.
    """
    alone = DataLoader(store, 6, 5, seed=1)
    ranks = [DataLoader(store, 6, 5, 1, rank, world_size) for rank in range(world_size)]
    for _ in range(12):
        whole = alone.next()
        parts = [loader.next() for loader in ranks]
        assert all(part[0].shape == (6 // world_size, 5) for part in parts)
        for half in (0, 1):
            assert torch.equal(torch.cat([part[half] for part in parts]), whole[half])
        logged = [row for loader in ranks for row in loader.last_rows()]
        assert logged == alone.last_rows() == ranks[-1].last_rows(whole=True)
        assert len({(row["epoch"], row["row"]) for row in logged}) == 6
        assert all(loader.state_dict() == alone.state_dict() for loader in ranks)


def test_batch_size_may_change_on_resume(store):
    """The cursor counts rows: 3 batches of 4 rows and 4 of 3 leave it at the same place."""
    four, three = DataLoader(store, 4, 5, 0), DataLoader(store, 3, 5, 0)
    for _ in range(3):
        four.next()
    three.load_state_dict(four.state_dict())
    again = DataLoader(store, 3, 5, 0)
    for _ in range(4):
        again.next()
    assert torch.equal(three.next()[0], again.next()[0])


def test_a_state_of_another_run_is_refused(store, tmp_path):
    """Each part of the identity is checked by name. Red when load_state_dict takes over the cursor unchecked."""
    loader = DataLoader(store, 2, 5, seed=0)
    loader.next()
    state = loader.state_dict()
    for name, other in (("seed", 1), ("seq_len", 6), ("data", "00"), ("tokenizer", "00")):
        with pytest.raises(UserError, match=rf"{name}=\S+ here, {other} in the checkpoint"):
            loader.load_state_dict(state | {name: other})
    assert loader.state_dict() == state
    fresh = DataLoader(store, 2, 5, seed=0)
    fresh.load_state_dict(state | {"tokens": 5})
    with pytest.raises(UserError, match=rf"has {len(flat(SHARDS))} tokens here, 5 in the checkpoint"):
        fresh.next()


def test_too_little_text_for_one_row(store):
    loader = DataLoader(store, 2, 5000, seed=0)
    for _ in range(2):  # asked again, it says so again
        with pytest.raises(UserError, match=r"data words has \d+ train tokens, less than one row of max_seq_len=5000"):
            loader.next()


def test_assembling_a_batch_is_quick(tmp_path):
    """16 rows of 2048 out of short documents take well under 5 ms, the best of 20."""
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, size=rng.integers(1, 40)))) for _ in range(20_000)]
    loader = DataLoader(make_store(make_dataset(tmp_path, train=[texts])), 16, 2048, seed=0)
    loader.next()
    times = []
    for batch in range(20):
        start = time.perf_counter()
        loader._batch(batch * 16)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.005


# -- the store --------------------------------------------------------------------------------------------------------


def flat(shards: list[list[str]]) -> list[int]:
    return [i for texts in shards for text in texts for i in TOKENIZER.encode(text, bos=True)]


def test_stream_is_bos_and_document_in_path_order(store):
    """Red when the stream follows the training order, or when a document lacks its BOS."""
    expected = flat(SHARDS)
    assert store.stream().tolist() == expected
    for length in (0, 1, len(expected) // 2, len(expected), len(expected) + 9):
        assert store.stream(length).tolist() == expected[:length]
    val = make_store(store.dataset, "val").stream()
    assert val.tolist() == flat([["held out", "twice"]])
    assert val.dtype == np.uint16


def test_stream_takes_no_more_shards_than_it_needs(tmp_path):
    store = make_store(make_dataset(tmp_path))
    assert len(store.stream(10)) == 10
    assert [path.stem for path in store.directory.glob("*.json")] == ["shard_00000"]


def test_a_stream_is_sliced_out_of_the_mapped_files(tmp_path):
    """Every slice and number is that of the ids as a list; none of a single shard is a copy.

    A shard without a token lies between others. Red when a slice ends at its first shard, or stream() concatenates.
    """
    store = make_store(make_dataset(tmp_path, train=[SHARDS[0], [], *SHARDS[1:]]))
    stream, expected = store.stream(), flat(SHARDS)
    for start in (None, *range(0, len(expected) + 3, 7), -5):
        for stop in (None, *range(0, len(expected) + 3, 11), -2):
            assert stream[start:stop].tolist() == expected[start:stop], (start, stop)
    assert [int(stream[i]) for i in (0, 5, -1, len(stream) - 1)] == [expected[i] for i in (0, 5, -1, -1)]
    with pytest.raises(IndexError):
        stream[len(expected)]
    assert np.shares_memory(stream[2:6], store.shard(0)[0])
    assert np.asarray(store.stream(20)).tolist() == expected[:20]


def test_files_are_those_of_the_contract(store):
    store.stream()
    assert store.directory == store.dataset.directory / f"tokens-{TOKENIZER.hash[:8]}"
    ids = np.fromfile(store.directory / "shard_00002.bin", np.uint16)
    offsets = np.load(store.directory / "shard_00002.npy")
    assert ids.tolist() == flat([SHARDS[2]])
    assert np.flatnonzero(ids == TOKENIZER.bos_id).tolist() == offsets[:-1].tolist()
    assert offsets[-1] == len(ids)
    assert not list(store.directory.glob(".*"))


def test_large_vocabularies_get_four_bytes(tmp_path, monkeypatch):
    """Red when the dtype is uint16 whatever the vocabulary: the special ids would wrap around."""
    ranks = [bytes([i]) for i in range(256)] + [
        b"%c%c%c" % (1 + i // 255 % 255, 1 + i % 255, i // 65025) for i in range(66_000)
    ]
    large = Tokenizer(ranks)
    store = make_store(make_dataset(tmp_path), tokenizer=large)
    assert store.stream().dtype == np.uint32
    assert store.stream()[0] == large.bos_id > 2**16


def test_made_ahead_in_the_order_of_the_reader(tmp_path):
    """The first batch sets all shards going, in the order of epoch 0, and waits only for those of its block.

    Red when next() requires only the shard it reads.
    """
    made, started, blocked = [], threading.Event(), threading.Event()
    store = make_store(make_dataset(tmp_path))
    make = store._make

    def slow(shard):
        made.append(shard)
        if len(made) == 3:
            started.set()
            blocked.wait(10)
        return make(shard)

    store._make = slow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataloader, "BLOCK", 4)
        loader = DataLoader(store, 2, 3, seed=5)
        inputs, _ = loader.next()
        assert inputs.tolist() == [ids[:-1] for ids, *_ in reference(3, 5, 2, 4)]
        assert loader.state_dict()["tokens"] is None  # the third shard is not ready
        assert started.wait(10)  # though nothing has asked for it
        blocked.set()
        assert len(store.stream()) == len(flat(SHARDS))
    assert made == permutation(5, 0, 0, 0, 3)


def test_made_once(tmp_path):
    dataset = make_dataset(tmp_path)
    lines: list[str] = []
    with record_messages(lines):
        make_store(dataset).stream()
    with record_messages(lines):
        again = make_store(dataset)
    again._make = None
    assert again.stream().tolist() == flat(SHARDS)
    assert sum(line.startswith("tokenising words (train)") for line in lines) == 1


@pytest.mark.parametrize("suffix", [".bin", ".npy", ".json"])
@pytest.mark.parametrize("damage", ["truncate", "delete", "empty"])
def test_damaged_token_files_are_made_again(tmp_path, suffix, damage):
    """Red when sizes are not compared with the index at opening."""
    dataset = make_dataset(tmp_path)
    store = make_store(dataset)
    store.stream()
    file = store.directory / f"shard_00001{suffix}"
    if damage == "delete":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 2 if damage == "truncate" else 0)
    assert make_store(dataset).stream().tolist() == flat(SHARDS)


def test_a_shard_of_another_hash_is_tokenised_again(tmp_path):
    """Red when the index is believed without the manifest's sha256."""
    make_store(make_dataset(tmp_path)).stream()
    other = [["zzz the cat", *SHARDS[0][1:]], *SHARDS[1:]]
    assert make_store(make_dataset(tmp_path, train=other)).stream().tolist() == flat(other)


def test_corrupt_shards_stop_the_reader_or_are_left_out(tmp_path):
    """Without skip_corrupt the shard is named, also when an earlier run left it out; repaired, it counts again."""
    path = tmp_path / "shard_00001.parquet"

    def corrupt(skip: bool) -> Dataset:
        dataset = make_dataset(tmp_path, skip_corrupt=skip)
        whole = path.read_bytes()
        path.write_bytes(whole[:200] + bytes(len(whole) - 200))
        return dataset

    loader = DataLoader(make_store(corrupt(False)), 2, 5, seed=0)
    for _ in range(2):
        with pytest.raises(Corrupt, match=r"shard_00001\.parquet cannot be read.*--skip_corrupt=True"):
            loader.next()
    assert make_store(corrupt(True)).stream().tolist() == flat([SHARDS[0], SHARDS[2]])
    dataset = corrupt(True)
    store = make_store(dataset)
    DataLoader(store, 2, 5, seed=0).next()
    assert "shard_00001.parquet" in dataset.skipped
    assert store.stream().tolist() == flat([SHARDS[0], SHARDS[2]])
    with pytest.raises(Corrupt, match=r"shard_00001\.parquet"):  # the same files, but nobody asked to leave any out
        make_store(replace(dataset, skip_corrupt=False, skipped={})).stream()
    assert make_store(make_dataset(tmp_path, skip_corrupt=True)).stream().tolist() == flat(SHARDS)


def test_other_ranks_wait_for_the_files(tmp_path):
    """A process that does not make tokens writes nothing, sees them when they are there, and gives up in the end."""
    dataset = make_dataset(tmp_path)
    waiting = make_store(dataset, is_writer=False, timeout_s=0.1)
    with pytest.raises(UserError, match=r"no tokens of .*shard_00000\.parquet after 0\.1 s"):
        waiting.stream()
    assert not waiting.directory.exists()
    waiting.timeout_s = 30
    loader = DataLoader(waiting, 2, 5, 0)
    timer = threading.Timer(0.1, make_store(dataset).stream)
    timer.start()
    assert torch.equal(loader.next()[0], DataLoader(make_store(dataset), 2, 5, 0).next()[0])
    timer.join()


def test_local_rank_decides_who_makes(tmp_path, monkeypatch):
    dataset = make_dataset(tmp_path)
    assert make_store(dataset).is_writer
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not make_store(dataset).is_writer


MAKER = """
import json, sys, time
from pathlib import Path
from nanochat.data.dataloader import TokenStore
from nanochat.data.dataset import Dataset
sys.path.insert(0, sys.argv[2])
from tests.data.test_dataloader import TOKENIZER
manifest = json.loads(Path(sys.argv[1], "words.json").read_text())
store = TokenStore(Dataset(Path(sys.argv[1]), manifest, False), TOKENIZER, is_writer=True)
make = store._make
store._make = lambda shard: (print("made", shard, flush=True), time.sleep(0.2), make(shard))
print("ready", flush=True)
while not Path(sys.argv[1], "go").exists():
    time.sleep(0.001)
for shard in (0, 1, 2):
    store.shard(shard)
    print("mapped", shard, store._file(shard, ".bin").stat().st_ino, flush=True)
"""


def test_two_nodes_on_one_folder_make_each_shard_once(tmp_path):
    """Two makers at the same moment share the work, and no file is replaced that one of them has mapped.

    Red without file_lock() in _work: both make all three shards, and the second one's files take the place.
    """
    (tmp_path / "words.json").write_text(json.dumps(make_dataset(tmp_path).manifest))
    command = [sys.executable, "-c", MAKER, str(tmp_path), str(Path(__file__).parents[2])]
    both = [Forked(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(2)]
    assert [process.readline() for process in both] == ["ready\n"] * 2
    (tmp_path / "go").touch()
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    words = [line.split() for process in both for line in process.output().splitlines()]
    assert sorted(word[1] for word in words if word[0] == "made") == ["0", "1", "2"]
    store = make_store(make_dataset(tmp_path))
    for _, shard, inode in (word for word in words if word[0] == "mapped"):
        assert store._file(int(shard), ".bin").stat().st_ino == int(inode)
    assert store.stream().tolist() == flat(SHARDS)
    assert not list(store.directory.glob(".*"))


def test_a_shard_made_twice_keeps_the_file_that_may_be_mapped(tmp_path, monkeypatch):
    """On a file system without locks the second writer leaves equal files as they are.

    Red without keep_equal=True: the file gets another inode, and a host that has it mapped over NFS loses it.
    """

    def without_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    first = make_store(make_dataset(tmp_path))
    files = [first._file(0, suffix) for suffix in (".bin", ".npy") if len(first.stream())]
    before = [file.stat().st_ino for file in files]
    first._file(0, ".json").unlink()
    made, second = [], make_store(first.dataset)
    make, second._make = second._make, lambda shard: (made.append(shard), make(shard))
    assert second.stream().tolist() == flat(SHARDS)
    assert made == [0]
    assert [file.stat().st_ino for file in files] == before


def test_a_maker_waits_for_another_process_and_gives_up_in_the_end(tmp_path):
    """A shard that another process has locked is put off, the others are made; then the wait is bounded.

    Red when _put_off() does not note the shard, or _work() waits for the lock.
    """
    store = make_store(make_dataset(tmp_path), timeout_s=0.3)
    store.directory.mkdir(parents=True)
    with file_lock(store.directory / ".shard_00000.lock"):
        store.require([0, 1])
        assert store.tokens(1) == len(flat(SHARDS[1:2]))
        with pytest.raises(UserError, match=r"no tokens of .*shard_00000.* waiting for another process"):
            store.tokens(0)
    store.timeout_s = 30
    assert store.stream().tolist() == flat(SHARDS)


def test_a_split_without_shards(tmp_path):
    with pytest.raises(UserError, match="data words has no val shards"):
        make_store(make_dataset(tmp_path, val=()), "val")


def test_a_full_disk_reaches_the_reader_and_leaves_nothing(tmp_path, monkeypatch):
    """Red when the worker swallows its errors, or writes the .bin under its final name."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    store = make_store(make_dataset(tmp_path))
    monkeypatch.setattr(np, "save", full)
    loader = DataLoader(store, 2, 5, 0)
    with pytest.raises(OSError, match="No space"):
        loader.next()
    assert {path.suffix for path in store.directory.iterdir()} <= {".bin"}
    monkeypatch.undo()
    assert make_store(store.dataset).stream().tolist() == flat(SHARDS)


def test_a_failure_of_the_background_is_raised_by_next(store, monkeypatch):
    loader = DataLoader(store, 2, 5, 0)
    loader.next()
    loader.next()  # the third is now under way
    loader._ahead.result()
    monkeypatch.setattr(loader, "_read", None)
    loader.next()
    with pytest.raises(TypeError):
        loader.next()


def test_close_stops_a_shard_halfway(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "CHUNK_CHARACTERS", 1)
    started = threading.Event()
    store = make_store(make_dataset(tmp_path, train=[["word"] * 100_000]))
    encode = store.tokenizer.encode_batch
    slow = lambda texts, threads: (started.set(), time.sleep(0.01), encode(texts, threads))[2]  # noqa: E731
    monkeypatch.setattr(store, "tokenizer", type("Slow", (), {"encode_batch": staticmethod(slow), "bos_id": 0}))
    store.require([0])
    assert started.wait(10)
    store.close()
    assert list(store.directory.iterdir()) == []
    with pytest.raises(RuntimeError, match="stopped"):
        store.tokens(0)


PROGRAM = """
import sys, threading, time
from nanochat.data.prepare import prepare
from nanochat.data.dataloader import DataLoader
from nanochat.data.token_store import TokenStore
from nanochat.data.tokenizer import Tokenizer
from nanochat.data import token_store
token_store.CHUNK_CHARACTERS = 1
started = threading.Event()
class Slow(Tokenizer):
    def encode_batch(self, texts, num_threads):
        print("encoding", flush=True)
        started.set()
        time.sleep(0.02)
        return super().encode_batch(texts, num_threads)
store = TokenStore(prepare(sys.argv[1]), Slow([bytes([i]) for i in range(256)]))
store.require([0])
started.wait()
if sys.argv[2] == "wait":
    store.tokens(0)
DataLoader(TokenStore(store.dataset, store.tokenizer, "val", is_writer=False), 1, 8, seed=0)._start(0)
"""


@pytest.mark.parametrize("ending", ["kill", "interrupt", "exit"])
def test_an_ended_process_leaves_no_counted_file(tiny_corpus, tmp_path, ending):
    """Killed, interrupted or simply at its end in the middle of a shard: no index, and the next process makes it.

    An interrupt or the program's end do not wait for the shard, nor for a batch that waits for another process. Red
    when the index is written before the ids, or when _running does not look whether the main thread is alive.
    """
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROGRAM, str(tiny_corpus), "exit" if ending == "exit" else "wait"]
    if ending == "kill":
        process = Forked(command, env=environment)
        readline = process.readline
    else:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        readline = process.stdout.readline
    while (line := readline()).strip() != "encoding":
        assert process.poll() is None, line
    if ending != "exit":
        process.send_signal(signal.SIGKILL if ending == "kill" else signal.SIGINT)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == {"kill": -signal.SIGKILL, "interrupt": -signal.SIGINT, "exit": 0}[ending]
    assert printed.count("encoding") < 40
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
        dataset = prepare(str(tiny_corpus))
    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    store = make_store(dataset, tokenizer=tokenizer)
    left = sorted(path.suffix for path in store.directory.iterdir())
    assert left == ([".lock", ".tmp"] if ending == "kill" else [])
    expected = [i for _, text in dataset.documents("train") for i in tokenizer.encode(text, bos=True)]
    assert store.stream().tolist() == expected
    store.close()
    assert sorted(path.suffix for path in store.directory.iterdir()) == [".bin", ".json", ".npy"]
