"""Files of a data set repository on the hub: downloaded whole and verified, or read where they lie by range requests.

Servers drop connections, cut answers short and say 503. Whatever may pass is tried again, for about two minutes, with
growing waits; what remains is a UserError, as running the same command again goes on. A file that the hub does not have
is a ValueError.
"""

import errno
import hashlib
import io
import os
import re
import sys
import time
from bisect import bisect_right
from pathlib import Path

from utils.errors import UserError

WAITS = (1, 2, 4, 8, 16, 32, 60)  # seconds, between attempts
TIMEOUT = (10, 60)  # seconds, to connect and between two bytes
TAIL = 256 << 10  # the end of a zip, where the directory of 1,000 members (about 100 kB) is
AHEAD = 4 << 20  # the most that a read may bring beyond what was asked for


def cached(repository: str, path: str, cache_dir: str | None = None) -> str | None:
    """Return the path of a file that lies in the hub's cache already, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, path, cache_dir=cache_dir, repo_type="dataset")
    return found if isinstance(found, str) else None


def download(repository: str, path: str, cache_dir: str | None = None) -> str:
    """Download a file into the hub's cache, or a folder of that form, unless it is there; verify its SHA-256."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils.logging import set_verbosity_error

    disable_progress_bars()  # a stage shows its own, and says what is tried again
    set_verbosity_error()

    def attempt():
        there = cached(repository, path, cache_dir)
        file = hf_hub_download(repository, path, repo_type="dataset", cache_dir=cache_dir)
        if file != there:
            verify(file)
        return file

    return retried(attempt, f"{repository}: {path}")


def verify(file: str):
    """Raise OSError and remove a file of the hub's cache whose SHA-256 is not the one that its blob is named by."""
    blob = os.path.realpath(file)
    if not re.fullmatch("[0-9a-f]{64}", Path(blob).name):
        return  # a small file, named by git, or a cache without links: only the size was compared
    with open(blob, "rb") as content:
        digest = hashlib.sha256()
        while block := content.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != Path(blob).name:
        remove(file)
        raise OSError("damaged on its way: its SHA-256 is not what the hub says")


def remove(file: str):
    """Remove a file from the hub's cache: the link and what it leads to."""
    Path(os.path.realpath(file)).unlink(missing_ok=True)
    Path(file).unlink(missing_ok=True)


def retried(attempt, what: str):
    """Return what `attempt()` returns, tried again after errors that may pass."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for wait in (*WAITS, None):
        try:
            return attempt()
        except UserError:
            raise
        except Exception as error:  # the hub's own errors, its HTTP library's, the operating system's
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
                raise
            missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
            if missing or status(error) == 404:
                raise ValueError("the hub has no such part") from None
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if wait is None or not may_pass(error):
                raise UserError(f"{what}: {reason} (run the same command again to go on)") from None
            print(f"{what}: {reason}; trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)


def may_pass(error: Exception) -> bool:
    from huggingface_hub.constants import is_offline_mode

    found = status(error)
    return not is_offline_mode() and (found is None or found in (408, 429) or found >= 500)


def status(error: BaseException | None) -> int | None:
    """Return the HTTP status that an error, or what caused it, came from."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return response.status_code
        error = error.__cause__
    return None


class RangeFile(io.RawIOBase):
    """A zip on the hub that ZipFile can read: a request brings the zip's end, then one each member that is opened.

    `fetched` counts the bytes of all answers. `boundaries`, the sorted starts of the members, are to be set once the
    directory is known.
    """

    def __init__(self, repository: str, path: str):
        import requests
        from huggingface_hub import hf_hub_url

        self.what, self.name = f"{repository}: {path}", path
        self.hub_url = self.url = hf_hub_url(repository, path, repo_type="dataset")
        self.session = requests.Session()
        self.fetched = self.position = 0
        self.boundaries, self.spans = [], []
        start, content, self.size = self.request(f"bytes=-{TAIL}")
        self.spans = [(start, content)]

    def request(self, wanted: str) -> tuple[int, bytes, int]:
        """Return where the answer to a Range header starts in the file, its bytes, and the file's size."""
        return retried(lambda: self.attempt(wanted), self.what)

    def attempt(self, wanted: str) -> tuple[int, bytes, int]:
        from huggingface_hub.constants import is_offline_mode
        from huggingface_hub.utils import build_hf_headers

        if is_offline_mode():
            raise UserError(f"{self.what}: not in the hub's cache, and HF_HUB_OFFLINE is set")
        # The hub leads to signed addresses elsewhere, which hold for a while and are not to see its token.
        headers = build_hf_headers() if self.url == self.hub_url else {}
        url, self.url = self.url, self.hub_url
        with self.session.get(url, headers=headers | {"Range": wanted}, timeout=TIMEOUT, stream=True) as answer:
            if answer.status_code in (401, 403) and url != self.hub_url:
                raise OSError("the signed address has expired")
            answer.raise_for_status()
            said = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", ""))
            if answer.status_code != 206 or not said:  # the whole zip is on its way
                raise UserError(f"{self.what}: the server does not answer range requests")
            content = answer.content
        self.fetched += len(content)
        start, last, size = map(int, said.groups())
        if len(content) != last + 1 - start:
            raise OSError("the answer was cut short")
        self.url = answer.url
        return start, content, size

    def read(self, count: int = -1) -> bytes:
        start = self.position
        end = self.size if count is None or count < 0 else min(start + count, self.size)
        if start >= end:
            return b""
        for offset, content in self.spans:
            if offset <= start and end <= offset + len(content):
                break
        else:
            following = bisect_right(self.boundaries, start)
            whole = self.boundaries[following] if following < len(self.boundaries) else end
            upto = max(end, min(whole, start + AHEAD))
            offset, content, _ = self.request(f"bytes={start}-{upto - 1}")
            if offset != start or len(content) < end - start:
                raise UserError(f"{self.what}: the server answers with other bytes than asked for")
            self.spans[1:] = [(offset, content)]
        self.position = end
        return content[start - offset : end - offset]

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True
