"""The table of exports under several releases, without making an environment."""

import subprocess

import pytest

from nanochat.system.environment import UserError
from scripts.stress import exports
from scripts.stress.exports import Outcome, last_line, parse, read_report, table
from tests.tiny_run import exit_code

REPORT = """<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest" tests="5">
<testcase classname="tests.test_a" name="test_one" time="0.1"/>
<testcase classname="tests.test_a" name="test_two[x]" time="0.1"/>
<testcase classname="tests.test_a" name="test_bad" time="0.1"><failure message="assert">no</failure></testcase>
<testcase classname="tests.test_a" name="test_odd" time="0.1"><error message="setup">no</error></testcase>
<testcase classname="tests.test_a" name="test_two[x]" time="0.1"><error message="teardown">no</error></testcase>
<testcase classname="tests.test_a" name="test_off" time="0.1"><skipped message="because">no</skipped></testcase>
</testsuite></testsuites>"""


def test_a_report_is_counted():
    """What fails, cannot be set up or torn down, or is skipped has not passed. Red when one of the three kinds is not
    looked for, or a test that fails only at its teardown counts as passed."""
    outcome = read_report("5.24.0", REPORT)
    assert outcome.passed == 1
    assert outcome.failed == ("test_bad", "test_odd", "test_two[x]", "test_off")
    assert outcome.verdict == "WRONG: test_bad, test_odd and 2 more"
    assert not outcome.right


def test_the_table():
    """Red when a release without a test counts as right."""
    outcomes = [
        Outcome("5.0.0", 60),
        Outcome("5.24.0", 58, ("test_bad",)),
        Outcome("9.9", reason="no such"),
        Outcome("6"),
    ]
    assert table(outcomes) == [
        "transformers  passed  failed  verdict",
        "5.0.0             60       0  right",
        "5.24.0            58       1  WRONG: test_bad",
        "9.9                0       0  not run: no such",
        "6                  0       0  not run: no test ran",
    ]
    assert [outcome.right for outcome in outcomes] == [True, False, False, False]


def test_one_wrong_release_ends_with_1(monkeypatch, tmp_path, capsys):
    """Red when main() looks at the last release only."""
    outcomes = {"5.0.0": Outcome("5.0.0", 2, ("test_x",)), "newest": Outcome("5.24.0", 3)}
    monkeypatch.setattr(exports, "check_release", lambda release, folder, tests: outcomes[release])
    assert exit_code(lambda: exports.main(["5.0.0", "newest", f"--folder={tmp_path / 'kept'}"])) == 1
    assert "WRONG: test_x" in capsys.readouterr().out
    assert (tmp_path / "kept").is_dir()
    assert exports.main(["newest", "newest"]) == [outcomes["newest"]]


def test_a_release_that_cannot_be_installed_is_said(monkeypatch, tmp_path):
    """Red when pip's exit code is not looked at: the tests would run with the release that is borrowed."""
    asked = []

    def run(command):
        asked.append(command)
        (tmp_path / "5.99.0" / "lib" / "python3.11" / "site-packages").mkdir(parents=True, exist_ok=True)
        said = "ERROR: No matching distribution found for transformers==5.99.0\n\n[notice] a new release of pip\n"
        return subprocess.CompletedProcess(command, int("pip" in command), "", said)

    monkeypatch.setattr(exports, "run", run)
    outcome = exports.check_release("5.99.0", tmp_path, ("tests/test_x.py",))
    assert outcome.verdict == "not run: ERROR: No matching distribution found for transformers==5.99.0"
    assert len(asked) == 2
    assert asked[1][-1] == "transformers==5.99.0"
    borrowed = (
        (tmp_path / "5.99.0" / "lib" / "python3.11" / "site-packages" / "zz_borrowed.pth").read_text().split("\n")
    )
    assert borrowed[0] == str(exports.ROOT)
    assert any(line.endswith("site-packages") for line in borrowed)


def test_arguments():
    """Red when a word that is no release reaches pip."""
    assert parse([]).releases == ["5.0.0", "5.12.1", "5.23.0", "5.24.0", "newest"]
    assert parse(["5.1.0rc1", "newest"]).releases == ["5.1.0rc1", "newest"]
    for word in ("latest", "5", ">=5.0", "../x"):
        with pytest.raises(UserError, match=r"as in 5\.24\.0, or newest"):
            parse([word])
    assert last_line("\n") == ""
