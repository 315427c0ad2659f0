"""The mutation check on a toy module: what is changed, what never is, and that survivors are told from the killed."""

import ast
import json
import sys
from pathlib import Path

import pytest

from nanochat.system.environment import UserError
from scripts.stress import mutations
from scripts.stress.mutants import draw, mutants
from scripts.stress.mutations import ROOT, TESTS, equivalents, main
from tests.forked import Forked

TOY = b'''"""A toy: 1 + 1."""

import os


class Box:
    def __repr__(self) -> str:
        return str(1 + 1)


def clip(value: int, limit: int = 3) -> int:
    """At most 3."""
    if value < 0:
        raise ValueError(f"negative: {value + 1}")
    print("clipping", value + 1)
    unseen = [7]
    unseen[0] += 1
    return min(value, limit)


if __name__ == "__main__":
    clip(1)
'''
SMALL = b"""
def clip(value):
    unseen = [7]
    return min(value, 3)
"""
SMALL_TEST = """
from toy import clip

def test_clip():
    assert [clip(value) for value in (2, 3, 4)] == [2, 3, 3]
"""


def changes(source: bytes) -> set[tuple[str, str, str]]:
    return {(mutant.kind, mutant.old, mutant.new) for mutant in mutants("toy.py", source)}


def test_every_kind_of_change_is_made_and_each_is_valid_python():
    """Red when an operator's row is dropped from a table of scripts/stress/mutants.py."""
    source = b"""def f(a, b, *c):
    a.x = g(a, b)
    a.y += 1
    while a.on:
        h()
    if not a < b <= -2 and a == b or a is b or a in c:
        return a + b * 2.5 // a % b ** 2 - a / b
    return True if a.z else None
"""
    assert changes(source) >= {
        ("statement removed", "a.x = g(a, b)", "pass"),
        ("statement removed", "h()", "pass"),
        ("statement removed", "a.y += 1", "pass"),
        ("arithmetic", "a.y += 1", "a.y -= 1"),
        ("arguments swapped", "g(a, b)", "g(b, a)"),
        ("condition negated", "a.on", "(not (a.on))"),
        ("not", "not a < b <= -2", "(a < b <= -2)"),
        ("boundary", "a < b <= -2", "(a <= b <= -2)"),
        ("boundary", "a < b <= -2", "(a < b < -2)"),
        ("comparison negated", "a == b", "(a != b)"),
        ("comparison negated", "a is b", "(a is not b)"),
        ("comparison negated", "a in c", "(a not in c)"),
        ("sign", "-2", "(2)"),
        ("constant", "2", "3"),
        ("constant", "2.5", "5.0"),
        ("constant", "True", "False"),
        ("arithmetic", "b ** 2", "(b * 2)"),
        ("arithmetic", "a / b", "(a * b)"),
        ("return None", "return True if a.z else None", "return None"),
        ("condition negated", "a.z", "(not (a.z))"),
    }
    kinds = {kind for kind, _, _ in changes(source)}
    assert "and / or" in kinds
    for mutant in mutants("toy.py", source):
        assert ast.dump(ast.parse(mutant.apply(source))) != ast.dump(ast.parse(source)), mutant


def test_what_readers_alone_see_is_never_changed():
    """Strings, annotations, __repr__, messages, printed lines, the guard. Red without visit_Raise or visit_Expr."""
    assert changes(TOY) == {
        ("constant", "3", "4"),
        ("comparison negated", "value < 0", "(value >= 0)"),
        ("boundary", "value < 0", "(value <= 0)"),
        ("constant", "0", "1"),
        ("statement removed", 'raise ValueError(f"negative: {value + 1}")', "pass"),
        ("constant", "7", "8"),
        ("statement removed", "unseen[0] += 1", "pass"),
        ("arithmetic", "unseen[0] += 1", "unseen[0] -= 1"),
        ("constant", "1", "2"),
        ("return None", "return min(value, limit)", "return None"),
    }


def test_no_mutant_of_the_core_touches_a_string_and_the_draw_is_the_same_in_any_order():
    """Strings of every mutated file are those of the file. Red when visit_Constant changes strings, or draw() shuffles
    with a generator of its own."""
    files = {
        file: (ROOT / file).read_bytes() for file in ("nanochat/training/guard.py", "nanochat/training/schedule.py")
    }

    def strings(source: bytes) -> list[str]:
        constants = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
        return [value for value in constants if isinstance(value, str)]

    drawn = draw(files, 60, seed=0)
    assert len({mutant.id for mutant in drawn}) == 60
    assert draw(dict(reversed(files.items())), 40, seed=0) == drawn[:40] != draw(files, 40, seed=1)
    for mutant in drawn:
        before, after = strings(files[mutant.file]), strings(mutant.apply(files[mutant.file]))
        assert set(after) <= set(before)
        assert len(after) == len(before) or mutant.kind in ("statement removed", "return None")
    moved = {file: b"# a comment\n" + source for file, source in files.items()}
    assert [mutant.id for mutant in draw(moved, 60, seed=0)] == [mutant.id for mutant in drawn]


@pytest.fixture
def toy(tmp_path) -> Path:
    root = tmp_path / "root"
    (root / "tests").mkdir(parents=True)
    (root / "toy.py").write_bytes(SMALL)
    (root / "tests" / "test_toy.py").write_text(SMALL_TEST)
    return root


def check(toy: Path, *words: str, before: str = "") -> tuple[int, str, list[dict]]:
    """The script over the toy, in a process of its own: exit code, what it printed, and its results."""
    results = toy.parent / "results.jsonl"
    words = (f"--root={toy}", "--workers=1", "--module=toy.py:tests/test_toy.py", f"--results={results}", *words)
    program = f"from scripts.stress import mutations as c\n{before}\nc.run_script(lambda: c.main({list(words)}))"
    process = Forked([sys.executable, "-c", program], cwd=ROOT)
    code = process.wait(timeout=120)
    out = process.output()
    assert results.exists(), out
    return code, out, [json.loads(line) for line in results.read_text().splitlines()]


def test_a_mutant_that_a_test_sees_is_killed_and_one_that_none_sees_survives(toy):
    """Also: a second run repeats nothing, equivalent ones are listed apart, a changed test runs all again.

    Red when Tree.write() leaves the module as it was (all survive), or when a survivor counts as killed.
    """
    apart = f"--equivalent={toy.parent / 'equivalent.jsonl'}"
    code, out, results = check(toy, apart)
    assert code == 1, out
    assert {(line["new"], line["outcome"], line["by"]) for line in results} == {
        ("8", "survived", None),
        ("4", "killed", "tests/test_toy.py::test_clip"),
        ("return None", "killed", "tests/test_toy.py::test_clip"),
    }
    assert "| toy.py | 3 | 2 | 0 | 1 | 0 | 66.7% |" in out
    assert "toy.py:3 in clip, constant\n- unseen = [7]\n+ unseen = [8]" in out
    assert (toy / "toy.py").read_bytes() == SMALL

    survivor = next(line["id"] for line in results if line["outcome"] == "survived")
    (toy.parent / "equivalent.jsonl").write_text(json.dumps(dict(id=survivor, reason="nothing reads it")) + "\n")
    code, out, again = check(toy, apart)
    assert code == 0, out
    assert again == results
    assert "3 mutants, 3 there already" in out
    assert "| toy.py | 3 | 2 | 0 | 0 | 1 | 100.0% |" in out
    assert f"equivalent: {survivor} toy.py:3 in clip, constant (nothing reads it)" in out

    (toy / "tests" / "test_toy.py").write_text("def test_nothing():\n    assert False\n")
    code, out, _ = check(toy, apart)
    assert code == 2
    assert "3 mutants, 0 there already" in out
    assert "toy.py unchanged: tests/test_toy.py::test_nothing fails" in out


def test_a_mutant_that_never_ends_is_a_timeout(toy):
    """Red when the fork is waited for without a limit."""
    (toy / "toy.py").write_text("def count(n):\n    while n > 0:\n        n -= 1\n")
    (toy / "tests" / "test_toy.py").write_text("from toy import count\n\ndef test_it():\n    count(2)\n")
    _, out, results = check(toy, "--number=1", "--seed=0", before="c.PATIENCE_S = 1.0")
    assert [(line["new"], line["outcome"]) for line in results] == [("n += 1", "timeout")], out


def test_the_tests_of_each_module_exist_and_every_equivalent_mutant_has_a_reason(tmp_path):
    """Red when a test file of TESTS is renamed, or a reason is left empty."""
    for file, names in TESTS.items():
        assert (ROOT / file).is_file()
        assert all((ROOT / "tests" / f"{name}.py").is_file() for name in names)
    equivalents(ROOT / "dev" / "equivalent_mutants.jsonl")
    (tmp_path / "empty.jsonl").write_text('{"id": "abc", "reason": " "}\n')
    with pytest.raises(UserError, match="needs an id and a reason"):
        equivalents(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match=r"there is no nothing\.py"):
        main([f"--root={tmp_path}", "--module=nothing.py:tests/test_x.py"])
    assert mutations.GOAL == 0.85
