"""Download the regularization images: real pictures with captions that keep the adapted model close to the original.

    python download_regularization_images.py                         # the default table on the hub, until 200,231 pictures
    python download_regularization_images.py --urls urls.parquet     # any table: parquet, csv, tsv, jsonl, .gz of the text ones
    python download_regularization_images.py --write_urls urls.parquet       # only filter the table, see scripts/download_img2dataset.sh
    python download_regularization_images.py --from_img2dataset FOLDER       # take over what img2dataset downloaded

Reads   a table with a column of image addresses, one of captions and, if they are there, aesthetic scores, `punsafe`,
        `pwatermark`, `width` and `height`; or the shards of img2dataset (formats `files` and `webdataset`).
Writes  regularization_images/000000012.jpg     the picture of row 12 of the table (the first row is 0)
        regularization_images.jsonl             a row a picture, in the table's order: `file_name`, `caption`, `url`, and
                                                `sha256` of the file; `file_name` is relative to where this file lies
        regularization_images.errors.jsonl      a row a failure: `item` (row of the table), `stage`, `reason`
        regularization_images.run.json          options, counts by reason, time

Run it again to go on: what is there is kept, failures are tried again only with --retry, nothing is renumbered. With any
number of threads the result is the same, as far as the servers' answers are. Rows without a caption are skipped: a
picture without one would teach the model to ignore its prompt. About half the links of such tables are dead. Servers
that opt out of machine use (`X-Robots-Tag: noai` and its kin) are left alone, busy ones are waited for. One process,
many threads; beyond one machine this is img2dataset's work.
"""

import argparse
import contextlib
import ctypes
import hashlib
import io
import math
import os
import re
import shutil
import sys
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import NamedTuple
from urllib.parse import urlsplit

from PIL import Image
from tqdm import tqdm

from utils import img2dataset, jsonl, runs, web
from utils.errors import UserError, one_line_errors
from utils.images import eight_bit, to_rgb
from utils.url_tables import Limit, Table, candidates, clean, open_table, pick_columns
from utils.web import Skip

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow also opens EPS, by running a PostScript interpreter
WINDOW = 32  # rows a thread that may be under way while the first of them is still waited for
OFFLINE = 200  # so many hosts in a row that do not answer are our network's fault, not theirs


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # The table.
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--urls", help="a file: .parquet, .csv, .tsv, .jsonl, or .gz of the last three")
    source.add_argument("--dataset", default="laion/aesthetics_v2_4.75", help="else one on the hub (%(default)s)")
    source.add_argument("--from_img2dataset", metavar="FOLDER", help="download nothing, take over img2dataset's output")
    parser.add_argument("--split", default="train", help="of the data set on the hub (%(default)s)")
    parser.add_argument("--url_column", help="column of the pictures' addresses (guessed)")
    parser.add_argument("--caption_column", help="column of the captions (guessed)")
    parser.add_argument("--score_column", help="column of the aesthetic scores (guessed; without one all rows pass)")
    parser.add_argument("--min_aesthetic", type=float, default=6.5, help="lowest score to keep (%(default)s)")
    parser.add_argument("--max_punsafe", type=float, default=0.5, help="highest `punsafe` to keep (%(default)s)")
    # Stable Diffusion 1.x itself learned from pictures below 0.5 (its model card).
    parser.add_argument("--max_pwatermark", type=float, default=0.5, help="highest `pwatermark` to keep (%(default)s)")
    parser.add_argument("--write_urls", metavar="FILE", help="download nothing, write the filtered table as Parquet")
    # The pictures.
    parser.add_argument("--output_folder", default="regularization_images", help="the .jsonl goes beside it")
    parser.add_argument("--num_images", type=int, default=200231, help="stop at so many (%(default)s, the paper's)")
    parser.add_argument("--min_size", type=int, default=512, help="shortest side to keep (%(default)s, the training's)")
    parser.add_argument("--max_aspect", type=float, default=math.inf, help="longest side over shortest side (any)")
    parser.add_argument("--image_size", type=int, default=512, help="shortest side after reduction, or 0 (%(default)s)")
    parser.add_argument("--quality", type=int, default=95, help="of the JPEG (%(default)s)")
    parser.add_argument("--retry", action="store_true", help="try the rows that failed again")
    parser.add_argument("--overwrite", action="store_true", help="remove what an earlier run wrote and start anew")
    # The network.
    parser.add_argument("--num_workers", type=int, default=256, help="connections at once (%(default)s)")
    parser.add_argument("--max_per_host", type=int, default=8, help="of them to one host (%(default)s)")
    parser.add_argument("--timeout", type=float, default=10, help="seconds a picture, to its last byte (%(default)s)")
    parser.add_argument("--max_bytes", type=int, default=20_000_000, help="largest file to accept (%(default)s)")
    parser.add_argument("--allow_private", action="store_true", help="also from loopback and private addresses")
    return parser.parse_args(argv)


def main(args):
    # Look at all that a user can get wrong before anything is written.
    check_options(args)
    if args.from_img2dataset:
        source, columns = f"img2dataset's {Path(args.from_img2dataset).resolve()}", {}
    else:
        table = open_table(args.urls, args.dataset, args.split)
        source, columns = table.source, pick_columns(table, vars(args))
        limits = pick_limits(columns, args)
    if args.write_urls:
        return write_urls(table, columns, limits, Path(args.write_urls))

    # Record what the pictures depend on; an output of other settings is refused here.
    folder = Path(args.output_folder)
    rows_path, errors_path, run_path = (
        folder.with_name(folder.name + suffix) for suffix in (".jsonl", ".errors.jsonl", ".run.json")
    )
    aspect = args.max_aspect if args.max_aspect < math.inf else "any"  # JSON has no infinity
    settings = {"table": source, "min_size": args.min_size, "max_aspect": aspect}
    if not args.from_img2dataset:
        settings |= {
            "table": f"sha256 {runs.sha256(args.urls)}" if args.urls else f"{args.dataset}, split {args.split}",
            **columns,
            "limits": [f"{limit.lowest:g} <= {limit.column} <= {limit.highest:g}" for limit in limits],
            "image_size": args.image_size,
            "quality": args.quality,
        }
    if args.overwrite:
        remove_output(folder, rows_path, errors_path, run_path)
    elif not run_path.exists() and (rows_path.exists() or pictures_in(folder)):
        raise UserError(
            f"{folder}: there are pictures or rows, but no {run_path.name}; use --overwrite or another --output_folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    record = runs.begin(run_path, settings)
    waiting = folder / ".waiting"  # pictures whose turn has not come: kept when a run is killed
    waiting.mkdir(exist_ok=True)
    start = monotonic()

    with jsonl.Appender(rows_path) as rows, jsonl.Appender(errors_path) as errors:
        # Go on where an earlier run stopped.
        done, failed, known = read_earlier(folder, rows_path, errors_path)
        skip = done.copy() if args.retry else done | failed.keys()
        filtered = Counter()
        if len(done) >= args.num_images:
            outcomes = (nothing for nothing in ())
        elif args.from_img2dataset:
            outcomes = take_over(Path(args.from_img2dataset), waiting, skip, args)
        else:
            items = candidates(table.rows(columns.values(), limits, filtered), columns, skip)
            # Not many more rows are begun than the pictures that are missing: about half give one.
            outcomes = download_all(items, waiting, args, lambda: 2 * (args.num_images - len(done)) + 16)

        # Write down in the table's order: so the result does not depend on who answers first.
        bar = tqdm(total=args.num_images, initial=min(len(done), args.num_images), unit="img", smoothing=0.05)
        received, unanswered = 0, set()
        with bar, closing(outcomes):
            for number, url, caption, outcome in outcomes:
                if isinstance(outcome, Picture) and known.get(outcome.sha256, number) != number:
                    outcome = Skip(f"duplicate: the same picture as row {known[outcome.sha256]}")
                if isinstance(outcome, Picture):
                    name = f"{number:09d}{outcome.path.suffix}"
                    os.replace(outcome.path, folder / name)
                    file = {"file_name": f"{folder.name}/{name}", "caption": caption, "url": url}
                    rows.write(file | {"sha256": outcome.sha256})
                    known[outcome.sha256] = number
                    done.add(number)
                    failed.pop(number, None)
                    received += outcome.received
                    bar.update()
                else:
                    failed[number] = str(outcome)
                    errors.write(error_row(number, outcome))
                unanswered.add(host_of((number, url)))
                if not str(outcome).startswith(("dead host", "timeout")):
                    unanswered.clear()
                if len(unanswered) == OFFLINE:
                    raise UserError(
                        f"{OFFLINE} hosts in a row did not answer: is this machine online? Later, add --retry"
                    )
                speed = received / 1e6 / max(monotonic() - start, 1e-3)
                bar.set_postfix_str(f"{len(failed):,} failed, {speed:.1f} MB/s", refresh=not bar.n)
                if len(done) >= args.num_images:
                    break

    # Say what came of it; with --retry a row may have failed twice, or not in the end.
    shutil.rmtree(waiting)
    if args.retry:
        jsonl.write_whole(errors_path, "".join(jsonl.dumps(error_row(n, failed[n])) for n in sorted(failed)))
    reasons = Counter(reason.split(":")[0] for reason in failed.values()) + filtered
    print(f"{rows_path}: {len(done):,} pictures of {args.num_images:,}; left out: {reasons.total():,}")
    print_reasons(reasons)
    results = {"source": source, "pictures": len(done), "reasons": dict(reasons.most_common())}
    runs.finish(run_path, record, **results, bytes_received=received, seconds=round(monotonic() - start, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Options and earlier output


def check_options(args):
    """Raise UserError for a number that makes no sense, and for what cannot be combined."""
    lowest = {"num_images": 1, "min_size": 0, "image_size": 0, "quality": 1, "max_aspect": 1}
    lowest |= {"num_workers": 1, "max_per_host": 1, "max_bytes": 1}
    for name, limit in lowest.items():
        if not getattr(args, name) >= limit:
            raise UserError(f"--{name} {getattr(args, name)}: should be at least {limit}")
    if args.quality > 100:
        raise UserError(f"--quality {args.quality}: should be at most 100")
    if not 0 < args.timeout < math.inf:
        raise UserError(f"--timeout {args.timeout}: should be a number of seconds above 0")
    if Path(args.output_folder).name in ("", ".."):
        raise UserError(f"--output_folder {args.output_folder}: give a folder of its own, the .jsonl lies beside it")
    if args.from_img2dataset and args.write_urls:
        raise UserError("--from_img2dataset and --write_urls: the table is written before img2dataset runs")
    if args.from_img2dataset and not Path(args.from_img2dataset).is_dir():
        raise UserError(f"--from_img2dataset {args.from_img2dataset}: no such folder")
    if args.from_img2dataset and not any(Path(args.from_img2dataset).glob("[0-9]*.parquet")):
        raise UserError(f"--from_img2dataset {args.from_img2dataset}: no shard of img2dataset there")
    if args.write_urls and not args.write_urls.endswith(".parquet"):
        raise UserError(f"--write_urls {args.write_urls}: should end in .parquet")


def remove_output(folder: Path, *files: Path):
    """Remove an earlier run's pictures and files, and nothing else that may lie in the folder."""
    for path in (*files, *pictures_in(folder)):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / ".waiting", ignore_errors=True)


def pictures_in(folder: Path) -> list[Path]:
    return [p for p in folder.glob("*") if p.suffix in img2dataset.SUFFIXES and re.fullmatch(r"\d{9,}", p.stem)]


def read_earlier(folder: Path, rows_path: Path, errors_path: Path) -> tuple[set[int], dict[int, str], dict[str, int]]:
    """Return the rows of the table that are done, those that failed with the reason, and the pictures' rows by sha256.

    To be called when the appenders have cut torn lines: a row that is read here and cut later would be lost.
    """
    done, known = set(), {}
    for row in jsonl.read(rows_path, {"file_name": str}):
        try:
            number = int(Path(row["file_name"]).stem)
        except ValueError:
            raise UserError(f"{rows_path}: {row['file_name']!r} is not named after a row of a table") from None
        done.add(number)
        known[row.get("sha256")] = number
    failed = {row["item"]: row["reason"] for row in jsonl.read(errors_path, {"item": int, "reason": str})}

    # What a killed run leaves: half a file, and a picture whose row was never written.
    for stale in folder.glob(".waiting/.*.tmp"):
        stale.unlink()
    there = pictures_in(folder)
    for path in there:
        if int(path.stem) not in done:
            path.unlink()
    missing = done - {int(path.stem) for path in there}
    if missing:
        print(
            f"{folder}: {len(missing):,} pictures of {rows_path.name} are gone, the first {min(missing):09d}",
            file=sys.stderr,
        )
    return done, {number: reason for number, reason in failed.items() if number not in done}, known


def error_row(number: int, reason) -> dict:
    return {"item": number, "stage": "download", "reason": str(reason)}


def print_reasons(reasons: Counter):
    for reason, count in reasons.most_common():
        print(f"{count:12,}  {reason}")


# ---------------------------------------------------------------------------------------------------------------------
# The table


def pick_limits(columns: dict, args) -> list[Limit]:
    """Return what is asked of the columns that are there. The table's word on the sizes saves asking a server."""
    limits = [
        Limit(columns["score_column"], args.min_aesthetic, math.inf, "below --min_aesthetic"),
        Limit(columns["unsafe_column"], -math.inf, args.max_punsafe, "above --max_punsafe"),
        Limit(columns["watermark_column"], -math.inf, args.max_pwatermark, "above --max_pwatermark"),
        Limit(columns["width_column"], args.min_size, math.inf, "below --min_size in the table"),
        Limit(columns["height_column"], args.min_size, math.inf, "below --min_size in the table"),
    ]
    return [limit for limit in limits if limit.column is not None]


def write_urls(table: Table, columns: dict, limits: list[Limit], path: Path):
    """Write `url`, `caption` and `row` of the rows that pass, for img2dataset; the picture of a row keeps its number."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema([("url", pa.string()), ("caption", pa.string()), ("row", pa.int64())])
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    reasons, batch, written = Counter(), [], 0
    rows = tqdm(candidates(table.rows(columns.values(), limits, reasons), columns), unit="rows")
    errors_path = path.with_suffix(".errors.jsonl")
    errors_path.unlink(missing_ok=True)
    try:
        with parquet.ParquetWriter(temporary, schema) as writer, jsonl.Appender(errors_path) as errors:
            for number, url, caption, problem in rows:
                if problem is not None:
                    reasons[problem.split(":")[0]] += 1
                    errors.write(error_row(number, problem))
                    continue
                batch.append({"url": url.strip(), "caption": caption, "row": number})
                written += 1
                if len(batch) == 10_000:
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                    batch.clear()
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{path}: {written:,} rows; left out: {reasons.total():,}")
    print_reasons(reasons)


# ---------------------------------------------------------------------------------------------------------------------
# The pictures


class Picture(NamedTuple):
    path: Path  # where it waits for its turn
    sha256: str
    received: int  # bytes from the network


def download_all(items, waiting: Path, args, most) -> Iterator[tuple[int, str, str, Picture | Skip]]:
    """Yield (number, url, caption, outcome) in the order of the items; at most `most()` of them are under way."""
    warnings.filterwarnings("ignore", module="PIL")  # odd metadata of strange pictures are no news
    keep_freed_memory()
    Image.init()  # two threads that open their first picture at once would miss each other's formats
    client = web.Client(args.num_workers, args.max_per_host, args.allow_private)

    def fetch(item):
        number, url, _, problem = item
        if problem is not None:
            raise Skip(problem)
        if (waiting / f"{number:09d}.jpg").exists():
            return None
        return client.fetch(url.strip(), args.timeout, args.max_bytes)

    def process(item, body):
        path = waiting / f"{item[0]:09d}.jpg"
        if body is None:
            return Picture(path, runs.sha256(path), 0)
        jpeg = encode(body, args)
        jsonl.write_whole(path, jpeg)
        return Picture(path, hashlib.sha256(jpeg).hexdigest(), len(body))

    jobs = ((host_of(item), item) for item in items)
    window = WINDOW * args.num_workers
    for item, outcome in web.in_order(
        jobs, fetch, process, args.num_workers, args.max_per_host, lambda: min(window, most())
    ):
        yield *item[:3], outcome


def keep_freed_memory():
    """Have the C library keep what is freed: given back to the system with each picture, it cost a fifth of the time."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux with glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, bytes: the most it takes
        mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD, bytes


def host_of(item) -> str:
    try:
        return urlsplit(item[1].strip()).hostname or ""
    except (AttributeError, ValueError):
        return ""


def encode(body: bytes, args) -> bytes:
    """Return the picture in a body as the JPEG to keep; Skip says why not."""
    image = look_at(body, args)
    try:
        if 0 < args.image_size < min(image.size):
            # JPEG decodes to a half, a quarter or an eighth at a fraction of the cost.
            scale = args.image_size / min(image.size)
            image.draft(None, [math.ceil(side * scale) for side in image.size])
        image.load()
        image = to_rgb(eight_bit(image))
        if 0 < args.image_size < min(image.size):
            scale = args.image_size / min(image.size)
            image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=args.quality)
        return jpeg.getvalue()
    except Exception as error:  # the web's pictures make the decoders raise anything, and none is worth the run
        raise Skip(f"not an image: {error}") from None


def look_at(body: bytes, args) -> Image.Image:
    """Open a picture without decoding it, and look at its size."""
    try:
        image = Image.open(io.BytesIO(body), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Skip(f"too large: {error}") from None
    except Exception:
        raise Skip("not an image") from None
    width, height = image.size
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise Skip(f"too large: {width} x {height} pixels")
    if min(image.size) < args.min_size:
        raise Skip(f"too small: {width} x {height}")
    if max(image.size) > args.max_aspect * min(image.size):
        raise Skip(f"too long: {width} x {height}")
    return image


def take_over(source: Path, waiting: Path, skip: set[int], args) -> Iterator[tuple[int, str, str, Picture | Skip]]:
    """Yield what img2dataset downloaded as `download_all` does; files are linked where that is possible, not copied."""
    for sample in img2dataset.samples(source, warn=lambda line: tqdm.write(line, file=sys.stderr)):
        if sample.number in skip:
            continue
        skip.add(sample.number)
        caption = clean(sample.caption or "")
        try:
            if sample.problem or not caption:
                raise Skip(sample.problem or "no caption")
            path = waiting / f"{sample.number:09d}{sample.suffix}"
            path.unlink(missing_ok=True)
            try:
                body = sample.read()
            except (OSError, tarfile.TarError) as error:
                raise Skip(f"not readable: {error}") from None
            look_at(body, args).close()
            try:
                os.link(sample.path or "", path)
            except OSError:  # in a tar, or on another disk
                jsonl.write_whole(path, body)
            outcome = Picture(path, hashlib.sha256(body).hexdigest(), 0)
        except Skip as skipped:
            outcome = skipped
        yield sample.number, sample.url, caption, outcome


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
