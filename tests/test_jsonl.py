"""Rows of JSON, records and the errors of users."""

import json
import subprocess
import sys

import pytest

from utils import jsonl, runs
from utils.errors import UserError


def test_reads_lines_and_arrays_alike(tmp_path):
    rows = [{"a": 1, "b": "é🦉"}, {"a": 2, "b": ""}]
    (tmp_path / "lines").write_text("".join(map(jsonl.dumps, rows)) + "\n")
    (tmp_path / "array").write_text("\n " + json.dumps(rows))
    for name in ("lines", "array"):
        assert list(jsonl.read(tmp_path / name, {"a": int, "b": str})) == rows


def test_bad_rows_are_named(tmp_path):
    path = tmp_path / "rows"
    for content, message in (
        ('{"a": 1}\n{"a": \n{"a": 2}\n', "rows: line 2: not valid JSON"),
        ('{"a": 1}\n[1]\n', "rows: line 2: expected an object, found list"),
        ('{"a": 1}\n\n{"b": 1}\n', "rows: line 3: no field 'a' .it has 'b'."),
        ('{"a": "1"}\n', "rows: line 1: field 'a' should be int, found '1'"),
        ('{"a": true}\n', "rows: line 1: field 'a' should be int, found True"),
        ('[{"a": 1}, 2]', "rows: element 1: expected an object, found int"),
        ("[", "rows: not valid JSON"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            list(jsonl.read(path, {"a": int}))
    with pytest.raises(UserError, match="nowhere: no such file"):
        list(jsonl.read(tmp_path / "nowhere"))


def test_torn_last_line_is_passed_over_and_cut(tmp_path):
    path = tmp_path / "rows"
    for torn in ('{"a": 3', '{"a": "' + "x" * 200_000):
        path.write_text('{"a": 1}\n{"a": 2}\n' + torn)
        assert [row["a"] for row in jsonl.read(path)] == [1, 2]
        with jsonl.Appender(path) as file:
            file.write({"a": 4})
        assert path.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 4}\n'
    path.write_text('{"a": 3')
    with jsonl.Appender(path) as file:
        file.write({"a": 5})
    assert path.read_text() == '{"a": 5}\n'


def test_write_whole_replaces_or_leaves(tmp_path):
    path = tmp_path / "file"
    jsonl.write_whole(path, "old")

    def broken():
        yield b"new"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        jsonl.write_whole(path, broken())
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    jsonl.write_whole(path, [b"a", b"b"])
    assert path.read_text() == "ab"


def test_record_goes_on_with_the_same_settings_only(tmp_path):
    path = tmp_path / "run.json"
    record = runs.begin(path, {"seed": 1, "name": "a"})
    runs.finish(path, record, count=3)
    assert runs.begin(path, {"seed": 1, "name": "a"})["count"] == 3
    with pytest.raises(UserError, match=r"seed was 1, now 2; extra was None, now 5"):
        runs.begin(path, {"seed": 2, "name": "a", "extra": 5})
    assert "count" not in runs.begin(path, {"seed": 2}, overwrite=True)
    path.write_text("{")
    with pytest.raises(UserError, match="not a run record"):
        runs.begin(path, {"seed": 2})


@pytest.mark.parametrize(
    ("statement", "code", "message"),
    [
        ("raise UserError('a.json: line 3: bad')", 2, "error: a.json: line 3: bad"),
        ("open('/nowhere/file')", 2, "error: /nowhere/file: No such file or directory"),
        ("raise OSError(28, 'No space left on device', 'out.jsonl')", 2, "error: out.jsonl: No space left on device"),
        ("raise OSError(28, 'No space left on device')", 2, "error: output: No space left on device"),
        ("raise ValueError('a defect of ours')", 1, "Traceback"),
        ("pass", 0, ""),
    ],
)
def test_users_mistakes_are_one_line(statement, code, message):
    script = f"from utils.errors import UserError, one_line_errors\nwith one_line_errors():\n    {statement}\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr.startswith(message)
    assert code == 1 or done.stderr.count("\n") == (1 if message else 0)


def test_writing_where_one_may_not_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    script = f"from utils import jsonl\nfrom utils.errors import one_line_errors\nwith one_line_errors():\n    jsonl.write_whole({str(tmp_path / 'file' / 'out')!r}, 'x')\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and "Not a directory" in done.stderr and "Traceback" not in done.stderr
