"""README, CLAUDE.md and dev/*.md against the tree: commands, flags, paths, links, the promises, the log's index."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from nanochat.config.adapter_settings import AdapterSettings
from nanochat.config.config_file import parse_value
from nanochat.config.declaration import fields_of
from nanochat.config.settings import Settings
from nanochat.system.environment import UserError
from tests.tiny_run import CHECKOUT

MOST_README_LINES = 190
PAGES = ("RELIABILITY", "PERFORMANCE", "AUDIO", "ADAPTERS", "CHECKPOINTS")
DOCUMENTS = ("README.md", "CLAUDE.md", *(f"dev/{page}.md" for page in PAGES))
OF_TORCHRUN = {"standalone", "nproc_per_node", "max_restarts", "shutdown_timeout"}

PROMISES = (
    "bit_exact_resume",
    "second_resume",
    "reshard_1_2_3_1",
    "kill9",
    "fsync_order",
    "enospc",
    "bitflip",
    "truncation",
    "prune_safety",
    "sigterm_save",
    "nan_guard",
    "oom_halving",
    "rank_death",
    "tracker_failure",
    "double_start",
    "malicious_pickle",
    "malicious_config",
    "offline_only",
)


def read(name: str) -> str:
    return (CHECKOUT / name).read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """The words of each command line in blocks and `code` that starts a script of ours, without comments."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", text)
    start = re.compile(r"(\$ )?((\.venv/bin/)?(python|torchrun) .*-m scripts\.[a-z]|bash \S+\.sh)")
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if start.match(line)]


def script_of(words: list[str]) -> Path:
    """The file, or the folder of a package, that a command runs."""
    if words[0] == "bash":
        return CHECKOUT / words[1]
    found = CHECKOUT / words[words.index("-m") + 1].replace(".", "/")
    return found if found.is_dir() else found.with_suffix(".py")


def source_of(script: Path) -> str:
    files = sorted(script.glob("*.py")) if script.is_dir() else [script]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def legal_somewhere(name: str, text: str) -> bool:
    """Whether --name=text is legal in training or in adapter training."""
    for kind in (Settings, AdapterSettings):
        if name in fields_of(kind):
            try:
                parse_value(name, text, kind)
                return True
            except UserError:
                pass
    return False


def slugs(text: str) -> set[str]:
    """The anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_name_scripts_and_flags_that_exist(document):
    """Red when a script is renamed, or a flag that a page shows is no longer one of its script or a setting."""
    settings = fields_of(Settings).keys() | fields_of(AdapterSettings).keys() | {"resume", "set"}
    for words in commands(read(document)):
        script = script_of(words)
        assert script.exists(), words
        for word in words:
            name = word.removeprefix("--").partition("=")[0].replace("-", "_")
            if word.startswith("--") and name not in settings | OF_TORCHRUN:
                assert f"--{name.replace('_', '-')}" in source_of(script).replace("_", "-"), words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_in_the_text_are_legal(document):
    """`--name=value` is a setting with a legal value, `--name` a flag of some script."""
    flags = "\n".join(source_of(file) for file in sorted((CHECKOUT / "scripts").rglob("*.py"))).replace("_", "-")
    for name, value in re.findall(r"`--([\w-]+)(=[^` ]*)?`", read(document)):
        setting = name.replace("-", "_")
        known = fields_of(Settings).keys() | fields_of(AdapterSettings).keys()
        if value and setting in known:
            assert value == "=" or legal_somewhere(setting, value[1:]), (name, value)
        else:
            assert setting in known | OF_TORCHRUN | {"resume", "help"} or f"--{name.replace('_', '-')}" in flags, name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document):
    """Red when a module that a page names moves."""
    paths = re.findall(r"`((?:nanochat|scripts|tests|runs|dev)/[\w./*-]*)(?:::\w+)?`", read(document))
    assert [path for path in paths if not any(CHECKOUT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("document", [*DOCUMENTS, "dev/LOG.md"])
def test_links_lead_to_files_and_headings(document):
    text = read(document)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("https:"):
            continue
        file = (CHECKOUT / document).parent / path if path else CHECKOUT / document
        assert file.exists(), target
        assert not anchor or anchor in slugs(file.read_text(encoding="utf-8")), target


def test_the_readme_is_short_and_links_every_page():
    text = read("README.md")
    assert len(text.splitlines()) <= MOST_README_LINES
    assert "\nbash tests/run.sh\n" in text
    assert [page for page in PAGES if f"(dev/{page}.md" not in text] == []


@pytest.mark.parametrize("page", PAGES)
def test_pages_begin_with_what_they_hold(page):
    heading, blank, first, *_ = read(f"dev/{page}.md").splitlines()
    assert heading.startswith("# ")
    assert blank == ""
    assert first[0].isalpha()


def test_every_promise_has_its_test():
    """Red when a test of the table is renamed or deleted, or a promise loses its line."""
    lines = read("dev/RELIABILITY.md").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    table = {row[0]: row[2] for row in rows if len(row) == 3 and "::test_" in row[2]}
    assert tuple(table) == PROMISES
    for promise, where in table.items():
        path, _, name = where.split("`")[-2].partition("::")
        assert name == f"test_{promise}"
        tree = ast.parse(read(path))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_index_of_the_log_has_a_line_for_each_entry():
    """In the order of the entries, with a verdict. Red when an entry is added without its line."""
    text = read("dev/LOG.md")
    entries = re.findall(r"^## (20.*)$", text, re.MULTILINE)
    index = re.findall(r"^\| \[(\S+)\]\(#(\S+)\) \| ([^|]+\?) \| (\w+)[:;] [^|]+ \|$", text, re.MULTILINE)
    assert [(entry[:10], slugs(f"# {entry}")) for entry in entries] == [(day, {slug}) for day, slug, _, _ in index]
    assert {verdict for *_, verdict in index} <= {"positive", "negative", "mixed", "figures"}
