"""The suite's own surroundings, the set-up shared by the commands, the recipes, and the closing summary."""

import os
import socket
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]


def test_no_test_reaches_the_network():
    """Removing the `connect` line of conftest's no_network turns this red (with a network) or slow (without)."""
    with socket.socket() as sock, pytest.raises(OSError, match="tests are offline"):
        sock.connect(("192.0.2.1", 80))
    with pytest.raises(OSError, match="tests are offline"):
        urllib.request.urlopen("http://example.invalid/", timeout=1)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())  # loopback works: process groups need it


@given(st.integers())
def test_hypothesis_repeats_itself(number):
    """Random cases are the same in every run: dropping derandomize=True from the profile turns this red."""
    from hypothesis import settings

    assert settings().derandomize and settings().deadline is None


def test_base_dir_is_a_scratch_folder():
    """Dropping NANOCHAT_BASE_DIR from conftest turns this red: tests would write into the user's own cache."""
    from nanochat.runtime import base_dir

    assert "nanochat-tests-" in str(base_dir()) and base_dir() != Path.home() / ".cache" / "nanochat"


def test_tiny_corpus(tiny_corpus):
    files = sorted(tiny_corpus.rglob("*.py"))
    assert len(files) == 60 and sum(f.stat().st_size for f in files) > 200_000
    for file in files:
        compile(file.read_text(), str(file), "exec")
