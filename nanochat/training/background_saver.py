"""Saving while the training continues: the tensors are copied, a thread writes the copy to disk.

At most one save is in flight; its error is raised in the loop, by the next call.
"""

import logging
import threading
from collections.abc import Iterable
from pathlib import Path

import torch

from nanochat import checkpoint_files
from nanochat import checkpoint_manager as checkpoints
from nanochat.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Named = Iterable[tuple[str, torch.Tensor]]


class BackgroundSaver:
    """Saves steps into one tag's folder from rank 0, then prunes; all ranks call save(), whose items are collectives.

    Use: save(...) when a checkpoint is due, poll() after every step, wait() at the end; or copy(...), and write_copy()
    if it turns out to be needed. As a context manager it lets a save in flight end when the loop is left by an
    exception, and does not hide that exception.
    """

    def __init__(
        self, folder: Path, keep_last: int | None, tokenizer: Tokenizer, rank: int = 0, codec: Path | None = None
    ):
        self.folder, self.keep_last, self.tokenizer, self.rank = folder, keep_last, tokenizer, rank
        self.codec = codec  # a folder, copied into each checkpoint: it turns codes into sound
        self._copies: tuple[dict[str, torch.Tensor], ...] = ({}, {})  # reused by each save: no new memory
        self._thread: threading.Thread | None = None
        self._copied: tuple[int, dict] | None = None  # step and metadata of the copies, before they are written
        self._result: Path | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "BackgroundSaver":
        return self

    def __exit__(self, *_) -> None:
        if self._thread is not None:
            self._thread.join()
            if self._error is not None:
                logger.info(f"the save in flight failed, too: {self._error}")

    def save(self, step: int, model_items: Named, optimizer_items: Named, metadata: dict) -> Path | None:
        """Copy, and start to write; first waits for the previous save, whose result is returned as by wait()."""
        before = self.wait()
        self.copy(step, model_items, optimizer_items, metadata)
        self.write_copy()
        return before

    def copy(self, step: int, model_items: Named, optimizer_items: Named, metadata: dict) -> None:
        """Copy a step that may have to be written soon; all ranks call it, while no save is in flight."""
        assert self._thread is None, "the copies are being written"
        for items, copies in zip((model_items, optimizer_items), self._copies, strict=True):
            _copy(items, copies, keep=self.rank == 0)
        self._copied = (step, metadata)

    def write_copy(self) -> None:
        """Start to write what copy() took; without collectives, so that rank 0 can do it when the others are gone."""
        if self.rank == 0 and self._copied is not None:
            self._thread = threading.Thread(target=self._write, args=self._copied, name="save")
            self._thread.start()
        self._copied = None

    @property
    def copied_step(self) -> int | None:
        """The step that write_copy() would write."""
        return self._copied[0] if self._copied is not None else None

    def is_writing(self, timeout: float = 0.0) -> bool:
        """Whether a save is still in flight after at most `timeout` seconds; always False but on rank 0."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is not None and self._thread.is_alive()

    def poll(self) -> Path | None:
        """The folder of a save that has ended since the last call, None without; raises that save's error."""
        return None if self._thread is None or self._thread.is_alive() else self.wait()

    def wait(self) -> Path | None:
        """poll(), but wait for a save that is in flight."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        result, error, self._result, self._error = self._result, self._error, None, None
        if error is not None:
            raise error
        return result

    def _write(self, step: int, metadata: dict) -> None:
        try:
            model_state, optimizer_state = self._copies
            self._result = checkpoints.save_checkpoint(
                self.folder, step, model_state, optimizer_state, metadata, tokenizer=self.tokenizer, codec=self.codec
            )
            checkpoint_files.prune(self.folder, self.keep_last)
        except BaseException as error:  # wait() raises it
            self._error = error


def _copy(items: Named, copies: dict[str, torch.Tensor], keep: bool) -> None:
    """Copy each tensor to the CPU, into the memory of the last save; without keep only iterate over the items."""
    fresh = dict(copies)
    copies.clear()
    for name, tensor in items:
        if not keep:
            continue
        copy = fresh.get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = copy.copy_(tensor)
