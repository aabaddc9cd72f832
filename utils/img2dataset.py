"""Read what img2dataset wrote (github.com/rom1504/img2dataset, output formats `files` and `webdataset`).

A shard 00012 is 00012.parquet (a row a picture: key, status, error_message, url, caption and the additional columns),
00012_stats.json once it is finished, and the pictures: 00012/000120345.jpg, or that file in 00012.tar.
"""

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError

COLUMNS = ("key", "status", "error_message", "url", "caption", "row")
SUFFIXES = (".jpg", ".png", ".webp")


class Sample(NamedTuple):
    number: int  # the `row` column if it was saved, else the key
    url: str
    caption: str | None
    problem: str | None
    suffix: str
    path: Path | None  # None in a tar
    read: Callable[[], bytes]  # raises OSError or tarfile.TarError


def samples(folder: Path, warn: Callable[[str], None]) -> Iterator[Sample]:
    """Yield all rows of the finished shards in order, pictures and failures. `warn` is told of shards that are not usable."""
    from pyarrow import parquet  # which a mere download does not load

    found = False
    for table in sorted(folder.glob("[0-9]*.parquet")):
        shard = table.with_suffix("")
        tar = table.with_suffix(".tar")
        if not table.with_name(f"{shard.name}_stats.json").exists():
            warn(f"{table}: left out, its shard is not finished (run img2dataset again)")
            continue
        if not shard.is_dir() and not tar.is_file():
            warn(
                f"{table}: left out, neither {shard.name}/ nor {tar.name} is beside it (output_format files, webdataset)"
            )
            continue
        try:
            with parquet.ParquetFile(table) as file:
                columns = [name for name in COLUMNS if name in file.schema_arrow.names]
                rows = file.read(columns).to_pylist()
            missing = {"key", "status", "url", "caption"} - set(columns)
            if missing:
                raise ValueError(f"no column {', '.join(sorted(missing))}")
            numbered = sorted(((number_of(row), row) for row in rows), key=lambda pair: pair[0])
        except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
            warn(f"{table}: left out: {str(error).splitlines()[0]}")
            continue
        found = True
        yield from in_folder(shard, numbered) if shard.is_dir() else in_tar(tar, numbered)
    if not found:
        raise UserError(f"--from_img2dataset {folder}: no finished shard of img2dataset there")


def number_of(row: dict) -> int:
    return row["row"] if isinstance(row.get("row"), int) else int(row["key"])


def in_folder(shard: Path, numbered) -> Iterator[Sample]:
    files = {path.stem: path for path in shard.iterdir() if path.suffix in SUFFIXES}
    for number, row in numbered:
        path = files.get(row["key"])
        yield sample(number, row, path and path.suffix, shard, path, path and path.read_bytes)


def in_tar(path: Path, numbered) -> Iterator[Sample]:
    with tarfile.open(path) as tar:
        members = {}
        try:
            for member in tar:
                name = Path(member.name)
                if member.isfile() and name.suffix in SUFFIXES:
                    members[name.stem] = member
        except tarfile.TarError:
            pass  # cut short: what is missing is named row by row
        for number, row in numbered:
            member = members.get(row["key"])
            read = member and (lambda member=member: tar.extractfile(member).read())
            yield sample(number, row, member and Path(member.name).suffix, path, None, read)


def sample(number, row, suffix, where, path, read) -> Sample:
    problem = None
    if row["status"] != "success":
        problem = f"img2dataset, {row['status']}: {row['error_message']}"
    elif read is None:
        problem = f"missing: {row['key']} in {where}"
    return Sample(number, row["url"], row["caption"], problem, suffix, path, read)
