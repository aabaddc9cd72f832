"""The rows that process_diffusiondb.py writes as an Arrow table: millions of them in seconds, and each prompt held once."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.json

from utils import jsonl
from utils.errors import UserError

FIELDS = {"id": int, "prompt": str, "score": (int, float), "blurry": bool, "part": int, "image": str}
SCHEMA = pa.schema(
    {
        "id": pa.int64(),
        "prompt": pa.string(),
        "score": pa.float64(),
        "blurry": pa.bool_(),
        "part": pa.int64(),
        "image": pa.string(),
        "pixels": pa.string(),  # absent in files that process_diffusiondb.py did not write
    }
)


def read(path: str) -> pa.Table:
    """Return the rows of a meta file, in the order of (part, image), prompts as a dictionary column."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        table = read_fast(path)
    except pa.ArrowInvalid:
        table = None
    if table is None or any(table[field].null_count for field in FIELDS):
        table = read_slow(path)
    if not len(table):
        raise UserError(f"{path}: no rows in it")
    table = table.sort_by([("part", "ascending"), ("image", "ascending")])
    wrong = np.flatnonzero(~np.isfinite(table["score"].to_numpy()))
    if len(wrong):
        part, image, score = (table[field][int(wrong[0])] for field in ("part", "image", "score"))
        raise UserError(f"{path}: image {image} of part {part} has the score {score}")
    return table


def read_fast(path: str) -> pa.Table:
    """Let Arrow parse the file; block by block, so that a prompt is held once, not once an image."""
    options = pa.json.ParseOptions(explicit_schema=SCHEMA, unexpected_field_behavior="ignore")
    with pa.json.open_json(path, pa.json.ReadOptions(block_size=16 << 20), options) as reader:
        return pa.concat_tables(with_dictionaries(pa.table(batch)) for batch in reader).unify_dictionaries()


def read_slow(path: str) -> pa.Table:
    """Parse a file that Arrow refuses, if it can be read at all; else name its first bad line."""
    rows = [{field: row.get(field) for field in SCHEMA.names} for row in jsonl.read(path, FIELDS)]
    try:
        return with_dictionaries(pa.Table.from_pylist(rows, SCHEMA))
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None


def with_dictionaries(table: pa.Table) -> pa.Table:
    for field in ("prompt", "pixels"):
        table = table.set_column(table.schema.get_field_index(field), field, table[field].dictionary_encode())
    return table


def numbers(table: pa.Table, field: str) -> np.ndarray:
    """Return a column as an array; of a dictionary column the codes, -1 where there is none."""
    column = table[field].combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.indices.fill_null(-1)
    return column.to_numpy(zero_copy_only=False)
