"""Full disks, quotas and limits: one line, code 2, whichever library met them; what was saved before stays."""

import errno
import json
import os
import textwrap

import pytest
import torch
from safetensors import SafetensorError

from nanochat import checkpoint_files
from nanochat import checkpoint_manager as cm
from nanochat.files import write_atomically
from nanochat.system.storage_errors import HINTS, describe, find_storage_error, naming_storage_errors
from scripts.base_train import main
from tests.forked import Forked
from tests.tiny_run import TINY, exit_code, flags, metrics, start, state_hashes, tag_dir


def serializing(code: int) -> Exception:
    return SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")


FORMS = {
    "python": lambda code: OSError(code, os.strerror(code)),
    "safetensors": serializing,
    "tokenizers": lambda code: Exception(f"{os.strerror(code)} (os error {code})"),
    "pyarrow": lambda code: OSError(code, f"Error writing bytes to file. Detail: [errno {code}] {os.strerror(code)}"),
}
CODES = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_every_form_of_every_code_is_read(form, code, tmp_path):
    """Red when NUMBER does not know "(os error N)", or when a code is missing in HINTS."""
    found = find_storage_error(FORMS[form](code), tmp_path)
    assert (found.errno, found.strerror, found.filename) == (code, os.strerror(code), str(tmp_path))
    line = describe(found, tmp_path)
    assert line == f"{os.strerror(code)}: {tmp_path} ({HINTS[code]})"
    assert "NANOCHAT_BASE_DIR" in line


def test_what_is_no_storage_failure_stays_what_it_is(tmp_path):
    """Red when _read takes any number in a message, or a path of the caller replaces the error's own."""
    for other in (ValueError("step 28"), KeyError("os error"), OSError(errno.EINTR, "Interrupted"), MemoryError()):
        assert find_storage_error(other, tmp_path) is None
    assert find_storage_error(OSError(errno.ENOTCONN, "a socket's")) is None
    own = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/own/path")
    assert find_storage_error(own, tmp_path) is own
    copied = OSError(errno.ENOSPC, "full", "/from", None, "/to")
    assert find_storage_error(copied, tmp_path).filename == "/to"
    wrapped = RuntimeError("the library's own words")
    wrapped.__cause__ = serializing(errno.EDQUOT)
    assert find_storage_error(wrapped, tmp_path).errno == errno.EDQUOT
    with pytest.raises(ZeroDivisionError), naming_storage_errors(tmp_path):
        1 / 0  # noqa: B018


LIMITED = """
import json, resource, sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from safetensors.torch import save_file
import torch
from pathlib import Path
from nanochat.system.storage_errors import find_storage_error
from nanochat.training.tracker import MetricsLog
from nanochat.files import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
folder = Path(sys.argv[1])
values = np.random.default_rng(0).random(10_000)
writers = dict(
    safetensors=lambda path: save_file({"a": torch.from_numpy(values)}, path),
    numpy=lambda path: np.save(path, values),
    pyarrow=lambda path: pq.write_table(pa.table({"a": values}), path),
    text=lambda path: path.write_text(json.dumps(values.tolist())),
    atomic=lambda path: write_atomically(path, json.dumps(values.tolist())),
    metrics=lambda path: [MetricsLog(path).write(1, values=values.tolist())],
)
for name, write in writers.items():
    try:
        write(folder / name)
    except Exception as error:
        found = find_storage_error(error, folder / "default")
        print(json.dumps([name, found and found.errno, found and found.filename]))
"""


def test_a_file_size_limit_is_seen_in_every_writer(tmp_path):
    """RLIMIT_FSIZE as the kernel enforces it, through the libraries that write our files.

    Red when SHORT_WRITE is not looked for (numpy), or MetricsLog writes without naming_storage_errors().
    """
    process = Forked(["python", "-c", LIMITED, tmp_path])
    found = {name: tuple(rest) for name, *rest in map(json.loads, process.communicate(60)[0].splitlines())}
    default = str(tmp_path / "default")
    assert found == {
        "safetensors": (errno.EFBIG, default),
        "numpy": (errno.ENOSPC, default),
        "pyarrow": (errno.EFBIG, default),
        "text": (errno.EFBIG, default),
        "atomic": (errno.EFBIG, str(tmp_path / "atomic")),
        "metrics": (errno.EFBIG, str(tmp_path / "metrics")),
    }


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    path = tmp_path / "config.py"
    write_atomically(path, "old")

    def over_quota(_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))  # as fsync() says it: without a path

    monkeypatch.setattr(os, "fsync", over_quota)
    assert exit_code(lambda: write_atomically(path, "new")) == 2
    assert capsys.readouterr().err == f"error: {os.strerror(errno.EDQUOT)}: {path} ({HINTS[errno.EDQUOT]})\n"
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


UNDER_LIMIT = """
import resource
from nanochat import checkpoint_files
from nanochat import checkpoint_manager as cm
from nanochat.runtime import run_script
from scripts.base_train import main
real = cm.save_checkpoint

def save(folder, step, *rest, **options):  # from the second save on, as a `ulimit -f` that the optimizer outgrows
    if step == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return real(folder, step, *rest, **options)

cm.save_checkpoint = save
run_script(main)
"""


def test_a_run_over_its_file_size_limit_ends_in_one_line_and_resumes(train, base, corpus, tmp_path):
    """The kernel refuses the second save's weights: one line, code 2, step 2 stays, --resume gives the same weights.

    Red when save_checkpoint() does not translate what safetensors raises.
    """
    train("whole", save_every=2, num_iterations=6, overwrite=True)
    script = tmp_path / "limited.py"
    script.write_text(textwrap.dedent(UNDER_LIMIT))
    words = flags({"data": corpus, **TINY, "num_iterations": 6, "save_every": 2, "model_tag": "limited"})
    process = start(base, *words, script=script)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2, output
    assert "Traceback" not in output
    last = output.splitlines()[-1]
    assert last.startswith(f"error: {os.strerror(errno.EFBIG)}: {tag_dir('limited')}/"), output
    assert "ulimit -f" in last
    assert cm.list_steps(tag_dir("limited")) == [2]
    assert [path.name for path in tag_dir("limited").glob(".step*")] == []
    main(["--model_tag=limited", "--resume"])
    assert state_hashes("limited", 6) == state_hashes("whole", 6)
    assert metrics("limited", "event")[-1] == "done"


def test_deleting_an_old_step_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    """Red when prune() moves and deletes without naming_storage_errors()."""
    for step in (1, 2):
        cm.save_checkpoint(tmp_path, step, {"a": torch.zeros(3)}, None, {})

    def refused(*_, **__):
        raise OSError(errno.EIO, "as the library says it")

    monkeypatch.setattr(checkpoint_files.shutil, "rmtree", refused)
    assert exit_code(lambda: checkpoint_files.prune(tmp_path, 1)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {os.strerror(errno.EIO)}: {tmp_path / 'step_000001'} (")
    assert cm.newest_step(tmp_path) == 2
