"""Tables of image addresses and captions as a stream of rows: Parquet, csv, tsv, jsonl, .gz of the text ones, or on the hub.

A row keeps its number (the first is 0) whatever is left out. It is a dict, or a string that says what is wrong with it.
"""

import csv
import gzip
import html
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UserError

# How tables spell their columns, in lower case and without signs: AESTHETIC_SCORE is aestheticscore.
SPELLINGS = {
    "url_column": ("url", "imageurl", "imgurl", "photoimageurl", "imagelink", "link", "uri"),
    "caption_column": ("caption", "text", "alttext", "alt", "description", "title", "prompt"),
    "score_column": ("aestheticscore", "aesthetic", "aesthetics", "aestheticsscore", "aestheticscorev2"),
    "unsafe_column": ("punsafe", "unsafe"),
    "watermark_column": ("pwatermark", "watermark"),
    "width_column": ("width", "imagewidth", "photowidth", "originalwidth"),
    "height_column": ("height", "imageheight", "photoheight", "originalheight"),
}


class Limit(NamedTuple):
    """Rows whose `column` is a number outside [lowest, highest] are left out and counted under `reason`."""

    column: str
    lowest: float
    highest: float
    reason: str

    def excludes(self, value):
        """Whether a number (or each of an array) is outside; not a number (NaN) never is."""
        return (value < self.lowest) | (value > self.highest)


class Table(NamedTuple):
    source: str
    columns: list[str]
    rows: Callable[[Iterable[str | None], list[Limit], Counter], Iterator[tuple[int, dict | str]]]
    """rows(wanted columns, limits, counts of what was left out) streams (number, row). To be called once."""


def open_table(path: str | None, dataset: str, split: str) -> Table:
    """Open a file, or without one a data set on the hub; UserError says in one line why not."""
    source = path or f"--dataset {dataset}"
    advice = "" if path else "; accept its terms on huggingface.co and log in (hf auth login), or pass --urls FILE"

    def one_line(error):
        said = str(error).strip().splitlines() or [type(error).__name__]
        return UserError(f"{source}: {said[0].rstrip('.')}{advice}")

    def rows(wanted, limits, counts):
        try:
            yield from stream(list(dict.fromkeys(name for name in wanted if name is not None)), limits, counts)
        except Exception as error:
            raise one_line(error) from None

    # The readers of Parquet, of gzip and of the hub raise everything from EOFError to their own kinds.
    try:
        columns, stream = open_file(Path(path)) if path else open_hub(dataset, split)
    except UserError:
        raise
    except Exception as error:
        raise one_line(error) from None
    return Table(source, columns, rows)


def open_hub(dataset: str, split: str):
    import datasets

    stream = datasets.load_dataset(dataset, split=split, streaming=True)
    columns = stream.column_names or list(next(iter(stream), {}))

    def rows(wanted, limits, counts):
        batches = stream.select_columns(wanted).with_format("arrow").iter(10_000)
        return arrow_rows(batches, limits, counts)

    return columns, rows


def open_file(path: Path):
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    kind = re.search(r"\.(?:(parquet)|(csv|tsv|jsonl)(\.gz)?)$", path.name.lower())
    if kind is None:
        raise UserError(f"{path}: a table should end in .parquet, .csv, .tsv, .jsonl, or .gz after the last three")
    if kind[1]:
        from pyarrow.parquet import ParquetFile

        table = ParquetFile(path)
        return table.schema_arrow.names, lambda wanted, limits, counts: arrow_rows(
            table.iter_batches(10_000, columns=wanted), limits, counts
        )

    file = (gzip.open if kind[3] else open)(path, "rt", encoding="utf-8-sig", errors="replace", newline="")
    if kind[2] == "jsonl":
        lines = jsonl_rows(file)
        first = list(islice(lines, 1000))
        columns = list(dict.fromkeys(name for row in first if isinstance(row, dict) for name in row))
        return columns, lambda wanted, limits, counts: text_rows(chain(first, lines), limits, counts)
    reader = csv.reader(file, delimiter="\t" if kind[2] == "tsv" else ",")
    columns = next(reader, [])
    return columns, lambda wanted, limits, counts: text_rows(csv_rows(reader, columns), limits, counts)


def pick_columns(table: Table, options: dict) -> dict[str, str | None]:
    """Return the columns by what they hold: those given as options, else the first of the usual spellings that there is.

    Only those of the addresses and of the captions have to be there; None stands for any other that is not.
    """
    has = f"(it has {', '.join(table.columns) or 'none'})"
    plain = {re.sub("[^a-z0-9]", "", name.lower()): name for name in reversed(table.columns)}
    columns = {}
    for flag, spellings in SPELLINGS.items():
        given = options.get(flag)
        if given is not None and given not in table.columns:
            raise UserError(f"{table.source}: no column {given!r} for --{flag} {has}")
        columns[flag] = given or next((plain[spelling] for spelling in spellings if spelling in plain), None)
        if columns[flag] is None and flag in ("url_column", "caption_column"):
            raise UserError(f"{table.source}: which is the {flag}? Pass --{flag} {has}")
    print(f"{table.source}: " + ", ".join(f"{flag} {name}" for flag, name in columns.items() if name is not None))
    if columns["score_column"] is None:
        print(f"no aesthetic scores among its columns {has}: --min_aesthetic is not applied")
    return columns


def candidates(rows, columns: dict, skip=frozenset()) -> Iterator[tuple]:
    """Yield (number, url, caption, problem or None) of the rows that are not in `skip`."""
    for number, row in rows:
        if number in skip:
            continue
        if isinstance(row, str):
            yield number, None, None, row
            continue
        url, caption, problem = row.get(columns["url_column"]), row.get(columns["caption_column"]), None
        score = row.get(columns["score_column"])
        caption = clean(caption) if isinstance(caption, str) else ""
        if columns["score_column"] is not None and math.isnan(to_number(score)):
            problem = f"score is not a number: {score!r:.50}"
        if not isinstance(url, str) or not re.match(r"\s*https?://.", url, re.IGNORECASE):
            problem = f"not an http(s) address: {url!r:.100}"
        elif not caption:
            problem = "no caption"
        yield number, url, caption, problem


def clean(caption: str) -> str:
    """Return a caption without HTML entities (often escaped twice), control characters and superfluous space."""
    while (plain := html.unescape(caption)) != caption:
        caption = plain
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\ufeff\ufffd\ud800-\udfff]", " ", caption).split())


def arrow_rows(batches, limits: list[Limit], counts: Counter) -> Iterator[tuple[int, dict]]:
    """Number and filter whole batches: of a billion rows few pass, and only those become Python objects."""
    start = 0
    for batch in batches:
        keep = np.ones(len(batch), bool)
        for limit in limits:
            values = batch[limit.column].to_numpy(zero_copy_only=False)
            if values.dtype.kind in "iuf":
                out = keep & limit.excludes(values)
                counts[limit.reason] += int(out.sum())
                keep &= ~out
        if keep.any():
            numbers = (start + np.flatnonzero(keep)).tolist()
            yield from within(zip(numbers, batch.filter(keep).to_pylist(), strict=True), limits, counts)
        start += len(batch)


def text_rows(rows, limits: list[Limit], counts: Counter) -> Iterator[tuple[int, dict | str]]:
    return within(enumerate(rows), limits, counts)


def within(rows, limits: list[Limit], counts: Counter) -> Iterator[tuple[int, dict | str]]:
    for number, row in rows:
        if isinstance(row, dict):
            out = next((limit for limit in limits if limit.excludes(to_number(row.get(limit.column)))), None)
            if out is not None:
                counts[out.reason] += 1
                continue
        yield number, row


def to_number(value) -> float:
    """Return a table's value as a number, NaN if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def jsonl_rows(file) -> Iterator[dict | str]:
    for line in file:
        if line.strip():
            try:
                row = json.loads(line)
                yield row if isinstance(row, dict) else f"malformed row: {type(row).__name__}, not an object"
            except (ValueError, RecursionError) as error:
                yield f"malformed row: {error}"


def csv_rows(reader, columns: list[str]) -> Iterator[dict | str]:
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"malformed row: {error}"
            continue
        if len(fields) == len(columns):
            yield dict(zip(columns, fields, strict=True))
        elif fields:
            yield f"malformed row: {len(fields)} fields under {len(columns)} columns"
