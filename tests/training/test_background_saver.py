"""Background saves: a copy is written, one at a time, and errors come back into the loop."""

import threading

import pytest
import torch

from nanochat import checkpoint_files
from nanochat import checkpoint_manager as cm
from nanochat.training.background_saver import BackgroundSaver

META = dict(settings={}, model_config={})


@pytest.fixture
def gate(monkeypatch):
    """save_file() waits until gate.set(); gate.begun tells that it was entered."""
    real, event = checkpoint_files.save_file, threading.Event()
    event.begun = threading.Event()

    def slow(tensors, path):
        event.begun.set()
        assert event.wait(20)
        real(tensors, path)

    monkeypatch.setattr(checkpoint_files, "save_file", slow)
    yield event
    event.set()


def test_what_was_copied_is_saved_though_the_training_goes_on(tmp_path, gate):
    """Red when the copy shares memory with the weights, or when save() waits for the disk."""
    weight, moment = torch.ones(3, 4), torch.zeros(5)
    saver = BackgroundSaver(tmp_path, None, None)
    assert saver.save(1, [("w", weight)], [("m", moment)], META) is None
    assert gate.begun.wait(20)
    weight += 1
    moment += 7
    assert saver.poll() is None
    assert cm.list_steps(tmp_path) == []
    gate.set()
    assert saver.wait() == checkpoint_files.step_dir(tmp_path, 1)
    model, optimizer, _ = cm.load_checkpoint(tmp_path, 1, load_optimizer=True)
    assert model["w"].eq(1).all()
    assert optimizer["m"].eq(0).all()
    # the memory of the first copy serves the second, and what is gone does not stay
    assert saver.save(2, [("w", weight), ("new", weight[0])], [], META) is None
    saver.wait()
    model, optimizer, _ = cm.load_checkpoint(tmp_path, 2, load_optimizer=True)
    assert {name: t.tolist() for name, t in model.items()} == {"w": [[2.0] * 4] * 3, "new": [2.0] * 4}
    assert optimizer == {}


def test_only_one_save_is_in_flight(tmp_path, gate):
    """Red when save() does not wait for the one before: both would write from the same copy."""
    saver = BackgroundSaver(tmp_path, None, None)
    saver.save(1, [("w", torch.ones(2))], [], META)
    second = threading.Thread(target=lambda: saver.save(2, [("w", torch.zeros(2))], [], META))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.set()
    second.join(20)
    saver.wait()
    assert cm.list_steps(tmp_path) == [1, 2]
    assert cm.load_checkpoint(tmp_path, 1)[0]["w"].tolist() == [1, 1]


@pytest.mark.parametrize("call", ["poll", "wait", "save"])
def test_an_error_surfaces_at_the_next_call_and_once(tmp_path, monkeypatch, call):
    """Red when _write lets its exception end the thread."""

    def full(*_):
        raise OSError(28, "No space left on device")

    saver = BackgroundSaver(tmp_path, None, None)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "save_file", full)
        saver.save(1, [("w", torch.ones(2))], [], META)
        saver._thread.join()
    with pytest.raises(OSError, match="No space"):
        saver.save(2, [], [], META) if call == "save" else getattr(saver, call)()
    assert saver.poll() is None
    assert cm.list_steps(tmp_path) == []


def test_leaving_the_loop_by_an_exception_lets_a_save_end(tmp_path, gate):
    saver = BackgroundSaver(tmp_path, None, None)
    threading.Timer(0.2, gate.set).start()
    with pytest.raises(KeyError), saver:
        saver.save(1, [("w", torch.ones(2))], [], META)
        raise KeyError
    assert cm.list_steps(tmp_path) == [1]


def test_other_ranks_take_part_and_write_nothing(tmp_path):
    taken = []
    saver = BackgroundSaver(tmp_path, None, None, rank=1)
    saver.save(1, [("w", torch.ones(2))], (taken.append(n) or (n, torch.ones(1)) for n in "ab"), META)
    assert taken == ["a", "b"]
    assert saver.wait() is None
    assert not list(tmp_path.iterdir())
