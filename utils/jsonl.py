"""Rows of JSON: one object a line, written whole and flushed; readers name the file and line of a bad row.

Also the two things every other output needs: a file that appears whole or not at all, and JSON arrays of objects.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from utils.errors import UserError


def read(path: str | Path, fields: dict[str, type | tuple] | None = None) -> Iterator[dict]:
    """Yield the rows of a JSON Lines file or of a JSON array of objects.

    `fields` maps the names that every row must have to their types. Raises UserError naming file and line (or, in an
    array, the element) of the first row that is not an object or lacks a field. A torn last line, without its newline
    and not readable, is what a killed writer leaves: it is passed over.
    """
    for _, row in read_with_places(path, fields):
        yield row


def read_with_places(path: str | Path, fields: dict[str, type | tuple] | None = None) -> Iterator[tuple[str, dict]]:
    """Yield each row of `read` after its place, "FILE: line 3" (in an array, "FILE: element 2")."""
    with _open(path) as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        file.seek(0)
        if first == "[":
            rows = ((f"{path}: element {i}", row) for i, row in enumerate(read_array(path)))
        else:
            rows = _lines(path, file)
        for where, row in rows:
            yield where, check(row, fields or {}, where)


def check(row, fields: dict[str, type | tuple], where: str) -> dict:
    """Return the row if it is an object that has every field with its type, or raise UserError saying `where`."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {type(row).__name__}")
    for name, kind in fields.items():
        if name not in row:
            raise UserError(f"{where}: no field {name!r} (it has {', '.join(map(repr, row)) or 'none'})")
        # In JSON's types true is no number.
        if not isinstance(row[name], kind) or (isinstance(row[name], bool) and kind is not bool):
            expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise UserError(f"{where}: field {name!r} should be {expected}, found {row[name]!r}")
    return row


def read_array(path: str | Path) -> list:
    """Return the JSON array in a file; UserError if it is no JSON or no array."""
    with _open(path) as file:
        try:
            value = json.load(file)
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a JSON array, found {type(value).__name__}")
    return value


def _open(path):
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    return open(path, encoding="utf-8-sig", errors="replace")


def _lines(path, file) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if not line.endswith("\n"):
                return
            raise UserError(f"{path}: line {number}: not valid JSON: {error}") from None
        yield f"{path}: line {number}", row


def dumps(row: dict) -> str:
    """Return the row as one line, with its newline."""
    return json.dumps(row, ensure_ascii=False) + "\n"


class Appender:
    """Append rows to a JSON Lines file, each flushed as a whole line; a torn last line is cut on opening.

    Whoever goes on with a file opens it so before reading it: `read` takes a last line that lacks only its newline.
    """

    def __init__(self, path: str | Path):
        self.file = open(path, "ab+")
        size = self.file.seek(0, os.SEEK_END)
        keep = size
        while keep:
            start = max(0, keep - 65536)
            self.file.seek(start)
            newline = self.file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < size:
            self.file.truncate(keep)
        self.file.seek(0, os.SEEK_END)

    def write(self, row: dict):
        self.file.write(dumps(row).encode("utf-8", "replace"))
        self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def write_whole(path: str | Path, content: str | bytes | Iterable[bytes]):
    """Write a file (all at once, or in blocks) so that it appears whole or not at all, also when several processes write it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        content = content.encode("utf-8", "replace") if isinstance(content, str) else content
        with open(temporary, "wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names none
        raise
    finally:
        temporary.unlink(missing_ok=True)
