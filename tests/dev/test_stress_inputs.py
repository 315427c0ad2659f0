"""A sample of the odd inputs of scripts.stress.inputs, and that its verdicts can be bad ones."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scripts.stress.inputs.__main__ import all_cases, check
from scripts.stress.inputs.cases import Case, Refused, Result, Used, failure_of

CASES = all_cases()
QUICK, SLOW = ([], [])  # the slow ones train first, or take a new interpreter
for kind, case in CASES:
    (SLOW if case.fresh or len(case.steps) > 1 else QUICK).append(pytest.param(case, id=f"{kind}: {case.name}"))


@pytest.mark.parametrize("case", QUICK[4::10] + SLOW[3::20])
def test_odd_input(case, tmp_path):
    """Used with exact counts, or refused in one line. Red when, say, decode_text() takes everything for UTF-8."""
    reason, _ = check(case, tmp_path / "case")
    assert reason is None, reason


def test_there_are_at_least_150_cases():
    assert len(CASES) >= 150


def _result(base, code=0, output="", errors="") -> Result:
    return Result(code, output, errors, base)


def _case(expect) -> Case:
    return Case("made up", lambda folder: None, [("scripts.data",)], expect)


def test_a_loss_that_nobody_counted_is_a_failure(tmp_path):
    """Red when Used compares no documents, or takes the manifest's word for what was skipped."""
    folder = tmp_path / "data" / "made"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"name": ["a", "b"], "text": ["one", "two"]}), folder / "shard_00000.parquet")
    pq.write_table(pa.table({"name": ["c"], "text": ["six"]}), folder / "val_00000.parquet")
    files = [
        {"name": "shard_00000.parquet", "split": "train", "text_bytes": 7},
        {"name": "val_00000.parquet", "split": "val", "text_bytes": 3},
    ]
    (folder / "manifest.json").write_text(json.dumps({"files": files, "left_out": {"undecodable": 1}}))
    result = _result(tmp_path, output="skipped: bad.txt")
    right = Used(texts=["one", "two", "six"], skipped=["bad.txt"])
    assert failure_of(_case(right), result) is None
    assert "documents" in failure_of(_case(Used(texts=["one", "two"], skipped=["bad.txt"])), result)
    assert "skipped" in failure_of(_case(Used(texts=["one", "two", "six"])), result)
    assert "does not say" in failure_of(_case(Used(texts=["one", "two", "six"], skipped=["other.txt"])), result)
    assert "characters" in failure_of(_case(Used(joined="onetwo", count=1)), result)
    assert "held out" in failure_of(_case(right), _with_sizes(folder, files, val=70, result=result))


def _with_sizes(folder, files, val: int, result: Result) -> Result:
    sizes = [files[0], files[1] | {"text_bytes": val}]
    (folder / "manifest.json").write_text(json.dumps({"files": sizes, "left_out": {"undecodable": 1}}))
    return result


def test_a_traceback_is_a_failure_whatever_the_exit_code(tmp_path):
    """Red when failure_of() trusts the exit code alone."""
    trace = "Traceback (most recent call last):\n  boom\nerror: input.txt\n"
    assert failure_of(_case(Refused(["input"])), _result(tmp_path, 2, errors=trace)) == "a traceback"


def test_a_refusal_is_one_line_with_code_2(tmp_path):
    """Red when Refused looks at one of code, number of lines and words only."""
    refused = _case(Refused(["UTF-8"]))
    line = "error: input.txt is not UTF-8\n"
    assert failure_of(refused, _result(tmp_path, 2, errors=line)) is None
    assert "exit code" in failure_of(refused, _result(tmp_path, 1, errors=line))
    assert "2 lines" in failure_of(refused, _result(tmp_path, 2, errors=line * 2))
    assert "lacks" in failure_of(refused, _result(tmp_path, 2, errors="error: no\n"))
