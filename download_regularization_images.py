"""Download the regularization images: real pictures with captions that keep the adapted model close to the original.

    python download_regularization_images.py                         # the default table on the hub, until 200,231 pictures
    python download_regularization_images.py --urls urls.parquet     # any table: parquet, csv, tsv, jsonl, .gz of the text ones

Reads   a table with a column of image addresses, one of captions and, if there is one, one of aesthetic scores.
Writes  regularization_images/000000012.jpg     the picture of row 12 of the table (the first row is 0)
        regularization_images.jsonl             a row a picture, in the table's order: `file_name`, `caption`, `url`;
                                                `file_name` is relative to where this file lies
        regularization_images.errors.jsonl      a row a failure: `item` (row of the table), `stage`, `reason`
        regularization_images.run.json          options, counts by reason, time

Run it again to go on: what is there is kept, failures are tried again only with --retry, nothing is renumbered. With any
number of threads the result is the same, as far as the servers' answers are. Rows without a caption are skipped: a
picture without one would teach the model to ignore its prompt. About half the links of such tables are dead. Servers
that opt out of machine use (`X-Robots-Tag: noai` and its kin) are left alone. One process, many threads; beyond one
machine this is img2dataset's work.
"""

import argparse
import csv
import gzip
import http.client
import io
import ipaddress
import json
import logging
import math
import re
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.cookiejar import DefaultCookiePolicy
from itertools import chain, islice
from pathlib import Path
from time import monotonic
from urllib.parse import urljoin

import requests
import urllib3
from PIL import Image
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util.connection import create_connection

from utils import jsonl, runs
from utils.errors import UserError, one_line_errors
from utils.images import open_image, to_rgb

USER_AGENT = "align_sd (research; regularization images for https://arxiv.org/abs/2303.14420)"
OPT_OUT = {"noai", "noimageai", "noindex", "noimageindex", "none"}  # "none" is short for "noindex, nofollow"
MAX_REDIRECTS = 5
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow also opens EPS, by running a PostScript interpreter

# How tables spell their columns, in lower case and without signs: AESTHETIC_SCORE is aestheticscore.
SPELLINGS = {
    "url_column": ("url", "imageurl", "imgurl", "photoimageurl", "imagelink", "link", "uri"),
    "caption_column": ("caption", "text", "alttext", "alt", "description", "title", "prompt"),
    "score_column": ("aestheticscore", "aesthetic", "aesthetics", "aestheticsscore", "aestheticscorev2"),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # The table.
    parser.add_argument("--urls", help="a file: .parquet, .csv, .tsv, .jsonl, or .gz of the last three")
    parser.add_argument("--dataset", default="laion/aesthetics_v2_4.75", help="else one on the hub (%(default)s)")
    parser.add_argument("--split", default="train", help="of the data set on the hub (%(default)s)")
    parser.add_argument("--url_column", help="column of the pictures' addresses (guessed)")
    parser.add_argument("--caption_column", help="column of the captions (guessed)")
    parser.add_argument("--score_column", help="column of the aesthetic scores (guessed; without one all rows pass)")
    parser.add_argument("--min_aesthetic", type=float, default=6.5, help="lowest score to keep (%(default)s)")
    # The pictures.
    parser.add_argument("--output_folder", default="regularization_images", help="the .jsonl goes beside it")
    parser.add_argument("--num_images", type=int, default=200231, help="stop at so many (%(default)s, the paper's)")
    parser.add_argument("--min_size", type=int, default=512, help="shortest side to keep (%(default)s, the training's)")
    parser.add_argument("--image_size", type=int, default=512, help="shortest side after reduction, or 0 (%(default)s)")
    parser.add_argument("--quality", type=int, default=95, help="of the JPEG (%(default)s)")
    parser.add_argument("--retry", action="store_true", help="try the rows that failed again")
    parser.add_argument("--overwrite", action="store_true", help="remove what an earlier run wrote and start anew")
    # The network.
    parser.add_argument("--num_workers", type=int, default=64, help="threads (%(default)s)")
    parser.add_argument("--timeout", type=float, default=10, help="seconds a picture, to its last byte (%(default)s)")
    parser.add_argument("--max_bytes", type=int, default=20_000_000, help="largest file to accept (%(default)s)")
    parser.add_argument("--allow_private", action="store_true", help="also from loopback and private addresses")
    return parser.parse_args(argv)


def main(args):
    # Look at all that a user can get wrong before anything is written.
    check_options(args)
    source, names, read_rows = open_table(args)
    columns = {flag: pick_column(flag, getattr(args, flag), names, source) for flag in SPELLINGS}
    print(f"{source}: " + ", ".join(f"--{flag} {name}" for flag, name in columns.items() if name is not None))
    if columns["score_column"] is None:
        print(f"no aesthetic scores among its columns ({', '.join(names)}): --min_aesthetic is not applied")

    # Record what the pictures depend on; an output of other settings is refused here.
    folder = Path(args.output_folder)
    rows_path, errors_path, run_path = (
        folder.with_name(folder.name + suffix) for suffix in (".jsonl", ".errors.jsonl", ".run.json")
    )
    settings = {
        "table": f"sha256 {runs.sha256(args.urls)}" if args.urls else f"{args.dataset}, split {args.split}",
        **columns,
        "min_aesthetic": None if columns["score_column"] is None else args.min_aesthetic,
        "min_size": args.min_size,
        "image_size": args.image_size,
        "quality": args.quality,
    }
    if args.overwrite:
        remove_output(folder, rows_path, errors_path, run_path)
    elif rows_path.exists() and not run_path.exists():
        raise UserError(f"{rows_path}: its {run_path.name} is missing; use --overwrite or another --output_folder")
    folder.mkdir(parents=True, exist_ok=True)
    record = runs.begin(run_path, settings)
    start = monotonic()

    with jsonl.Appender(rows_path) as rows, jsonl.Appender(errors_path) as errors:
        # Go on where an earlier run stopped.
        done, failed = read_earlier(folder, rows_path, errors_path)
        filtered = Counter()
        items = candidates(
            read_rows([name for name in columns.values() if name is not None]),
            **columns,
            min_aesthetic=args.min_aesthetic,
            skip=done if args.retry else done | failed.keys(),
            filtered=filtered,
        )
        if len(done) >= args.num_images:
            items = ()

        # Fetch with many threads, write down in the table's order: so the result does not depend on who answers first.
        bar = tqdm(total=args.num_images, initial=min(len(done), args.num_images), unit="img", smoothing=0.05)
        with bar, closing(download_all(items, args)) as outcomes:
            for number, url, caption, outcome in outcomes:
                if isinstance(outcome, Skip):
                    failed[number] = str(outcome)
                    errors.write(error_row(number, outcome))
                    bar.set_postfix(failed=len(failed), refresh=False)
                    continue
                name = f"{number:09d}.jpg"
                jsonl.write_whole(folder / name, outcome)
                rows.write({"file_name": f"{folder.name}/{name}", "caption": caption, "url": url})
                done.add(number)
                failed.pop(number, None)
                bar.update()
                if len(done) >= args.num_images:
                    break

    # Say what came of it; with --retry a row may have failed twice, or not in the end.
    if args.retry:
        jsonl.write_whole(errors_path, "".join(jsonl.dumps(error_row(n, failed[n])) for n in sorted(failed)))
    reasons = Counter(reason.split(":")[0] for reason in failed.values()) + filtered
    print(f"{rows_path}: {len(done):,} pictures of {args.num_images:,}; left out: {reasons.total():,}")
    for reason, count in reasons.most_common():
        print(f"{count:12,}  {reason}")
    results = {"source": source, "pictures": len(done), "reasons": dict(reasons.most_common())}
    runs.finish(run_path, record, **results, seconds=round(monotonic() - start, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Options and earlier output


def check_options(args):
    """Raise UserError for a number that makes no sense."""
    lowest = {"num_images": 1, "min_size": 0, "image_size": 0, "quality": 1, "num_workers": 1, "max_bytes": 1}
    for name, limit in lowest.items():
        if getattr(args, name) < limit:
            raise UserError(f"--{name} {getattr(args, name)}: should be at least {limit}")
    if args.quality > 100:
        raise UserError(f"--quality {args.quality}: should be at most 100")
    if not 0 < args.timeout < math.inf:
        raise UserError(f"--timeout {args.timeout}: should be a number of seconds above 0")
    if Path(args.output_folder).name in ("", ".."):
        raise UserError(f"--output_folder {args.output_folder}: give a folder of its own, the .jsonl lies beside it")


def remove_output(folder: Path, *files: Path):
    """Remove an earlier run's pictures and files, and nothing else that may lie in the folder."""
    for path in (*files, *(p for p in folder.glob("*.jpg") if re.fullmatch(r"\d{9,}", p.stem))):
        path.unlink(missing_ok=True)


def read_earlier(folder: Path, rows_path: Path, errors_path: Path) -> tuple[set[int], dict[int, str]]:
    """Return the rows of the table that are done, and those that failed with the reason.

    To be called when the appenders have cut torn lines: a row that is read here and cut later would be lost.
    """
    for stale in folder.glob(".*.tmp"):  # a picture that a killed run was writing
        stale.unlink()
    done = set()
    for row in jsonl.read(rows_path, {"file_name": str}):
        try:
            done.add(int(Path(row["file_name"]).stem))
        except ValueError:
            raise UserError(f"{rows_path}: {row['file_name']!r} is not named after a row of a table") from None
    failed = {row["item"]: row["reason"] for row in jsonl.read(errors_path, {"item": int, "reason": str})}
    return done, {number: reason for number, reason in failed.items() if number not in done}


def error_row(number: int, reason) -> dict:
    return {"item": number, "stage": "download", "reason": str(reason)}


# ---------------------------------------------------------------------------------------------------------------------
# The table. A row is a dict, or a string that says what is wrong with it: it keeps its number all the same.


def open_table(args) -> tuple[str, list[str], Callable[[list[str]], Iterator[dict | str]]]:
    """Return the table's name, its columns, and a function that streams its rows with the columns that are wanted."""
    source = args.urls or f"--dataset {args.dataset}"
    advice = "" if args.urls else "; accept its terms on huggingface.co and log in (hf auth login), or pass --urls FILE"

    def one_line(error):
        said = str(error).strip().splitlines() or [type(error).__name__]
        return UserError(f"{source}: {said[0].rstrip('.')}{advice}")

    def read_rows(wanted):
        try:
            yield from stream(wanted)
        except Exception as error:
            raise one_line(error) from None

    # The readers of Parquet, of gzip and of the hub raise everything from EOFError to their own kinds.
    try:
        columns, stream = open_file(Path(args.urls)) if args.urls else open_hub(args.dataset, args.split)
    except UserError:
        raise
    except Exception as error:
        raise one_line(error) from None
    return source, columns, read_rows


def open_hub(dataset: str, split: str):
    import datasets

    stream = datasets.load_dataset(dataset, split=split, streaming=True)
    columns = stream.column_names or list(next(iter(stream), {}))
    return columns, lambda wanted: arrow_rows(stream.select_columns(wanted).with_format("arrow").iter(1000))


def open_file(path: Path):
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    kind = re.search(r"\.(?:(parquet)|(csv|tsv|jsonl)(\.gz)?)$", path.name.lower())
    if kind is None:
        raise UserError(f"{path}: a table should end in .parquet, .csv, .tsv, .jsonl, or .gz after the last three")
    if kind[1]:
        from pyarrow.parquet import ParquetFile

        table = ParquetFile(path)
        return table.schema_arrow.names, lambda wanted: arrow_rows(table.iter_batches(1000, columns=wanted))

    file = (gzip.open if kind[3] else open)(path, "rt", encoding="utf-8-sig", errors="replace", newline="")
    if kind[2] == "jsonl":
        rows = jsonl_rows(file)
        first = list(islice(rows, 1000))
        columns = list(dict.fromkeys(name for row in first if isinstance(row, dict) for name in row))
        return columns, lambda wanted: chain(first, rows)
    reader = csv.reader(file, delimiter="\t" if kind[2] == "tsv" else ",")
    columns = next(reader, [])
    return columns, lambda wanted: csv_rows(reader, columns)


def arrow_rows(batches) -> Iterator[dict]:
    for batch in batches:
        yield from batch.to_pylist()


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


def pick_column(flag: str, given: str | None, names: list[str], source: str) -> str | None:
    """Return the column that was given, or the first of the usual spellings that there is; the score may be None."""
    if given is not None:
        if given not in names:
            raise UserError(f"{source}: no column {given!r} for --{flag} (it has {', '.join(names) or 'none'})")
        return given
    plain = {re.sub("[^a-z0-9]", "", name.lower()): name for name in reversed(names)}
    for spelling in SPELLINGS[flag]:
        if spelling in plain:
            return plain[spelling]
    if flag == "score_column":
        return None
    raise UserError(f"{source}: which is the {flag}? Pass --{flag} (it has {', '.join(names) or 'none'})")


def candidates(rows, url_column, caption_column, score_column, min_aesthetic, skip, filtered) -> Iterator[tuple]:
    """Yield (number, url, caption, problem or None) of the rows that are not in `skip` and score high enough.

    `filtered` counts those that score too low: there are too many in a large table to write each down.
    """
    for number, row in enumerate(rows):
        if number in skip:
            continue
        if isinstance(row, str):
            yield number, None, None, row
            continue
        url, caption, problem = row.get(url_column), row.get(caption_column), None
        if score_column is not None:
            try:
                score = float(row.get(score_column))
            except (TypeError, ValueError):
                score = math.nan
            if score < min_aesthetic:
                filtered["below --min_aesthetic"] += 1
                continue
            if math.isnan(score):
                problem = f"score is not a number: {row.get(score_column)!r:.50}"
        if not isinstance(url, str) or not re.match(r"\s*https?://.", url, re.IGNORECASE):
            problem = f"not an http(s) address: {url!r:.100}"
        elif not isinstance(caption, str) or not caption.strip():
            problem = "no caption"
        yield number, url, caption, problem


# ---------------------------------------------------------------------------------------------------------------------
# The network


class Skip(Exception):
    """Why a row gives no picture: a kind that is counted and, after a colon, details."""


def download_all(items, args) -> Iterator[tuple[int, str, str, bytes | Skip]]:
    """Yield (number, url, caption, JPEG or Skip) in the order of the items.

    A slow server holds back those behind it, so several rows a thread are under way; their number bounds the memory.
    """
    Image.init()  # two threads that open their first picture at once would miss each other's formats
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # odd headers of strange servers are no news
    local = threading.local()

    def start():
        local.session = open_session(args.allow_private)

    def work(url, problem):
        try:
            if problem is not None:
                raise Skip(problem)
            return encode(fetch(local.session, url.strip(), args.timeout, args.max_bytes), args)
        except Skip as skip:
            return skip

    pool = ThreadPoolExecutor(args.num_workers, initializer=start)
    pending = deque()

    def finished(limit):
        while pending and (len(pending) > limit or pending[0][-1].done()):
            *item, future = pending.popleft()
            yield *item, future.result()

    try:
        for number, url, caption, problem in items:
            pending.append((number, url, caption, pool.submit(work, url, problem)))
            yield from finished(limit=16 * args.num_workers)
        yield from finished(limit=0)
    finally:
        pool.shutdown(cancel_futures=True)


def open_session(allow_private: bool) -> requests.Session:
    """Return a session of one thread: an honest name, no cookies, no passwords, guarded connections."""
    session = requests.Session()
    # Compression is not asked for: pictures do not shrink, and a small answer could unfold to gigabytes.
    session.headers.update({"User-Agent": USER_AGENT, "Accept": "image/*,*/*;q=0.1", "Accept-Encoding": "identity"})
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
    session.auth = lambda request: request  # or ~/.netrc would be asked for every address in the table
    adapter = HTTPAdapter(max_retries=0)
    # Behind a proxy (HTTPS_PROXY) other pools are used: there it is the proxy that connects, and that guards.
    adapter.poolmanager.pool_classes_by_scheme = {
        scheme: type("Pool", (pool,), {"ConnectionCls": guarded(pool.ConnectionCls, allow_private)})
        for scheme, pool in (("http", urllib3.HTTPConnectionPool), ("https", urllib3.HTTPSConnectionPool))
    }
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def guarded(connection_class, allow_private: bool):
    """Return a class of connections that keep to public addresses and to their timeout."""

    class Guarded(connection_class):
        response_class = TimedResponse

        def _new_conn(self):
            # Look at the address and connect to that very address: asked again, the name may point elsewhere.
            deadline = monotonic() + self.timeout
            try:
                found = socket.getaddrinfo(self._dns_host, self.port, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError):
                raise Skip(f"no such host: {self.host}") from None
            addresses = [address[0] for *_, address in found]
            if not allow_private and not all(map(is_public, addresses)):
                raise Skip(f"refused address: {self.host} is {addresses[0]}, see --allow_private")
            for address in addresses:
                try:
                    left = max(deadline - monotonic(), 0.001)
                    return create_connection((address, self.port), left, socket_options=self.socket_options)
                except OSError as error:
                    failure = error
            raise Skip("timeout" if isinstance(failure, TimeoutError) else f"no connection: {failure.strerror}")

    return Guarded


def is_public(address: str) -> bool:
    """Whether an address belongs to the open internet: not loopback, private, link-local, reserved or multicast."""
    ip = ipaddress.ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_global and not ip.is_multicast


class TimedResponse(http.client.HTTPResponse):
    """An answer whose header and body must arrive within the socket's timeout, however small the drops they come in."""

    def __init__(self, sock, *args, **kwargs):
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(TimedStream(sock, self.fp.detach()))


class TimedStream(io.RawIOBase):
    def __init__(self, sock, raw):
        self.sock, self.raw, self.deadline = sock, raw, monotonic() + sock.gettimeout()

    def readable(self):
        return True

    def readinto(self, buffer):
        self.sock.settimeout(max(self.deadline - monotonic(), 0.001))
        return self.raw.readinto(buffer)

    def close(self):
        self.raw.close()
        super().close()


def fetch(session: requests.Session, url: str, timeout: float, max_bytes: int) -> bytes:
    """Return the body behind an address; Skip says why not."""
    deadline = monotonic() + timeout
    try:
        for _ in range(MAX_REDIRECTS + 1):
            left = urllib3.Timeout(total=max(deadline - monotonic(), 0.001))
            with session.get(url, timeout=left, stream=True, allow_redirects=False) as response:
                if opted_out(response.headers):
                    raise Skip("opted out: X-Robots-Tag")
                if response.is_redirect:
                    url = urljoin(url, session.get_redirect_target(response))
                    continue
                if response.status_code != 200:
                    raise Skip(f"HTTP {response.status_code}")
                body = bytearray()
                for block in response.raw.stream(65536, decode_content=False):
                    body += block
                    if len(body) > max_bytes:
                        raise Skip("too large: see --max_bytes")
                return bytes(body)
        raise Skip("too many redirects")
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        # ValueError: addresses that cannot be parsed, or that a redirect points to with another scheme.
        if monotonic() >= deadline:
            raise Skip("timeout") from None
        if isinstance(error, ValueError):
            raise Skip(f"not an http(s) address: {url:.100}") from None
        raise Skip(f"broken connection: {type(error).__name__}") from None


def opted_out(headers) -> bool:
    """Whether an answer asks machines to keep off. `otherbot: noindex` is meant for another machine than this."""
    for directive in headers.get("X-Robots-Tag", "").lower().split(","):
        agent, _, rule = directive.rpartition(":")
        if rule.strip() in OPT_OUT and agent.strip() in ("", "*", "align_sd"):
            return True
    return False


def encode(body: bytes, args) -> bytes:
    """Return the picture in a body as the JPEG to keep; Skip says why not."""
    try:
        size = Image.open(io.BytesIO(body), formats=FORMATS).size
    except Exception:
        raise Skip("not a picture") from None
    if min(size) < args.min_size:
        raise Skip(f"too small: {size[0]} x {size[1]}")
    try:
        image = to_rgb(open_image(io.BytesIO(body)))
        if 0 < args.image_size < min(image.size):
            scale = args.image_size / min(image.size)
            image = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=args.quality)
        return jpeg.getvalue()
    except Exception as error:  # the web's pictures make the decoders raise anything, and none is worth the run
        raise Skip(f"not a picture: {str(error).removeprefix('not a readable picture: ')}") from None


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
