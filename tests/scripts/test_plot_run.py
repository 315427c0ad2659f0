import json

import pytest

from nanochat.checkpoint_manager import checkpoints_dir
from nanochat.system.environment import UserError, base_dir
from scripts import plot_run


def test_the_picture_shows_the_losses_the_bpb_and_the_compressors(tmp_path, monkeypatch):
    """Red when the points of evaluations are taken for losses, or the compressor's line is not drawn at its value."""
    folder = checkpoints_dir() / "plotted"
    folder.mkdir(parents=True)
    lines = [{"step": 0, "event": "start"}, {"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}]
    lines += [{"step": 2, "event": "eval", "val_bpb": 1.5}, {"step": 2, "event": "done", "val_bpb": 1.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (base_dir() / "base_eval").mkdir(parents=True, exist_ok=True)
    evaluation = {"bpb": {"xz": 1.6, "xz_primed": None}}
    (base_dir() / "base_eval" / "plotted_000002.json").write_text(json.dumps(evaluation), encoding="utf-8")

    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    path = plot_run.main(["--model-tag", "plotted", "--output", str(tmp_path / "run.png")])
    assert path.read_bytes()[:4] == b"\x89PNG"
    left, right = drawn[0].axes
    assert [list(line.get_xydata().ravel()) for line in left.lines] == [[1, 5.0, 2, 4.0]]
    assert list(right.lines[0].get_xydata().ravel()) == [2, 1.5]
    assert [line.get_ydata()[0] for line in right.lines[1:]] == [1.6]


def test_an_unknown_run_is_one_line():
    with pytest.raises(UserError, match="nosuch"):
        plot_run.main(["--model-tag", "nosuch"])


def test_a_torn_log_is_drawn_and_a_bad_output_is_refused(tmp_path):
    """Red when a line that a kill tore ends in a traceback, or the picture's place is looked at last."""
    folder = checkpoints_dir() / "torn"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "lo', encoding="utf-8")
    words = ["--model-tag", "torn", "--output"]
    assert plot_run.main([*words, str(tmp_path / "run.svg")]).read_text().startswith("<?xml")
    (tmp_path / "folder.png").mkdir()
    for name, reason in (("x.xyz", "must end in one of"), ("x", "must end in one of"), ("folder.png", "is a folder")):
        with pytest.raises(UserError, match=f"--output=.*{reason}"):
            plot_run.main([*words, str(tmp_path / name)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "run.svg"]
